"""Numba kernels of the operator for the CPU, float32: eight images at a time.

A voxel's weights are the same in every image, so one vector register holds one number of eight images: positions and
interpolation weights are computed for eight images at once however few voxels a cell has, and what is added to eight
images has no two equal addresses in a row. That inner part is written in LLVM's vector instructions
(``@intrinsic``: numba itself does not vectorise such code); on machines with narrower registers LLVM splits them.

A thread owns a block of eight images, and what blocks contribute to the map is summed in the order of the blocks:
results are bit-identical for any number of threads. A batch of b images keeps at most ``b / 8`` cores busy.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # images in a vector
_MARGIN = 4  # pixels by which a canvas is wider than the image: taps past its end wrap around when it is folded

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _wide(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


class _Emit:
    """LLVM instructions on vectors of one number for each of eight images."""

    def __init__(self, context, builder, signature, arguments):
        self.context, self.builder = context, builder
        self.types, self.arguments = signature.args, arguments

    def data(self, position: int) -> ir.Value:
        """Pointer to the first element of the array that is argument number ``position``."""
        make = self.context.make_array(self.types[position])
        return make(self.context, self.builder, self.arguments[position]).data

    def load(self, pointer, offset, kind):
        """A value of ``kind`` that starts ``offset`` elements behind ``pointer``, at any alignment."""
        value = self.builder.load(self._at(pointer, offset, kind))
        value.align = 4
        return value

    def store(self, value, pointer, offset):
        self.builder.store(value, self._at(pointer, offset, value.type)).align = 4

    def _at(self, pointer, offset, kind):
        return self.builder.bitcast(self.builder.gep(pointer, [offset]), kind.as_pointer())

    def spread(self, scalar, lanes: int = LANES):
        """The scalar in every lane."""
        kind = _wide(scalar.type, lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, _INT(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(_wide(_INT, lanes), [0] * lanes))

    def constant(self, number: float):
        return ir.Constant(_wide(_FLOAT), [number] * LANES)

    def floor(self, vector):
        return self._call("llvm.floor.v8f32", vector)

    def multiply_add(self, a, b, c):
        """A * b + c."""
        return self._call(f"llvm.fmuladd.v{a.type.count}f32", a, b, c)

    def _call(self, name, *arguments):
        kind = ir.FunctionType(arguments[0].type, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def shuffle(self, a, b, *lanes):
        return self.builder.shuffle_vector(a, b, ir.Constant(_wide(_INT, len(lanes)), list(lanes)))

    def polynomial(self, x, *coefficients):
        """Horner's scheme, highest power first."""
        value = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.multiply_add(value, x, self.constant(coefficient))
        return value

    def corners(self, cells, cell):
        """Offsets of a cell's four vertices in an array of 2 x 8 numbers a vertex."""
        width = _LONG(2 * LANES)
        first = self.builder.mul(cell, _LONG(4))
        rows = [self.load(cells, self.builder.add(first, _LONG(k)), _INT) for k in range(4)]
        return [self.builder.mul(self.builder.zext(row, _LONG), width) for row in rows]

    def weights(self, bary, voxel):
        """A voxel's four barycentric weights, each in every lane."""
        first = self.builder.mul(voxel, _LONG(4))
        return [self.spread(self.load(bary, self.builder.add(first, _LONG(k)), _FLOAT)) for k in range(4)]

    def stride(self) -> ir.Value:
        """Side of the eight canvases (8, stride, stride) that are the first argument."""
        make = self.context.make_array(self.types[0])
        return self.builder.extract_value(make(self.context, self.builder, self.arguments[0]).shape, 2)

    def locate(self, vertices, corners, weights, stride):
        """Fractions (x, y) of the voxel's position in eight images, and the offset of its pixel in their canvases."""
        builder = self.builder
        grid = builder.sub(stride, _LONG(_MARGIN))
        side = self.spread(builder.sitofp(grid, _FLOAT))
        zero, inverse = self.constant(0.0), builder.fdiv(self.constant(1.0), side)
        fractions, pixels = [], []
        for axis in range(2):
            position = None
            for corner, weight in zip(corners, weights, strict=True):
                at = self.load(vertices, builder.add(corner, _LONG(LANES * axis)), _wide(_FLOAT))
                position = builder.fmul(weight, at) if position is None else self.multiply_add(weight, at, position)
            turns = self.floor(builder.fmul(position, inverse))
            position = builder.fsub(position, builder.fmul(turns, side))
            # rounding may leave a position outside, far away by much; one that is no number becomes zero
            position = builder.select(builder.fcmp_ordered(">", position, zero), position, zero)
            position = builder.select(builder.fcmp_ordered("<", position, side), position, side)
            pixel = self.floor(position)
            fractions.append(builder.fsub(position, pixel))
            pixels.append(builder.fptosi(pixel, _wide(_INT)))
        rows = builder.mul(pixels[1], self.spread(builder.trunc(stride, _INT)))
        return *fractions, builder.add(rows, pixels[0])

    def rows(self, offsets, lane: int, stride, taps: int):
        """Offsets of the first pixel of each of the kernel's rows in the canvas of one of the eight images."""
        builder = self.builder
        size = builder.mul(stride, stride)
        pixel = builder.zext(builder.extract_element(offsets, _INT(lane)), _LONG)
        first = builder.add(pixel, builder.mul(size, _LONG(lane)))
        return [builder.add(first, builder.mul(stride, _LONG(r))) for r in range(taps)]

    def kernel(self, taps: int, x):
        """The B-spline's values at its taps, 2 or 4 vectors."""
        if taps == 2:
            return [self.builder.fsub(self.constant(1.0), x), x]
        return [
            self.polynomial(x, -1 / 6, 0.5, -0.5, 1 / 6),
            self.polynomial(x, 0.5, -1.0, 0.0, 2 / 3),
            self.polynomial(x, -0.5, 0.5, 0.5, 1 / 6),
            self.polynomial(x, 1 / 6, 0.0, 0.0, 0.0),
        ]

    def kernel_slope(self, taps: int, x):
        """Its derivatives there."""
        if taps == 2:
            return [self.constant(-1.0), self.constant(1.0)]
        return [
            self.polynomial(x, -0.5, 1.0, -0.5),
            self.polynomial(x, 1.5, -2.0, 0.0),
            self.polynomial(x, -1.5, 1.0, 0.5),
            self.polynomial(x, 0.5, 0.0, 0.0),
        ]

    def by_lane(self, vectors):
        """2 or 4 vectors of eight images to eight short vectors, one an image."""
        if len(vectors) == 2:
            return [self.shuffle(*vectors, lane, LANES + lane) for lane in range(LANES)]
        pairs = [self.by_lane(vectors[:2]), self.by_lane(vectors[2:])]
        return [self.shuffle(a, b, 0, 1, 2, 3) for a, b in zip(*pairs, strict=True)]

    def by_tap(self, short):
        """The inverse: eight vectors, one an image, of 2 or 4 numbers to 2 or 4 vectors of eight images."""
        while len(short) > 1:
            width = 2 * short[0].type.count
            short = [self.shuffle(a, b, *range(width)) for a, b in zip(short[::2], short[1::2], strict=True)]
        taps = short[0].type.count // LANES
        return [self.shuffle(short[0], short[0], *range(tap, taps * LANES, taps)) for tap in range(taps)]

    def weighted(self, weights, vectors):
        """Sum of products."""
        total = self.builder.fmul(weights[0], vectors[0])
        for weight, vector in zip(weights[1:], vectors[1:], strict=True):
            total = self.multiply_add(weight, vector, total)
        return total


