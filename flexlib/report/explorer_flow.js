// The flow itself: latents -> the surface of the density that generate makes there. explorer.py packs it.
// The nodes of a grid ride on the mesh's cells with their density, which thins out where cells grow; the surface is drawn
// between them where it crosses the contour level, by surface nets: a vertex in each cube that it crosses.
(function () {
  "use strict";
  const { bytesOf, valuesOf, rowsOf } = window.flexlib;

  function floats(data) {
    return new Float32Array(bytesOf(data).buffer);
  }

  function integers(packed) {
    const bytes = bytesOf(packed.data);
    return packed.bits === 16 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
  }

  // columns of x, y and z -> x, y, z of each point
  function points(axes) {
    const columns = axes.map((axis) => valuesOf(axis));
    const out = new Float32Array(3 * columns[0].length);
    for (let i = 0; i < out.length; i++) out[i] = columns[i % 3][(i / 3) | 0];
    return out;
  }

  // matrix (rows x columns, row by row) times vector, plus bias where there is one
  function product(matrix, vector, bias) {
    const columns = vector.length;
    const out = new Float64Array(matrix.length / columns);
    for (let row = 0; row < out.length; row++) {
      let sum = bias ? bias[row] : 0;
      for (let column = 0; column < columns; column++) sum += matrix[row * columns + column] * vector[column];
      out[row] = sum;
    }
    return out;
  }

  // The perceptron of flow.py with its linear path: latents -> coefficients of the fields, then the core's moments
  function network(content) {
    const [input, ...layers] = [content.input, ...content.layers].map((layer) => (
      { weight: floats(layer.weight), bias: floats(layer.bias) }));
    const output = floats(content.output);
    return function (z) {
      const raw = product(input.weight, z, input.bias);
      let units = raw;
      layers.forEach((layer) => {
        units = product(layer.weight, units, layer.bias).map((x) => x / (1 + Math.exp(-x))); // SiLU
      });
      return product(output, [...units, ...raw, 1]);
    };
  }

  // The proper rotation, row by row, that best turns what is at rest into what has moved (Kabsch, by Horn's quaternion).
  // sums: 3 x 3, of mass times moved position (rows) times position at rest (columns)
  function bestRotation(sums) {
    const [xx, xy, xz, yx, yy, yz, zx, zy, zz] = sums;
    const [w, x, y, z] = largestEigenvector([
      [xx + yy + zz, zy - yz, xz - zx, yx - xy],
      [zy - yz, xx - yy - zz, xy + yx, xz + zx],
      [xz - zx, xy + yx, yy - xx - zz, yz + zy],
      [yx - xy, xz + zx, yz + zy, zz - xx - yy],
    ]);
    return [
      1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
      2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
      2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ];
  }

  // of a symmetric matrix, by Jacobi's rotations
  function largestEigenvector(matrix) {
    const a = matrix.map((row) => row.slice());
    const size = a.length;
    const vectors = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
    for (let sweep = 0; sweep < 12; sweep++) {
      for (let p = 0; p < size; p++) {
        for (let q = p + 1; q < size; q++) {
          if (a[p][q] === 0) continue;
          const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
          const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
          const [cos, sin] = [1 / Math.sqrt(t * t + 1), t / Math.sqrt(t * t + 1)];
          const turn = (row, column, i, j) => {
            const [first, second] = [row[i], column[j]];
            row[i] = cos * first - sin * second;
            column[j] = sin * first + cos * second;
          };
          a.forEach((row) => turn(row, row, p, q));
          for (let k = 0; k < size; k++) turn(a[p], a[q], k, k);
          vectors.forEach((row) => turn(row, row, p, q));
        }
      }
    }
    let best = 0;
    for (let i = 1; i < size; i++) if (a[i][i] > a[best][best]) best = i;
    return vectors.map((row) => row[best]);
  }

  // The cubes of a grid whose corners are all among the nodes, and the grid's edges about which there are four of them
  function gridOf(index, box) {
    const nodeAt = new Int32Array(box ** 3).fill(-1);
    index.forEach((place, node) => { nodeAt[place] = node; });
    const steps = [1, box, box * box]; // along x, y, z
    const [corners, cubeAt, edges] = [[], new Int32Array(index.length).fill(-1), []];
    const cubes = CORNERS.map((corner) => corner.reduce((sum, one, axis) => sum + one * steps[axis], 0));
    index.forEach((place, node) => {
      const own = cubes.map((step) => nodeAt[place + step]);
      const last = [place % box, Math.floor(place / box) % box].includes(box - 1); // what follows is another row
      if (last || own.some((corner) => !(corner >= 0))) return;
      cubeAt[node] = corners.length / 8;
      corners.push(...own);
    });
    index.forEach((place, node) => steps.forEach((step, axis) => {
      const [next, b, c] = [nodeAt[place + step], steps[(axis + 1) % 3], steps[(axis + 2) % 3]];
      const around = [place, place - b, place - b - c, place - c].map((corner) => (nodeAt[corner] >= 0 ? cubeAt[nodeAt[corner]] : -1));
      if (next >= 0 && around.every((cube) => cube >= 0)) edges.push(node, next, ...around);
    }));
    return { corners: Int32Array.from(corners), edges: Int32Array.from(edges) };
  }

  const CORNERS = [0, 1, 2, 3, 4, 5, 6, 7].map((k) => [k & 1, (k >> 1) & 1, k >> 2]);
  const CUBE_EDGES = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((k) => [1, 2, 4].filter((bit) => !(k & bit)).flatMap((bit) => [k, k + bit]));

  const DUST = 0.015; // of the vertices: a smaller piece of the surface is not shown

  class Flow {
    constructor(content) {
      this.coefficients = network(content);
      this.core = content.core;
      this.rest = points(content.mesh); // of the mesh's vertices
      this.moved = new Float32Array(this.rest.length);
      this.fields = content.fields.map((field) => valuesOf(field));
      this.cells = integers(content.cells);
      this.restVolumes = this.volumes(this.rest);
      this.cell = integers(content.cell); // that each node rides on
      this.weights = points(content.weights); // of its corners but the first
      this.density = valuesOf(content.density); // in units of the contour level
      Object.assign(this, gridOf(rowsOf(content.index), content.box));
      const [nodes, cubes] = [this.cell.length, this.corners.length / 8];
      this.excess = new Float32Array(nodes); // of the density over the contour level
      this.solid = new Uint8Array(nodes); // where there is any
      this.places = new Float32Array(4 * nodes); // x, y, z, and how far that is from the place at rest
      this.home = new Float32Array(4 * nodes); // the places at rest
      this.moved.set(this.rest);
      this.ride();
      this.home.set(this.places);
      this.vertexOf = new Int32Array(cubes);
      this.vertices = new Float32Array(3 * cubes);
      this.turns = new Float32Array(3 * cubes);
      this.far = new Float32Array(cubes);
      this.pieceOf = new Int32Array(cubes); // of the surface, by one of its vertices
      this.triangles = new Uint32Array(this.edges.length); // six to an edge: two triangles
    }

    // Find positions (Angstrom from the box centre), normals, displacement (Angstrom) and faces of the surface at latents z
    move(z) {
      this.moveMesh(z);
      this.ride();
      this.findSurface();
      this.findNormals();
    }

    moveMesh(z) {
      const { rest, moved, fields, core } = this;
      const values = this.coefficients(z);
      moved.set(rest);
      fields.forEach((field, index) => {
        const value = values[index];
        for (let i = 0; i < moved.length; i++) moved[i] += value * field[i];
      });
      if (!core) return;
      // as RigidCore.aligned of frame.py: the core's rotation and shift are taken back
      const moments = values.slice(fields.length);
      const sums = core.at_rest.map((sum, index) => sum + moments[3 + index]);
      const still = 1e-9 * (core.at_rest[0] + core.at_rest[4] + core.at_rest[8]);
      [0, 4, 8].forEach((diagonal) => { sums[diagonal] += still; });
      const turn = bestRotation(sums);
      const [cx, cy, cz] = core.centre;
      for (let i = 0; i < moved.length; i += 3) {
        const x = moved[i] - cx - moments[0];
        const y = moved[i + 1] - cy - moments[1];
        const z_ = moved[i + 2] - cz - moments[2];
        moved[i] = x * turn[0] + y * turn[3] + z_ * turn[6] + cx;
        moved[i + 1] = x * turn[1] + y * turn[4] + z_ * turn[7] + cy;
        moved[i + 2] = x * turn[2] + y * turn[5] + z_ * turn[8] + cz;
      }
    }

    // Every node goes with its cell. Mass is kept: where cells grow the density falls
    ride() {
      const { moved, cells, cell, weights, density, excess, solid, places, home } = this;
      const growth = this.growth();
      for (let i = 0; i < cell.length; i++) {
        const a = weights[3 * i], b = weights[3 * i + 1], c = weights[3 * i + 2], o = 1 - a - b - c;
        const corner = 4 * cell[i];
        const p = cells[corner], q = cells[corner + 1], r = cells[corner + 2], s = cells[corner + 3];
        for (let axis = 0; axis < 3; axis++) {
          places[4 * i + axis] = o * moved[3 * p + axis] + a * moved[3 * q + axis] + b * moved[3 * r + axis] + c * moved[3 * s + axis];
        }
        const x = places[4 * i] - home[4 * i], y = places[4 * i + 1] - home[4 * i + 1], z = places[4 * i + 2] - home[4 * i + 2];
        places[4 * i + 3] = Math.sqrt(x * x + y * y + z * z);
        const times = o * growth[p] + a * growth[q] + b * growth[r] + c * growth[s];
        excess[i] = density[i] - Math.max(times, 0.05);
        solid[i] = excess[i] > 0 ? 1 : 0;
      }
    }

    findSurface() {
      const { corners, edges, excess, solid, places, vertexOf, vertices, far, triangles } = this;
      let count = 0;
      for (let cube = 0; cube < vertexOf.length; cube++) {
        let inside = 0;
        for (let k = 0; k < 8; k++) inside += solid[corners[8 * cube + k]];
        if (inside === 0 || inside === 8) continue;
        let x = 0, y = 0, z = 0, away = 0, crossings = 0;
        for (let k = 0; k < 24; k += 2) {
          const p = corners[8 * cube + CUBE_EDGES[k]], q = corners[8 * cube + CUBE_EDGES[k + 1]];
          if (solid[p] === solid[q]) continue;
          const t = excess[p] / (excess[p] - excess[q]), u = 1 - t;
          x += u * places[4 * p] + t * places[4 * q];
          y += u * places[4 * p + 1] + t * places[4 * q + 1];
          z += u * places[4 * p + 2] + t * places[4 * q + 2];
          away += u * places[4 * p + 3] + t * places[4 * q + 3];
          crossings++;
        }
        vertices[3 * count] = x / crossings; vertices[3 * count + 1] = y / crossings; vertices[3 * count + 2] = z / crossings;
        far[count] = away / crossings;
        vertexOf[cube] = count++;
      }
      let used = 0;
      for (let i = 0; i < edges.length; i += 6) {
        const out = solid[edges[i]];
        if (out === solid[edges[i + 1]]) continue;
        const a = vertexOf[edges[i + 2]], c = vertexOf[edges[i + 4]]; // seen from outside against the clock
        const b = vertexOf[edges[i + (out ? 3 : 5)]], d = vertexOf[edges[i + (out ? 5 : 3)]];
        triangles[used] = a; triangles[used + 1] = b; triangles[used + 2] = c;
        triangles[used + 3] = a; triangles[used + 4] = c; triangles[used + 5] = d;
        used += 6;
      }
      [count, used] = this.withoutDust(count, used);
      this.positions = vertices.subarray(0, 3 * count);
      this.normals = this.turns.subarray(0, 3 * count);
      this.displacement = far.subarray(0, count);
      this.faces = triangles.subarray(0, used);
    }

    // Leave out pieces of the surface that are much smaller than the whole; how many vertices and corners are left
    withoutDust(count, used) {
      const { vertices, far, triangles, pieceOf } = this;
      const sizes = new Int32Array(count), place = new Int32Array(count);
      for (let i = 0; i < count; i++) pieceOf[i] = i;
      const first = (i) => {
        while (pieceOf[i] !== i) i = pieceOf[i] = pieceOf[pieceOf[i]];
        return i;
      };
      for (let i = 0; i < used; i += 3) {
        const piece = first(triangles[i]);
        pieceOf[first(triangles[i + 1])] = piece;
        pieceOf[first(triangles[i + 2])] = piece;
      }
      for (let i = 0; i < count; i++) sizes[first(i)]++;
      let [left, corners] = [0, 0];
      for (let i = 0; i < count; i++) {
        place[i] = sizes[first(i)] < DUST * count ? -1 : left++;
        if (place[i] < 0) continue;
        vertices.copyWithin(3 * place[i], 3 * i, 3 * i + 3);
        far[place[i]] = far[i];
      }
      for (let i = 0; i < used; i += 3) {
        if (place[triangles[i]] < 0) continue;
        for (let k = 0; k < 3; k++) triangles[corners++] = place[triangles[i + k]];
      }
      return [left, corners];
    }

    findNormals() {
      const { faces, positions, normals } = this;
      normals.fill(0);
      for (let i = 0; i < faces.length; i += 3) {
        const [a, b, c] = [3 * faces[i], 3 * faces[i + 1], 3 * faces[i + 2]];
        const ux = positions[b] - positions[a], uy = positions[b + 1] - positions[a + 1];
        const uz = positions[b + 2] - positions[a + 2], vx = positions[c] - positions[a];
        const vy = positions[c + 1] - positions[a + 1], vz = positions[c + 2] - positions[a + 2];
        const x = uy * vz - uz * vy, y = uz * vx - ux * vz, z = ux * vy - uy * vx;
        normals[a] += x; normals[a + 1] += y; normals[a + 2] += z;
        normals[b] += x; normals[b + 1] += y; normals[b + 2] += z;
        normals[c] += x; normals[c + 1] += y; normals[c + 2] += z;
      }
      for (let i = 0; i < normals.length; i += 3) {
        const scale = 1 / (Math.hypot(normals[i], normals[i + 1], normals[i + 2]) || 1);
        normals[i] *= scale; normals[i + 1] *= scale; normals[i + 2] *= scale;
      }
    }

    // by what factor the cells about each vertex of the mesh have grown; of vertices, so that the surface has no steps
    growth() {
      const { moved, restVolumes, cells } = this;
      const now = this.volumes(moved);
      const sum = new Float32Array(moved.length / 3), total = new Float32Array(moved.length / 3);
      for (let i = 0; i < cells.length; i++) {
        sum[cells[i]] += now[i >> 2];
        total[cells[i]] += restVolumes[i >> 2];
      }
      return sum.map((value, i) => value / total[i]);
    }

    // six times the volume of each cell
    volumes(vertices) {
      const { cells } = this;
      const out = new Float32Array(cells.length / 4);
      for (let i = 0; i < out.length; i++) {
        const [o, a, b, c] = [0, 1, 2, 3].map((k) => 3 * cells[4 * i + k]);
        const edge = (corner, axis) => vertices[corner + axis] - vertices[o + axis];
        out[i] = edge(a, 0) * (edge(b, 1) * edge(c, 2) - edge(b, 2) * edge(c, 1)) -
          edge(a, 1) * (edge(b, 0) * edge(c, 2) - edge(b, 2) * edge(c, 0)) +
          edge(a, 2) * (edge(b, 0) * edge(c, 1) - edge(b, 1) * edge(c, 0));
      }
      return out;
    }
  }

  Object.assign(window.flexlib, { Flow, bestRotation });
})();
