// Draws every <div class="plot"> from the JSON beside it; without WebGL, points are drawn as SVG and 3D views say so.
(function () {
  "use strict";
  const canvas = document.createElement("canvas");
  const webgl = Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  function draw(box) {
    const figure = JSON.parse(document.getElementById(box.id + "-data").textContent);
    const solid = figure.data.some((trace) => trace.type === "mesh3d" || trace.type === "scatter3d");
    if (!webgl && solid) {
      box.innerHTML = '<p class="missing">This view needs WebGL, which this browser does not offer.</p>';
      return;
    }
    if (!webgl) figure.data.forEach((trace) => { if (trace.type === "scattergl") trace.type = "scatter"; });
    options.displayModeBar = box.clientHeight > 250 ? "hover" : false;
    Plotly.newPlot(box, { data: figure.data, layout: figure.layout, frames: figure.frames || [], config: { ...options } });
  }
  document.querySelectorAll(".plot").forEach(draw);

  // Latents: choices of axes and colour act on the scatter and the density plot together.
  const store = document.getElementById("latent-columns");
  if (!store) return;
  const columns = JSON.parse(store.textContent);
  const scatter = document.getElementById("latent-scatter");
  const density = document.getElementById("latent-density");
  const colour = document.getElementById("latent-colour");
  const pair = document.getElementById("latent-pair");
  if (colour) {
    colour.addEventListener("change", function () {
      Plotly.restyle(scatter, {
        "marker.color": [columns[colour.value]], "marker.colorbar.title.text": colour.selectedOptions[0].text,
      }, [0]);
    });
  }
  if (pair) {
    pair.addEventListener("change", function () {
      const [x, y] = pair.value.split(",");
      const titles = { "xaxis.title.text": "latent " + x, "yaxis.title.text": "latent " + y,
        "xaxis.autorange": true, "yaxis.autorange": true };
      scatter.data.slice(1).forEach((path, index) => { // where the generated frames lie
        Plotly.restyle(scatter, { x: [path.customdata[x - 1]], y: [path.customdata[y - 1]] }, [index + 1]);
      });
      [scatter, density].forEach((box) => {
        Plotly.update(box, { x: [columns["z" + x]], y: [columns["z" + y]] }, titles, [0]);
      });
    });
  }
})();