def _splat_voxel(taps: int):
    """Intrinsic that adds voxel ``voxel`` of cell ``cell`` to eight canvases."""

    def typed(typingctx, canvas, vertices, cells, bary, cell, voxel, value):
        def codegen(context, builder, signature, arguments):
            emit = _Emit(context, builder, signature, arguments)
            canvas, vertices, cells, bary = (emit.data(k) for k in range(4))
            cell, voxel, value = arguments[4:]
            stride = emit.stride()
            x, y, offsets = emit.locate(vertices, emit.corners(cells, cell), emit.weights(bary, voxel), stride)
            value = emit.spread(value)
            along_y = [builder.fmul(value, w) for w in emit.kernel(taps, y)]
            along_x = emit.kernel(taps, x)
            if taps == 2:
                pieces = [emit.by_lane([builder.fmul(w, a) for a in along_x]) for w in along_y]
            else:
                short = emit.by_lane(along_x)
            for lane in range(LANES):
                for row, offset in enumerate(emit.rows(offsets, lane, stride, taps)):
                    kind = _wide(_FLOAT, taps)
                    old = emit.load(canvas, offset, kind)
                    if taps == 2:
                        new = builder.fadd(old, pieces[row][lane])
                    else:
                        across = emit.spread(builder.extract_element(along_y[row], _INT(lane)), taps)
                        new = emit.multiply_add(across, short[lane], old)
                    emit.store(new, canvas, offset)
            return context.get_dummy_value()

        arguments = (canvas, vertices, cells, bary, types.int64, types.int64, types.float32)
        return types.void(*arguments), codegen

    return intrinsic(typed)


