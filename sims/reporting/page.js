// What a page does besides standing there: it draws its figures, in the colours of the screen; copies commands; plays frames.
(function () {
  "use strict";
  var darkScreen = window.matchMedia("(prefers-color-scheme: dark)");
  var darkColours = JSON.parse(document.getElementById("dark-colours").textContent);
  var config = { responsive: true, displaylogo: false, displayModeBar: false };
  var drawings = Array.prototype.map.call(document.querySelectorAll("[data-figure]"), function (div) {
    return { div: div, spec: JSON.parse(document.getElementById(div.id + "-data").textContent), drawn: false, frame: -1 };
  });
  var printWidth = 680; // of a page of A4 or letter between its margins, in CSS pixels

  // A copy of what plotly is told, each colour as it is on a dark page; long columns of numbers are not looked through.
  function inTheme(value, dark) {
    if (typeof value === "string") { return dark && Object.prototype.hasOwnProperty.call(darkColours, value) ? darkColours[value] : value; }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" && typeof value[1] !== "string" ? value : value.map(function (each) { return inTheme(each, dark); });
    }
    if (value && typeof value === "object") {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = inTheme(value[key], dark); });
      return copy;
    }
    return value;
  }

  function layoutOf(drawing, dark, width) {
    var layout = inTheme(drawing.spec.layout, dark);
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    if (width) {
      var beside = drawing.div.closest(".side-by-side");
      layout.width = width / (beside ? beside.children.length : 1) - (beside ? 8 : 0);
      layout.autosize = false;
    }
    return layout;
  }

  function draw(drawing, dark, width) {
    var data = inTheme(drawing.spec.data, dark), layout = layoutOf(drawing, dark, width);
    if (drawing.drawn) {
      Plotly.react(drawing.div, data, layout, config);
      if (drawing.frame >= 0) { showFrame(drawing, drawing.frame); }
      return;
    }
    drawing.drawn = true;
    Plotly.newPlot(drawing.div, data, layout, config);
    if (drawing.spec.frames) { Plotly.addFrames(drawing.div, drawing.spec.frames); }
  }

  function drawAll(dark, width) { drawings.forEach(function (drawing) { draw(drawing, dark, width); }); }

  // One after the other, so that the page can be read and scrolled from the first moment on.
  function drawNext() {
    var next = drawings.filter(function (drawing) { return !drawing.drawn; })[0];
    if (!next) { document.body.dataset.drawn = Math.round(performance.now()); return; }
    draw(next, darkScreen.matches, 0);
    setTimeout(drawNext, 0);
  }

  darkScreen.addEventListener("change", function () { drawAll(darkScreen.matches, 0); });
  // Paper is white, and narrower than most screens.
  window.addEventListener("beforeprint", function () { drawAll(false, printWidth); });
  window.addEventListener("afterprint", function () { drawAll(darkScreen.matches, 0); });

  function say(text) { document.getElementById("said").textContent = text; }

  document.querySelectorAll("button[data-copy]").forEach(function (button) {
    button.addEventListener("click", function () {
      var source = document.getElementById(button.dataset.copy);
      function done(copied) {
        button.textContent = copied ? "Copied" : "Copy";
        say(copied ? "The command is copied." : "It could not be copied: the command is selected, copy it with Ctrl+C.");
        if (!copied) { window.getSelection().selectAllChildren(source); }
        button.focus();
      }
      function byHand() {
        var area = document.createElement("textarea"), copied = false;
        area.value = source.textContent;
        document.body.appendChild(area);
        area.select();
        try { copied = document.execCommand("copy"); } catch (error) { copied = false; }
        area.remove();
        done(copied);
      }
      if (navigator.clipboard && window.isSecureContext) {
        navigator.clipboard.writeText(source.textContent).then(function () { done(true); }, byHand);
      } else { byHand(); }
    });
  });

  function showFrame(drawing, place) {
    drawing.frame = place;
    if (!drawing.drawn) { return; }
    var at = { mode: "immediate", frame: { duration: 0, redraw: true }, transition: { duration: 0 } };
    Plotly.animate(drawing.div, [String(place)], at);
  }

  document.querySelectorAll(".player").forEach(function (player) {
    var slider = player.querySelector("input"), button = player.querySelector("button"), told = player.querySelector("output");
    var labels = JSON.parse(player.dataset.labels), timer = null;
    var shown = drawings.filter(function (drawing) { return player.dataset.figures.split(" ").indexOf(drawing.div.id) >= 0; });
    function show(place) {
      slider.value = place;
      slider.setAttribute("aria-valuetext", labels[place]);
      told.textContent = labels[place];
      shown.forEach(function (drawing) { showFrame(drawing, place); });
    }
    function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; button.setAttribute("aria-pressed", "false"); }
    slider.addEventListener("input", function () { stop(); show(Number(slider.value)); });
    button.addEventListener("click", function () {
      if (timer) { stop(); return; }
      button.textContent = "Pause";
      button.setAttribute("aria-pressed", "true");
      if (Number(slider.value) === labels.length - 1) { show(0); }
      timer = setInterval(function () {
        if (Number(slider.value) < labels.length - 1) { show(Number(slider.value) + 1); } else { stop(); }
      }, 400);
    });
  });

  requestAnimationFrame(function () { setTimeout(drawNext, 0); });
})();
