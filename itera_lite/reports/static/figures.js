addEventListener("DOMContentLoaded", () => {
  const NARROW = 560; // pixels of a figure
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const MARKS = {circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", x: "✕", star: "★", pentagon: "⬟", hexagon2: "⬢"};

  // A long label takes several lines, so that the plot keeps its width on a phone.
  function wrapped(label, most = 17) {
    const lines = [""];
    for (const word of String(label).split(" "))
      lines.at(-1) && (lines.at(-1) + " " + word).length > most ? lines.push(word) : lines[lines.length - 1] = (lines.at(-1) + " " + word).trim();
    return lines.join("<br>");
  }
  function narrowed(data, layout) {
    if (!layout.polar) layout.margin = {...layout.margin, l: Math.min(layout.margin?.l ?? 50, 50), r: 10};
    layout.font = {...layout.font, size: 11};
    const title = layout.xaxis?.title?.text ?? "", short = wrapped(title, 40);
    if (short !== title) { layout.xaxis.title.text = short; layout.margin.b += 16; }
    const labels = layout.yaxis?.categoryarray ?? [...new Set(data.flatMap(t => Array.isArray(t.y) && t.y.some(v => typeof v === "string") ? t.y : []))];
    if (labels.length) Object.assign(layout.yaxis ??= {}, {tickmode: "array", tickvals: labels, ticktext: labels.map(l => wrapped(l)), tickfont: {size: 10}});
  }
  function dressed(figure, width) {
    const {data, layout} = structuredClone(figure), fg = colour("--fg"), grid = colour("--grid"), clear = "rgba(0,0,0,0)";
    const axis = a => Object.assign(a ?? {}, {gridcolor: grid, linecolor: grid, zerolinecolor: grid});
    Object.assign(layout, {paper_bgcolor: clear, plot_bgcolor: clear, autosize: true, showlegend: false, font: {...layout.font, color: fg}});
    layout.margin = {...layout.margin, b: Math.min(layout.margin?.b ?? 50, 50)}; // the legend is below the figure, not in it
    delete layout.width;
    for (const name of ["xaxis", "yaxis", ...Object.keys(layout).filter(k => /^[xy]axis\d/.test(k))]) layout[name] = axis(layout[name]);
    for (const name of Object.keys(layout).filter(k => /^polar\d*$/.test(k)))
      Object.assign(layout[name], {bgcolor: clear, radialaxis: axis(layout[name].radialaxis), angularaxis: axis(layout[name].angularaxis)});
    layout.modebar = {bgcolor: clear, color: colour("--muted"), activecolor: fg, remove: ["select", "lasso", "zoomin", "zoomout", "autoscale", "pan", "zoom", "sendChartToCloud"]};
    if (width < NARROW) narrowed(data, layout);
    return [data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, displayModeBar: width < NARROW ? false : undefined}];
  }

  const PLAIN = ["heatmap", "heatmapgl", "contour", "table", "surface", "image"]; // kinds that a legend does not name
  function mark(trace, i, palette) {
    const symbols = [trace.marker?.symbol ?? "circle"].flat(), symbol = symbols.find(s => !String(s).endsWith("-open")) ?? symbols[0];
    const lines = (trace.mode ?? "lines").includes("lines") && /^scatter/.test(trace.type ?? "scatter");
    const dashed = trace.line?.dash && trace.line.dash !== "solid";
    const shape = (lines ? (dashed ? "┄" : "—") : "") + (/^scatter/.test(trace.type ?? "scatter") && !(trace.mode ?? "").includes("markers") && lines ? "" : MARKS[String(symbol).replace("-open", "")] ?? "●");
    const own = [trace.marker?.color, trace.line?.color].find(c => typeof c === "string");
    return {shape, colour: own ?? palette[i % palette.length]};
  }
  // The legend is text of the page: it wraps, and never takes room from the axes. A click hides or shows what it names.
  function legend(plot) {
    const {data, layout} = plot.figure, palette = layout.colorway ?? layout.template?.layout?.colorway ?? ["#636efa"];
    const named = new Map();
    data.forEach((trace, i) => {
      if (trace.showlegend === false || !trace.name || PLAIN.includes(trace.type)) return;
      named.set(trace.name, [...(named.get(trace.name) ?? []), i]);
    });
    if (layout.showlegend === false || (named.size < 2 && !layout.showlegend)) return;
    const list = document.createElement("ul");
    list.className = "legend";
    for (const [name, indices] of named) {
      const button = document.createElement("button"), sign = document.createElement("span"), {shape, colour} = mark(data[indices[0]], indices[0], palette);
      Object.assign(sign, {textContent: shape}).style.color = colour;
      button.type = "button";
      button.title = "hide or show";
      button.append(sign, " " + name.replace(/<[^>]*>/g, ""));
      const state = () => button.setAttribute("aria-pressed", data[indices[0]].visible !== "legendonly");
      button.addEventListener("click", () => {
        const to = data[indices[0]].visible === "legendonly" ? true : "legendonly";
        indices.forEach(i => { data[i].visible = to; });
        if (window.Plotly) Plotly.restyle(plot.canvas, {visible: to}, indices);
        state();
      });
      state();
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
    plot.canvas.after(list);
  }

  const plots = [...document.querySelectorAll("figure.plot")].map(box =>
    ({canvas: box.querySelector(".canvas"), figure: JSON.parse(box.querySelector("script").textContent)}));
  plots.forEach(legend);
  const seen = p => !p.canvas.closest("details:not([open])"); // a figure behind a fold is drawn when that opens
  const draw = () => plots.filter(seen).forEach(p => {
    p.drawn = true;
    if (window.Plotly) Plotly.react(p.canvas, ...dressed(p.figure, p.canvas.clientWidth));
    else p.canvas.textContent = "This figure needs plotly.min.js, which lies beside this page where the report was built.";
  });
  draw();
  dark.addEventListener("change", draw);
  addEventListener("toggle", () => { if (plots.some(p => !p.drawn && seen(p))) draw(); }, true);
});
