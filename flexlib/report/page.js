// Draws every <div class="plot"> from the JSON beside it; without WebGL, points are drawn as SVG and 3D views say so.
(function () {
  "use strict";
  const canvas = document.createElement("canvas");
  const webgl = Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  const MOST_SVG_POINTS = 5000; // more of them make a browser crawl
  // nothing leaves this page: no button that uploads the data
  const options = { displaylogo: false, responsive: true, plotlyServerURL: "", showSendToCloud: false };
  const [upload, select] = [["sendChartToCloud", "sendDataToCloud"], ["select2d", "lasso2d"]];
  const byId = (name) => document.getElementById(name);

  const store = byId("latent-columns");
  const particles = store ? unpacked(JSON.parse(store.textContent)) : null;
  window.flexlib = { particles, bytesOf, valuesOf, rowsOf, download, plainName }; // for explorer.js

  function draw(box) {
    const figure = JSON.parse(byId(box.id + "-data").textContent);
    const solid = figure.data.some((trace) => trace.type === "mesh3d" || trace.type === "scatter3d");
    if (!webgl && solid) {
      box.innerHTML = '<p class="missing">This view needs WebGL, which this browser does not offer.</p>';
      return;
    }
    if (particles && box.id.startsWith("latent-")) addParticles(box.id, figure);
    if (!webgl) figure.data.forEach((trace) => { if (trace.type === "scattergl") trace.type = "scatter"; });
    const config = { ...options, displayModeBar: figure.layout.height > 250 ? "hover" : false,
      modeBarButtonsToRemove: box.id === "latent-scatter" ? upload : [...upload, ...select] };
    Plotly.newPlot(box, { data: figure.data, layout: figure.layout, frames: figure.frames || [], config });
  }
  document.querySelectorAll(".plot").forEach(draw);
  if (particles && byId("latent-scatter")) connectLatents();

  // Particles: packing.py packs them, this is its inverse -------------------------------------------------------

  function bytesOf(base64) {
    return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  }

  // every step-th value of a packed column
  function valuesOf(column, step = 1) {
    const bytes = bytesOf(column.data);
    const wide = column.bits === 16;
    const nothing = 2 ** column.bits - 1;
    const values = new Float32Array(Math.ceil(bytes.length / (wide ? 2 : 1) / step));
    for (let i = 0; i < values.length; i++) {
      const at = i * step;
      const code = wide ? bytes[2 * at] + 256 * bytes[2 * at + 1] : bytes[at];
      values[i] = code === nothing ? NaN : column.low + (code / (nothing - 1)) * (column.high - column.low);
    }
    return values;
  }

  function rowsOf(packed) {
    const rows = [];
    let row = -1;
    bytesOf(packed).forEach((gap) => { row += gap; if (gap < 255) rows.push(row); });
    return rows;
  }

  function plainName(text) {
    return text.replace(/[^A-Za-z0-9_.-]+/g, "_");
  }

  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function unpacked(content) {
    const step = webgl ? 1 : Math.ceil(content.count / MOST_SVG_POINTS);
    const columns = {};
    Object.entries(content.columns).forEach(([name, column]) => { columns[name] = valuesOf(column, step); });
    const rows = rowsOf(content.rows);
    return { columns, rows: rows.filter((_, i) => i % step === 0), total: content.total, latents: content.latents };
  }

  // [low, high] of an axis: the data's range, unless a few strays would shrink the rest
  function limits(values) {
    const sorted = values.filter(Number.isFinite).sort();
    if (!sorted.length) return [0, 1];
    const at = (part) => sorted[Math.round(part * (sorted.length - 1))];
    let [low, high] = [at(0), at(1)];
    if (high - low > 1.6 * (at(0.998) - at(0.002))) [low, high] = [at(0.002), at(0.998)];
    const margin = 0.05 * (high - low) || 1;
    return [low - margin, high + margin];
  }

  // [low, high] of the colours: without the outermost hundredths
  function colourLimits(values) {
    const sorted = values.filter(Number.isFinite).sort();
    const at = (part) => sorted[Math.round(part * (sorted.length - 1))];
    return at(0.01) < at(0.99) ? [at(0.01), at(0.99)] : [at(0), at(1)];
  }

  function chosen(name) {
    const list = byId(name);
    return { column: list.value, label: list.selectedOptions[0].text, values: particles.columns[list.value] };
  }

  function bins(range, count) {
    return { start: range[0], end: range[1], size: (range[1] - range[0]) / count };
  }

  function dataOnAxes(box, figure) {
    const [x, y] = [chosen("latent-x"), chosen("latent-y")];
    const trace = figure.data[0];
    const layout = { "xaxis.title.text": x.label, "xaxis.range": limits(x.values) };
    const flat = trace.type === "histogram"; // a single latent: y is a count
    const count = Math.max(12, Math.min(80, Math.round(Math.sqrt(particles.rows.length) / 1.6)));
    const data = { x: x.values };
    if (box === "latent-density") data.xbins = bins(layout["xaxis.range"], count);
    if (!flat) {
      data.y = y.values;
      layout["yaxis.title.text"] = y.label;
      layout["yaxis.range"] = limits(y.values);
      if (box === "latent-density") data.ybins = bins(layout["yaxis.range"], count);
    }
    return { data, layout };
  }

  function addParticles(box, figure) {
    const { data, layout } = dataOnAxes(box, figure);
    Object.assign(figure.data[0], data);
    Object.entries(layout).forEach(([key, value]) => {
      const [axis, ...path] = key.split(".");
      figure.layout[axis] = figure.layout[axis] || {};
      if (path[0] === "title") figure.layout[axis].title = { ...figure.layout[axis].title, text: value };
      else figure.layout[axis][path[0]] = value;
    });
    if (box !== "latent-scatter") return;
    const colour = chosen("latent-colour");
    const marker = figure.data[0].marker;
    [marker.cmin, marker.cmax] = colourLimits(colour.values);
    marker.color = colour.values;
    marker.colorbar.title.text = colour.label;
    figure.data[0].customdata = particles.rows.map((row) => row + 1);
    figure.data.slice(1).forEach((path) => Object.assign(path, pathOnAxes(path)));
  }

  // where the generated frames lie, if both axes are latents
  function pathOnAxes(path) {
    const at = (name) => path.customdata[particles.latents.indexOf(byId(name).value)];
    const [x, y] = [at("latent-x"), at("latent-y")];
    return x && y ? { x, y, visible: true } : { visible: false };
  }

  // The choices above the plots, and the lasso -----------------------------------------------------------------

  function connectLatents() {
    const [scatter, density] = [byId("latent-scatter"), byId("latent-density")];
    const [panel, lasso] = [byId("latent-picked"), byId("latent-lasso")];
    let picked = []; // indices into particles.rows
    let outline = null; // of the last lasso or box, where it alone made the selection

    byId("latent-colour").addEventListener("change", function () {
      const colour = chosen("latent-colour");
      const [cmin, cmax] = colourLimits(colour.values);
      Plotly.restyle(scatter, { "marker.color": [colour.values], "marker.cmin": cmin, "marker.cmax": cmax,
        "marker.colorbar.title.text": colour.label }, [0]);
    });
    ["latent-x", "latent-y"].forEach((name) => byId(name).addEventListener("change", function () {
      clear();
      [scatter, density].forEach((box) => {
        const { data, layout } = dataOnAxes(box.id, box);
        const wrapped = {};
        Object.entries(data).forEach(([key, value]) => { wrapped[key] = [value]; });
        Plotly.update(box, wrapped, layout, [0]);
      });
      scatter.data.slice(1).forEach((path, index) => {
        const line = pathOnAxes(path);
        Plotly.restyle(scatter, line.x ? { x: [line.x], y: [line.y], visible: true } : line, [index + 1]);
      });
    }));
    lasso.addEventListener("click", () => {
      const on = lasso.getAttribute("aria-pressed") === "true";
      Plotly.relayout(scatter, { dragmode: on ? "zoom" : "lasso" });
    });
    scatter.on("plotly_relayout", () => {
      lasso.setAttribute("aria-pressed", String(scatter.layout.dragmode === "lasso"));
    });
    scatter.on("plotly_selected", (event) => {
      picked = event ? Array.from(scatter.data[0].selectedpoints || []).sort((a, b) => a - b) : [];
      outline = event && (scatter.layout.selections || []).length < 2 ? corners(event) : null;
      show();
    });
    scatter.on("plotly_deselect", clear);
    byId("latent-clear").addEventListener("click", clear);
    byId("latent-save").addEventListener("click", save);

    function corners(event) {
      if (event.lassoPoints) return event.lassoPoints.x.map((x, i) => [x, event.lassoPoints.y[i]]);
      if (!event.range) return null;
      const { x: [x0, x1], y: [y0, y1] } = event.range;
      return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    }

    function clear() {
      picked = [];
      outline = null;
      panel.hidden = true;
      if (scatter.data[0].selectedpoints || (scatter.layout.selections || []).length) {
        Plotly.update(scatter, { selectedpoints: [null] }, { selections: [] }, [0]);
      }
    }

    function listName() {
      return plainName(panel.dataset.name) + "_selected.csv";
    }

    function show() {
      panel.hidden = picked.length === 0;
      const rows = new Set(picked.map((index) => particles.rows[index])); // symmetry gives a particle several
      byId("latent-count").textContent = rows.size.toLocaleString("en") + (rows.size === 1 ? " particle" : " particles") +
        " selected.";
      const axes = ["latent-x", "latent-y"].map((name) => particles.latents.indexOf(byId(name).value) + 1);
      const all = particles.rows.length === particles.total;
      let region = "--rows " + listName();
      if (!all && outline && axes[0] && axes[1]) { // particles that are not drawn lie inside too
        region = `--polygon '${axes.join(",")}: ` +
          outline.map((corner) => corner.map((value) => Number(value.toPrecision(6))).join(",")).join(" ") + "'" + panel.dataset.further;
      }
      byId("latent-command").textContent =
        `flex-select ${panel.dataset.folder} ${region} --out subset${panel.dataset.suffix}`;
    }

    function save() {
      const names = particles.latents;
      const head = ["flexInputRow", ...names.map((name) => "flexLatent" + name.slice(1))];
      const lines = picked.map((index) => [
        particles.rows[index], ...names.map((name) => Number(particles.columns[name][index].toPrecision(5))),
      ].join(","));
      download(listName(), [head.join(","), ...lines].join("\n") + "\n");
    }
  }
})();
