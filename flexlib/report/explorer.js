// The section "Explore": a dragged point or a slider moves the surface; the way there can be kept as a path.
(function () {
  "use strict";
  const byId = (name) => document.getElementById("explorer-" + name);
  if (!byId("data")) return;
  const { Flow, particles, download, plainName, surfaceView, fit, dragged, onKeys, clamp } = window.flexlib;
  const content = JSON.parse(byId("data").textContent);
  const box = document.getElementById("explorer");
  const canvas = byId("surface");
  const soft = drawnByCpu();
  const gl = canvas.getContext("webgl2", { antialias: !soft });
  if (!gl) { // page.js says of the other views what they need
    box.innerHTML = '<p class="missing">This view needs WebGL 2, which this browser does not offer.</p>';
    return;
  }
  const flow = new Flow(content);
  const dims = content.start.length;
  const known = particles ? particles.latents.map((name) => particles.columns[name]) : [];
  const INK = "#1d2733", MUTED = "#5b6875", GRID = "#e3e8ee", BLUE = "#1f6fb4", WARM = "#d1731f", RED = "#c62828";
  const AXIS_S = 4, WAY_S = 1.2; // seconds to play half an axis; and one standard deviation of a path

  let stale = true; // the surface is not that of z
  let waiting = false; // for the next frame
  let z = content.start.slice();
  let path = []; // latents
  let playing = null; // {from, latents}: when it began, and where it is after so many seconds

  const view = surfaceView(canvas, gl, soft, flow, content, (lost) => { stale = stale || lost; redraw(); });

  function drawnByCpu() {
    const probe = document.createElement("canvas").getContext("webgl2");
    const names = probe && probe.getExtension("WEBGL_debug_renderer_info");
    const name = names ? String(probe.getParameter(names.UNMASKED_RENDERER_WEBGL)) : "";
    if (probe) probe.getExtension("WEBGL_lose_context").loseContext();
    return /swiftshader|llvmpipe|software|basic render/i.test(name);
  }

  function redraw() {
    if (!waiting) requestAnimationFrame(frame);
    waiting = true;
  }

  function frame(now) {
    waiting = false;
    if (playing) step(now);
    if (stale) {
      flow.move(z);
      view.upload();
      tell();
      stale = false;
    }
    view.draw();
    plot.draw();
    if (playing) redraw();
  }

  function moveTo(latents) {
    z = latents.map((value, axis) => clamp(value, content.low[axis], content.high[axis]));
    stale = true;
    if (byId("record").getAttribute("aria-pressed") === "true") keep(0.05);
    redraw();
  }

  // The latent plot -----------------------------------------------------------------------------------------------

  const plot = (function () {
    const drawn = byId("plot");
    const pen = drawn.getContext("2d");
    const [LEFT, RIGHT, TOP, BOTTOM] = [46, 10, 10, 40];
    let back = null; // the particles, drawn once for each size and choice of axes
    const axes = () => [byId("x") ? Number(byId("x").value) : 0, byId("y") ? Number(byId("y").value) : 1];
    const heights = dims === 1 && known.length ? histogram(known[0]) : null;
    new ResizeObserver(redraw).observe(drawn);
    ["x", "y"].forEach((name) => byId(name) && byId(name).addEventListener("change", () => { back = null; redraw(); }));

    function histogram(values) {
      const counts = new Float32Array(48);
      values.forEach((value) => {
        const bin = Math.floor((value - content.low[0]) / (content.high[0] - content.low[0]) * counts.length);
        if (bin >= 0 && bin < counts.length) counts[bin]++;
      });
      return counts;
    }

    function scales() {
      const [x, y] = axes();
      const [width, height] = [drawn.clientWidth, drawn.clientHeight];
      const scale = (axis, from, to) => ({
        axis, at: (value) => from + (value - content.low[axis]) / (content.high[axis] - content.low[axis]) * (to - from),
        back: (place) => content.low[axis] + (place - from) / (to - from) * (content.high[axis] - content.low[axis]),
      });
      return { width, height, x: scale(x, LEFT, width - RIGHT), y: dims > 1 ? scale(y, height - BOTTOM, TOP) : null };
    }

    function ticks(axis) {
      const span = content.high[axis] - content.low[axis];
      const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((size) => span / size <= 8) || span / 4;
      const first = Math.ceil(content.low[axis] / step);
      return Array.from({ length: Math.floor(content.high[axis] / step) - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(2)));
    }

    function drawBack() {
      back = document.createElement("canvas");
      [back.width, back.height] = [drawn.width, drawn.height];
      const ink = back.getContext("2d");
      const { width, height, x, y } = scales();
      ink.scale(back.width / width, back.height / height);
      [ink.font, ink.strokeStyle, ink.fillStyle] = ["12px system-ui, sans-serif", GRID, MUTED];
      const line = (...ends) => { ink.beginPath(); ink.moveTo(ends[0], ends[1]); ink.lineTo(ends[2], ends[3]); ink.stroke(); };
      ink.textAlign = "center";
      ticks(x.axis).forEach((value) => {
        line(x.at(value), TOP, x.at(value), height - BOTTOM);
        ink.fillText(value, x.at(value), height - BOTTOM + 16);
      });
      ink.fillText(`latent ${x.axis + 1}`, (LEFT + width - RIGHT) / 2, height - 6);
      if (y) {
        ink.textAlign = "right";
        ticks(y.axis).forEach((value) => {
          line(LEFT, y.at(value), width - RIGHT, y.at(value));
          ink.fillText(value, LEFT - 6, y.at(value) + 4);
        });
        ink.save();
        ink.translate(13, (TOP + height - BOTTOM) / 2);
        ink.rotate(-Math.PI / 2);
        ink.textAlign = "center";
        ink.fillText(`latent ${y.axis + 1}`, 0, 0);
        ink.restore();
      }
      ink.fillStyle = BLUE;
      if (heights) {
        const [bar, most] = [(width - LEFT - RIGHT) / heights.length, Math.max(...heights)];
        ink.globalAlpha = 0.35;
        heights.forEach((count, i) => {
          const tall = (height - TOP - BOTTOM) * count / most;
          ink.fillRect(LEFT + i * bar + 0.5, height - BOTTOM - tall, bar - 1, tall);
        });
      } else if (known.length) {
        ink.beginPath();
        ink.rect(LEFT, TOP, width - LEFT - RIGHT, height - TOP - BOTTOM);
        ink.clip();
        const size = clamp(110 / Math.sqrt(known[0].length), 1.2, 3);
        ink.globalAlpha = clamp(25 / Math.sqrt(known[0].length), 0.1, 0.5);
        known[x.axis].forEach((value, i) => ink.fillRect(x.at(value) - size / 2, y.at(known[y.axis][i]) - size / 2, size, size));
      }
    }

    function draw() {
      if (fit(drawn) || !back) drawBack();
      const { width, height, x, y } = scales();
      const place = (latents) => [x.at(latents[x.axis]), y ? y.at(latents[y.axis]) : (TOP + height - BOTTOM) / 2];
      pen.setTransform(1, 0, 0, 1, 0, 0);
      pen.clearRect(0, 0, drawn.width, drawn.height);
      pen.drawImage(back, 0, 0);
      pen.scale(drawn.width / width, drawn.height / height);
      [pen.lineWidth, pen.strokeStyle, pen.fillStyle] = [2, WARM, WARM];
      pen.beginPath();
      path.forEach((latents) => pen.lineTo(...place(latents)));
      pen.stroke();
      path.forEach((latents) => { pen.beginPath(); pen.arc(...place(latents), 2.5, 0, 7); pen.fill(); });
      const [px, py] = place(z);
      pen.beginPath();
      if (!y) { pen.moveTo(px, TOP); pen.lineTo(px, height - BOTTOM); }
      [pen.strokeStyle, pen.lineWidth] = [INK, 1.5];
      pen.stroke();
      pen.beginPath();
      pen.arc(px, py, 8, 0, 7);
      [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [isBeyond() ? RED : BLUE, "#fff", 2.5];
      pen.fill();
      pen.stroke();
    }

    function follow(event) {
      const { x, y } = scales();
      const { left, top } = drawn.getBoundingClientRect();
      const latents = z.slice();
      latents[x.axis] = x.back(event.clientX - left);
      if (y && y.axis !== x.axis) latents[y.axis] = y.back(event.clientY - top);
      halt();
      moveTo(latents);
    }

    function nudge(side, sign) {
      const { x, y } = scales();
      const axis = side === "x" || !y ? x.axis : y.axis;
      halt();
      moveTo(z.map((value, i) => (i === axis ? value + sign * 0.02 * (content.high[i] - content.low[i]) : value)));
    }

    dragged(drawn, follow, follow);
    onKeys(drawn, { ArrowLeft: () => nudge("x", -1), ArrowRight: () => nudge("x", 1), ArrowUp: () => nudge("y", 1),
      ArrowDown: () => nudge("y", -1) });
    return { draw };
  })();

  // What is said --------------------------------------------------------------------------------------------------

  // particles near z, as generate counts them (neighbourhood.py); of those that are not drawn as many again
  function numNear() {
    const reach2 = content.near ** 2;
    let count = 0;
    for (let i = 0; i < known[0].length; i++) {
      let square = 0;
      for (let axis = 0; axis < dims; axis++) square += ((known[axis][i] - z[axis]) / content.spread[axis]) ** 2;
      if (square <= reach2) count++;
    }
    return count * particles.total / known[0].length;
  }

  let near = NaN;
  function isBeyond() {
    return near < content.fewest;
  }

  function tell() {
    near = known.length ? numNear() : NaN;
    z.forEach((value, axis) => {
      const slider = byId("latent-" + (axis + 1));
      if (document.activeElement !== slider || playing) slider.value = value;
      slider.nextElementSibling.textContent = value.toFixed(2);
    });
    const status = byId("status");
    status.classList.toggle("beyond", isBeyond());
    if (!known.length) return;
    const about = known[0].length < particles.total ? "About " : "";
    const words = `${about}${Math.round(near).toLocaleString("en")} ${Math.round(near) === 1 ? "particle is" : "particles are"} near.`;
    status.textContent = isBeyond() ? `${words} Beyond the data: only the mesh and its rigidity say how the molecule looks here.` : words;
  }

  // The path, and playing -----------------------------------------------------------------------------------------

  const apart = (a, b) => Math.hypot(...a.map((value, axis) => (value - b[axis]) / content.spread[axis]));

  // add z to the path, if it is far enough from the last point, in standard deviations
  function keep(least) {
    const last = path[path.length - 1];
    if (path.length >= content.most_points || (last && apart(last, z) <= least)) return;
    path.push(z.slice());
    showPath();
  }

  function showPath() {
    const some = path.length > 0;
    const full = path.length >= content.most_points;
    [byId("save").disabled, byId("clear").disabled, byId("made").hidden] = [!some, !some, !some];
    byId("along").querySelector('[value="path"]').disabled = path.length < 2;
    byId("path").textContent = (some ? `The path has ${path.length} point${path.length > 1 ? "s" : ""}` : "No path yet") +
      (full ? ", the most that generate takes: it is full." : ".");
    byId("command").textContent = `generate:\n  series: ${fileName()}\n\n` +
      `python -m flexlib.generate ${box.dataset.folder} along_path --series ${fileName()}`;
  }

  function fileName() {
    return plainName(box.dataset.name).replace(/^[.-]+/, "") + "_path.csv";
  }

  function save() {
    const head = z.map((_, axis) => `latent_${axis + 1}`);
    const lines = path.map((latents) => latents.map((value) => Number(value.toPrecision(7))));
    download(fileName(), [head, ...lines].map((line) => line.join(",")).join("\n") + "\n");
  }

  // latents at a time in seconds, to and fro
  function along() {
    const wave = (time, length) => length - Math.abs(length - (time % (2 * length)));
    if (byId("along").value !== "path") {
      const axis = Number(byId("along").value);
      const span = content.high[axis] - content.low[axis];
      const from = AXIS_S * (z[axis] - content.low[axis]) / span;
      return (time) => z.map((value, i) => (i === axis ? content.low[axis] + span * wave(time + from, AXIS_S) / AXIS_S : value));
    }
    const points = path.slice();
    const ends = points.reduce((sums, point, i) => [...sums, i ? sums[i - 1] + WAY_S * apart(points[i - 1], point) : 0], []);
    const last = points.length - 1;
    return (time) => {
      const at = wave(time, ends[last] || 1);
      const next = clamp(ends.findIndex((end) => end >= at), 1, last);
      const part = clamp((at - ends[next - 1]) / (ends[next] - ends[next - 1] || 1), 0, 1);
      return points[next].map((value, axis) => points[next - 1][axis] + part * (value - points[next - 1][axis]));
    };
  }

  function play() {
    playing = { from: null, latents: along() };
    pressed("play", true);
    byId("play").textContent = "Pause";
    redraw();
  }

  function step(now) {
    if (playing.from === null) playing.from = now;
    moveTo(playing.latents((now - playing.from) / 1000));
  }

  function halt() {
    playing = null;
    pressed("play", false);
    byId("play").textContent = "Play";
  }

  function pressed(name, on) {
    byId(name).setAttribute("aria-pressed", String(on));
  }

  byId("play").addEventListener("click", () => (playing ? halt() : play()));
  byId("along").addEventListener("change", halt);
  byId("reset").addEventListener("click", () => { halt(); view.reset(); moveTo(content.start); });
  byId("add").addEventListener("click", () => keep(-1));
  byId("save").addEventListener("click", save);
  byId("clear").addEventListener("click", () => {
    path = [];
    halt();
    if (byId("along").value === "path") byId("along").value = "0";
    showPath();
    redraw();
  });
  byId("record").addEventListener("click", () => {
    const on = byId("record").getAttribute("aria-pressed") !== "true";
    pressed("record", on);
    byId("record").textContent = on ? "Stop recording" : "Record a path";
    if (on) keep(0.05);
    redraw();
  });
  content.start.forEach((_, axis) => byId("latent-" + (axis + 1)).addEventListener("input", (event) => {
    halt();
    moveTo(z.map((value, i) => (i === axis ? Number(event.target.value) : value)));
  }));
  showPath();
  redraw();
  window.flexlib.explorer = { flow, view, moveTo, latents: () => z.slice(), near: () => near, drawn: () => !stale && !waiting };
})();