def _read_voxel(taps: int, slopes: bool):
    """Intrinsic that reads eight canvases at the voxel into ``read``: values, slopes along x and y (8 each)."""

    def typed(typingctx, canvas, vertices, cells, bary, cell, voxel, read):
        def codegen(context, builder, signature, arguments):
            emit = _Emit(context, builder, signature, arguments)
            canvas, vertices, cells, bary = (emit.data(k) for k in range(4))
            read = emit.data(6)
            cell, voxel = arguments[4:6]
            stride = emit.stride()
            x, y, offsets = emit.locate(vertices, emit.corners(cells, cell), emit.weights(bary, voxel), stride)
            along_x, along_y = emit.kernel(taps, x), emit.kernel(taps, y)
            slope_x, slope_y = emit.kernel_slope(taps, x), emit.kernel_slope(taps, y)
            kind = _wide(_FLOAT, taps)
            if taps == 2:
                rows = [[], []]
                for lane in range(LANES):
                    for row, offset in enumerate(emit.rows(offsets, lane, stride, taps)):
                        rows[row].append(emit.load(canvas, offset, kind))
                (c00, c01), (c10, c11) = (emit.by_tap(row) for row in rows)
                step_0, step_1 = builder.fsub(c01, c00), builder.fsub(c11, c10)
                lower, upper = emit.multiply_add(x, step_0, c00), emit.multiply_add(x, step_1, c10)
                down = builder.fsub(upper, lower)
                values = emit.multiply_add(y, down, lower)
                along = emit.multiply_add(y, builder.fsub(step_1, step_0), step_0)
            else:
                summed, sloped = [], []
                for lane in range(LANES):
                    rows = [emit.load(canvas, o, kind) for o in emit.rows(offsets, lane, stride, taps)]

                    def in_lane(vectors, lane=lane):
                        return [emit.spread(builder.extract_element(v, _INT(lane)), taps) for v in vectors]

                    summed.append(emit.weighted(in_lane(along_y), rows))
                    if slopes:
                        sloped.append(emit.weighted(in_lane(slope_y), rows))
                columns = emit.by_tap(summed)
                values = emit.weighted(along_x, columns)
                if slopes:
                    along = emit.weighted(slope_x, columns)
                    down = emit.weighted(along_x, emit.by_tap(sloped))
            emit.store(values, read, _LONG(0))
            if slopes:
                emit.store(along, read, _LONG(LANES))
                emit.store(down, read, _LONG(2 * LANES))
            return context.get_dummy_value()

        arguments = (canvas, vertices, cells, bary, types.int64, types.int64, read)
        return types.void(*arguments), codegen

    return intrinsic(typed)


@intrinsic
def _add_forces(typingctx, forces, cells, bary, cell, voxel, value, read):
    """Share ``value`` times the slopes in ``read`` among the four vertices of the voxel's cell."""

    def codegen(context, builder, signature, arguments):
        emit = _Emit(context, builder, signature, arguments)
        forces, cells, bary, read = (emit.data(k) for k in (0, 1, 2, 6))
        cell, voxel, value = arguments[3:6]
        value = emit.spread(value)
        slopes = [builder.fmul(value, emit.load(read, _LONG(LANES * k), _wide(_FLOAT))) for k in (1, 2)]
        for corner, weight in zip(emit.corners(cells, cell), emit.weights(bary, voxel), strict=True):
            for axis, slope in enumerate(slopes):
                offset = builder.add(corner, _LONG(LANES * axis))
                old = emit.load(forces, offset, _wide(_FLOAT))
                emit.store(emit.multiply_add(weight, slope, old), forces, offset)
        return context.get_dummy_value()

    return types.void(forces, cells, bary, types.int64, types.int64, types.float32, read), codegen


@intrinsic
def _sum_lanes(typingctx, read):
    """Sum of the first eight numbers."""

    def codegen(context, builder, signature, arguments):
        emit = _Emit(context, builder, signature, arguments)
        total, width = emit.load(emit.data(0), _LONG(0), _wide(_FLOAT)), LANES
        while width > 1:
            width //= 2
            total = builder.fadd(
                emit.shuffle(total, total, *range(width)), emit.shuffle(total, total, *range(width, 2 * width))
            )
        return builder.extract_element(total, _INT(0))

    return types.float32(read), codegen


