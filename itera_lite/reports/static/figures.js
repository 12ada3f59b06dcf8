addEventListener("DOMContentLoaded", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function dressed(figure, width) {
    const {data, layout} = structuredClone(figure), fg = colour("--fg"), grid = colour("--grid"), clear = "rgba(0,0,0,0)";
    const axis = a => Object.assign(a ?? {}, {gridcolor: grid, linecolor: grid, zerolinecolor: grid});
    Object.assign(layout, {paper_bgcolor: clear, plot_bgcolor: clear, autosize: true, font: {...layout.font, color: fg}});
    delete layout.width;
    for (const name of ["xaxis", "yaxis", ...Object.keys(layout).filter(k => /^[xy]axis\d/.test(k))]) layout[name] = axis(layout[name]);
    for (const name of Object.keys(layout).filter(k => /^polar\d*$/.test(k)))
      Object.assign(layout[name], {bgcolor: clear, radialaxis: axis(layout[name].radialaxis), angularaxis: axis(layout[name].angularaxis)});
    layout.modebar = {bgcolor: clear, color: colour("--muted"), activecolor: fg, remove: ["select", "lasso", "zoomin", "zoomout", "autoscale", "pan", "zoom", "sendChartToCloud"]};
    if (width < 560 && !layout.polar) layout.margin = {...layout.margin, l: Math.min(layout.margin?.l ?? 50, 50), r: 8};
    return [data, layout, {responsive: true, displaylogo: false, showSendToCloud: false}];
  }
  const plots = [...document.querySelectorAll("figure.plot")].map(box =>
    ({canvas: box.querySelector(".canvas"), figure: JSON.parse(box.querySelector("script").textContent)}));
  const draw = () => plots.forEach(p => {
    if (window.Plotly) Plotly.react(p.canvas, ...dressed(p.figure, p.canvas.clientWidth));
    else p.canvas.textContent = "This figure needs plotly.min.js, which lies beside this page where the report was built.";
  });
  draw();
  dark.addEventListener("change", draw);
});
