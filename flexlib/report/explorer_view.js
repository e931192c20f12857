// The surface on the screen: plain WebGL 2, lit as the pictures of surface.py; drag to turn, wheel or plus and minus to zoom.
(function () {
  "use strict";

  const VERTEX = `#version 300 es
    in vec3 position; in vec3 normal; in float displacement;
    uniform mat3 turn; uniform vec3 middle; uniform float radius, limit, distance_, focus, aspect;
    out vec3 facing; out float paint, depth;
    void main() {
      vec3 seen = turn * (position - middle) / radius;
      facing = turn * normal;
      paint = displacement / limit;
      depth = seen.z;
      float away = distance_ - seen.z;
      float near = max(distance_ - 2.5, 0.02), far = distance_ + 2.5;
      gl_Position = vec4(focus * seen.x / aspect, focus * seen.y,
        (away * (far + near) - 2.0 * far * near) / (far - near), away);
    }`;
  const FRAGMENT = `#version 300 es
    precision highp float;
    in vec3 facing; in float paint, depth;
    uniform vec3 colours[4];
    out vec4 shown;
    void main() { // lit as the pictures of surface.py
      vec3 n = normalize(facing) * (gl_FrontFacing ? 1.0 : -1.0);
      float at = clamp(paint, 0.0, 1.0) * 3.0;
      vec3 base = at < 1.0 ? mix(colours[0], colours[1], at)
        : at < 2.0 ? mix(colours[1], colours[2], at - 1.0) : mix(colours[2], colours[3], at - 2.0);
      vec3 light = normalize(vec3(-0.45, 0.6, 0.66));
      float front = clamp(n.z, 0.0, 1.0);
      float shine = pow(clamp(dot(n, normalize(light + vec3(0, 0, 1))), 0.0, 1.0), 40.0);
      vec3 colour = base * (0.42 + 0.25 * front + 0.55 * clamp(dot(n, light), 0.0, 1.0)) + 0.12 * shine;
      colour *= 0.74 + 0.26 * front;
      shown = vec4(mix(colour, vec3(1), clamp(0.22 - 0.22 * depth, 0.0, 0.35)), 1);
    }`;

  // soft: drawn by the CPU, so quickly while it moves and finely when it rests
  // changed(lost) is called where the view has to be drawn again, and uploaded too where it was lost
  function surfaceView(canvas, gl, soft, flow, content, changed) {
    const DISTANCE = 4.2; // of the eye, in radii of the surface
    const REST_MS = 200;
    let turn, zoom, uniforms, buffers, resting;
    const { middle, radius, across, up } = extent();
    new ResizeObserver(() => changed(false)).observe(canvas);
    reset();
    prepare();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { prepare(); changed(true); });

    // what the surface takes up in the first view, at the start and at the ends of each axis, Angstrom
    function extent() {
      const states = [content.start];
      content.start.forEach((_, axis) => [content.low, content.high].forEach((end) => {
        states.push(content.start.map((value, i) => (i === axis ? end[i] : value)));
      }));
      const [low, high] = [[Infinity, Infinity, Infinity], [-Infinity, -Infinity, -Infinity]];
      const r = content.rotation;
      states.forEach((latents) => {
        flow.move(latents);
        for (let i = 0; i < flow.positions.length; i += 3) {
          const [x, y, z] = [flow.positions[i], flow.positions[i + 1], flow.positions[i + 2]];
          for (let axis = 0; axis < 3; axis++) {
            const seen = r[3 * axis] * x + r[3 * axis + 1] * y + r[3 * axis + 2] * z;
            if (seen < low[axis]) low[axis] = seen;
            if (seen > high[axis]) high[axis] = seen;
          }
        }
      });
      const half = low.map((value, axis) => (high[axis] - value) / 2);
      const centre = low.map((value, axis) => (value + high[axis]) / 2);
      return {
        middle: [0, 1, 2].map((axis) => r[axis] * centre[0] + r[3 + axis] * centre[1] + r[6 + axis] * centre[2]),
        radius: Math.hypot(...half), across: half[0], up: half[1],
      };
    }

    function reset() {
      turn = content.rotation.slice();
      zoom = 1;
    }

    function shader(type, text) {
      const made = gl.createShader(type);
      gl.shaderSource(made, text);
      gl.compileShader(made);
      return made;
    }

    function prepare() {
      const program = gl.createProgram();
      gl.attachShader(program, shader(gl.VERTEX_SHADER, VERTEX));
      gl.attachShader(program, shader(gl.FRAGMENT_SHADER, FRAGMENT));
      gl.linkProgram(program);
      gl.useProgram(program);
      uniforms = (name) => gl.getUniformLocation(program, name);
      buffers = [["position", 3], ["normal", 3], ["displacement", 1]].map(([name, size]) => {
        const buffer = gl.createBuffer();
        gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
        const place = gl.getAttribLocation(program, name);
        gl.enableVertexAttribArray(place);
        gl.vertexAttribPointer(place, size, gl.FLOAT, false, 0, 0);
        return buffer;
      });
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
      gl.uniform3fv(uniforms("colours"), content.paint.flat());
      gl.uniform3fv(uniforms("middle"), middle);
      gl.uniform1f(uniforms("radius"), radius);
      gl.uniform1f(uniforms("limit"), Math.max(content.paint_limit_A, 1e-3));
      gl.enable(gl.DEPTH_TEST);
      gl.clearColor(1, 1, 1, 1);
    }

    function upload() {
      [flow.positions, flow.normals, flow.displacement].forEach((values, index) => {
        gl.bindBuffer(gl.ARRAY_BUFFER, buffers[index]);
        gl.bufferData(gl.ARRAY_BUFFER, values, gl.DYNAMIC_DRAW);
      });
      gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, flow.faces, gl.DYNAMIC_DRAW);
    }

    function draw() {
      clearTimeout(resting);
      if (soft) resting = setTimeout(() => drawAt(2), REST_MS);
      drawAt(1);
    }

    function drawAt(finer) {
      fit(canvas, finer);
      const aspect = canvas.width / canvas.height;
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      gl.uniformMatrix3fv(uniforms("turn"), true, turn);
      gl.uniform1f(uniforms("distance_"), DISTANCE);
      gl.uniform1f(uniforms("focus"), 0.86 * DISTANCE * zoom * radius / Math.max(up, across / aspect));
      gl.uniform1f(uniforms("aspect"), aspect);
      gl.drawElements(gl.TRIANGLES, flow.faces.length, gl.UNSIGNED_INT, 0);
    }

    // about the screen's axes, by radians
    function rotate(right, down) {
      const [a, b, c, d] = [Math.cos(right), Math.sin(right), Math.cos(down), Math.sin(down)];
      const by = [a, 0, b, b * d, c, -a * d, -b * c, d, a * c];
      const old = turn;
      turn = by.map((_, i) => [0, 1, 2].reduce((sum, k) => sum + by[3 * ((i / 3) | 0) + k] * old[3 * k + (i % 3)], 0));
      changed(false);
    }

    function magnify(factor) {
      zoom = clamp(zoom * factor, 0.4, 8);
      changed(false);
    }

    dragged(canvas, (event) => rotate(0.008 * event.movementX, 0.008 * event.movementY));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      magnify(Math.exp(-0.001 * clamp(event.deltaY, -300, 300)));
    }, { passive: false });
    onKeys(canvas, { ArrowLeft: () => rotate(-0.1, 0), ArrowRight: () => rotate(0.1, 0), ArrowUp: () => rotate(0, -0.1),
      ArrowDown: () => rotate(0, 0.1), "+": () => magnify(1.15), "=": () => magnify(1.15), "-": () => magnify(1 / 1.15) });
    return { upload, draw, reset };
  }

  // as many pixels as the screen has there, or more
  function fit(drawn, finer = 1) {
    const scale = finer * Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(drawn.clientWidth * scale), Math.round(drawn.clientHeight * scale)];
    if (drawn.width === width && drawn.height === height) return false;
    [drawn.width, drawn.height] = [width, height];
    return true;
  }

  function dragged(element, move, press) {
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      if (press) press(event);
    });
    element.addEventListener("pointermove", (event) => { if (element.hasPointerCapture(event.pointerId)) move(event); });
  }

  function onKeys(element, actions) {
    element.addEventListener("keydown", (event) => {
      if (!actions[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      actions[event.key](event);
    });
  }

  function clamp(value, low, high) {
    return Math.min(Math.max(value, low), high);
  }

  Object.assign(window.flexlib, { surfaceView, fit, dragged, onKeys, clamp });
})();
