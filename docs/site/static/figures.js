// Draws the figures of a page, for a light or a dark one, and anew when that changes.
(function () {
  "use strict";
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  function theme() {
    const chosen = document.body.dataset.theme;
    return chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
  }

  // On a telephone: smaller words, so that titles and tables beside each other stay apart.
  function makeNarrow(figure) {
    const small = { size: 10 };
    (figure.layout.annotations || []).forEach(note => { note.font = { ...note.font, ...small }; });
    [figure, ...(figure.frames || [])].forEach(each => each.data.filter(trace => trace.type === "table").forEach(table => {
      table.columnwidth = [1, 2.5];
      [table.header, table.cells].filter(Boolean).forEach(part => { part.font = { ...part.font, ...small }; });
    }));
    (figure.layout.sliders || []).forEach(slider => { slider.pad = { t: 10, l: 95, r: 20 }; });
  }

  function draw(holder) {
    const of = name => holder.querySelector(`script[data-theme="${name}"]`);
    const source = of(theme()) || of("light");
    if (holder.dataset.shown === source.dataset.theme) return;
    holder.dataset.shown = source.dataset.theme;
    const figure = JSON.parse(source.textContent);
    let target = holder.querySelector(".plotly-target");
    if (target) { Plotly.purge(target); } else {
      target = holder.appendChild(document.createElement("div"));
      target.className = "plotly-target";
    }
    if (holder.clientWidth < 500) makeNarrow(figure);
    Plotly.newPlot(target, { data: figure.data, layout: figure.layout, frames: figure.frames, config });
  }

  function drawAll() { document.querySelectorAll(".plotly-figure").forEach(draw); }

  drawAll();
  system.addEventListener("change", drawAll);
  new MutationObserver(drawAll).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
})();