_splat_linear, _splat_cubic = _splat_voxel(2), _splat_voxel(4)
_read_linear, _read_cubic, _read_cubic_value = _read_voxel(2, True), _read_voxel(4, True), _read_voxel(4, False)


@njit(cache=True)
def _interleave(vertices, first, last):
    """(nv, 2, 8) positions of a block's images, the last one's again where there are fewer; whether all are finite."""
    block = np.empty((vertices.shape[1], 2, LANES), np.float32)
    change = np.float32(0)  # of any number that is subtracted from itself
    for lane in range(LANES):
        image = min(first + lane, last - 1)
        for vertex in range(vertices.shape[1]):
            x, y = vertices[image, vertex, 0], vertices[image, vertex, 1]
            block[vertex, 0, lane] = x
            block[vertex, 1, lane] = y
            change += (x - x) + (y - y)
    return block, change == 0


@njit(cache=True, parallel=True)
def splat_blocks(voxels, vertices, taps, images, finite):
    """Write ``images`` (b, G, G), and whether each block's vertices are ``finite``; ``voxels`` from values to bary."""
    values, cells, cell, bary = voxels
    batch, grid = images.shape[:2]
    stride = grid + _MARGIN
    shift = 0 if taps == 2 else 1  # the cubic kernel's first tap sits one pixel before floor(p)
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        block_vertices, finite[block] = _interleave(vertices, first, last)
        canvas = np.zeros((LANES, stride, stride), np.float32)
        if taps == 2:
            for j in range(len(values)):
                _splat_linear(canvas, block_vertices, cells, bary, cell[j], j, values[j])
        else:
            for j in range(len(values)):
                _splat_cubic(canvas, block_vertices, cells, bary, cell[j], j, values[j])
        for i in range(first, last):
            image = images[i]
            image[:, :] = 0
            for y in range(stride):
                row, source = image[(y - shift) % grid], canvas[i - first, y]
                for x in range(grid):
                    row[x] += source[x + shift]
                for x in range(shift):
                    row[grid - shift + x] += source[x]
                for x in range(grid + shift, stride):
                    row[x - shift - grid] += source[x]


@njit(cache=True)
def _pad(image, shift, canvas):
    """Periodic copy of a (G, G) image, the first tap's pixel at index 0."""
    grid, stride = image.shape[0], canvas.shape[0]
    for y in range(stride):
        row, source = canvas[y], image[(y - shift) % grid]
        for x in range(grid):
            row[x + shift] = source[x]
        for x in range(shift):
            row[x] = source[grid - shift + x]
        for x in range(grid + shift, stride):
            row[x] = source[x - shift - grid]


@njit(cache=True, parallel=True)
def adjoint_blocks(images, voxels, vertices, taps, needs, sums, grad_vertices, finite):
    """``needs`` (values, vertices): the gradients to write; ``sums`` (blocks, nvox) each block's part by the values."""
    values, cells, cell, bary = voxels
    need_values, need_vertices = needs
    batch, grid = images.shape[:2]
    stride = grid + _MARGIN
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        block_vertices, finite[block] = _interleave(vertices, first, last)
        forces = np.zeros(block_vertices.shape if need_vertices else (0, 2, LANES), np.float32)
        canvas = np.zeros((LANES, stride, stride), np.float32)  # a lane without an image adds nothing
        for i in range(first, last):
            _pad(images[i], 0 if taps == 2 else 1, canvas[i - first])
        read = np.empty(3 * LANES, np.float32)
        for j in range(len(values)):
            c = cell[j]
            if taps == 2:
                _read_linear(canvas, block_vertices, cells, bary, c, j, read)
            elif need_vertices:
                _read_cubic(canvas, block_vertices, cells, bary, c, j, read)
            else:
                _read_cubic_value(canvas, block_vertices, cells, bary, c, j, read)
            if need_values:
                sums[block, j] = _sum_lanes(read)
            if need_vertices:
                _add_forces(forces, cells, bary, c, j, values[j], read)
        if need_vertices:
            for i in range(first, last):
                for vertex in range(len(forces)):
                    grad_vertices[i, vertex, 0] = forces[vertex, 0, i - first]
                    grad_vertices[i, vertex, 1] = forces[vertex, 1, i - first]
