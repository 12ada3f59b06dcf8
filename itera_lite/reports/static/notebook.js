addEventListener("DOMContentLoaded", () => {
  const MOST = 12; // rows of a table in sight
  for (const table of document.querySelectorAll(".jp-RenderedHTMLCommon table")) {
    const rest = [...table.querySelectorAll("tbody tr")].slice(MOST), more = document.createElement("button");
    if (rest.length < 2) continue; // one row is not worth a fold
    const show = shown => {
      rest.forEach(row => { row.hidden = !shown; });
      more.textContent = shown ? "fewer rows" : `${rest.length} more rows`;
      more.setAttribute("aria-expanded", shown);
    };
    Object.assign(more, {type: "button", className: "more"}).addEventListener("click", () => show(rest[0].hidden));
    show(false);
    table.after(more);
  }
  const button = document.getElementById("code"), folds = [...document.querySelectorAll("details.code")];
  if (!button) return;
  let shown = false;
  button.hidden = folds.length === 0;
  button.addEventListener("click", () => {
    shown = !shown;
    folds.forEach(fold => { fold.open = shown || fold.hasAttribute("data-failed"); });
    button.textContent = shown ? "hide all code" : "show all code";
    button.setAttribute("aria-pressed", shown);
  });
});
