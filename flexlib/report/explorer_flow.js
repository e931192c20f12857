// The flow itself: latents -> the surface of the canonical map, moved as generate moves its density. explorer.py packs it.
(function () {
  "use strict";
  const { bytesOf, valuesOf } = window.flexlib;

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

  class Flow {
    constructor(content) {
      this.coefficients = network(content);
      this.core = content.core;
      this.rest = points(content.mesh); // of the mesh's vertices
      this.fields = content.fields.map((field) => valuesOf(field));
      this.cells = integers(content.cells);
      this.faces = integers(content.faces);
      this.cell = integers(content.cell); // that each vertex of the surface rides on
      this.weights = points(content.weights); // of its corners but the first
      this.inward = points(content.inward); // how they change an Angstrom below the surface
      // Angstrom below each where the density is 2^-1.5, 2^-1, ... 2^1.5 times the surface's, which is at 0
      const depth = content.depth.map((column) => valuesOf(column));
      depth.splice(3, 0, new Float32Array(this.cell.length));
      this.depth = depth;
      this.peak = valuesOf(content.peak); // the highest density below, in the same steps
      this.moved = new Float32Array(this.rest.length);
      this.restVolumes = this.volumes(this.rest);
      this.positions = new Float32Array(3 * this.cell.length);
      this.normals = new Float32Array(3 * this.cell.length);
      this.displacement = new Float32Array(this.cell.length);
      this.there = new Float32Array(this.cell.length); // 0 where the density has fallen below the surface's
    }

    // Fill positions (Angstrom from the box centre), normals, displacement (Angstrom) and there of the surface at z
    move(z) {
      this.moveMesh(z);
      this.ride();
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

    // Every vertex of the surface goes with its cell. generate keeps mass: where cells shrink the density rises, and its
    // surface is where it was lower at rest, so farther out; where they grow it is deeper, or nowhere
    ride() {
      const { rest, moved, cells, cell, weights, inward, positions, displacement, there, peak, depth } = this;
      const growth = this.growth();
      const most = depth.length - 1;
      const w = new Float64Array(4);
      for (let i = 0; i < cell.length; i++) {
        const corner = 4 * cell[i];
        w[1] = weights[3 * i]; w[2] = weights[3 * i + 1]; w[3] = weights[3 * i + 2];
        w[0] = 1 - w[1] - w[2] - w[3];
        let steps = 0;
        for (let k = 0; k < 4; k++) steps += w[k] * growth[cells[corner + k]];
        there[i] = steps <= peak[i] ? 1 : 0;
        const at = Math.min(Math.max(steps + 3, 0), most);
        const low = Math.min(Math.floor(at), most - 1);
        const down = depth[low][i] + (at - low) * (depth[low + 1][i] - depth[low][i]);
        for (let k = 0; k < 3; k++) {
          w[k + 1] += down * inward[3 * i + k];
          w[0] -= down * inward[3 * i + k];
        }
        let square = 0;
        for (let axis = 0; axis < 3; axis++) {
          let now = 0, before = 0;
          for (let k = 0; k < 4; k++) {
            const at = 3 * cells[corner + k] + axis;
            now += w[k] * moved[at];
            before += w[k] * rest[at];
          }
          positions[3 * i + axis] = now;
          square += (now - before) * (now - before);
        }
        displacement[i] = Math.sqrt(square);
      }
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

    // by how many steps of sqrt(2) the cells about each vertex of the mesh have grown; of vertices, so that the surface
    // has no steps
    growth() {
      const { moved, restVolumes, cells } = this;
      const now = this.volumes(moved);
      const sum = new Float32Array(moved.length / 3), total = new Float32Array(moved.length / 3);
      for (let i = 0; i < cells.length; i++) {
        sum[cells[i]] += now[i >> 2];
        total[cells[i]] += restVolumes[i >> 2];
      }
      return sum.map((value, i) => 2 * Math.log2(Math.max(value / total[i], 0.01)));
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
