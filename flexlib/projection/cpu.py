"""Numba backend of the operator for the CPU, float32: eight images at a time.

A voxel's weights are the same in every image, so one vector register holds one number of eight images: positions and
interpolation weights are computed for eight images at once however few voxels a cell has, and what is added to eight
images at eight places has no two equal addresses in a row. That inner part is written in LLVM's vector instructions
(``@intrinsic``: numba itself does not vectorise such code); on machines with narrower registers LLVM splits them.

A thread owns a block of eight images, and what blocks contribute to the map is summed in the order of the blocks:
results are bit-identical for any number of threads. A batch of b images keeps at most ``b / 8`` cores busy.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from flexlib.runtime import share_threads_with_numba

_LANES = 8  # images in a vector
_MARGIN = 4  # pixels by which a canvas is wider than the image: taps past its end wrap around when it is folded
_PARTIAL_SUMS = 2**25  # numbers in the blocks' gradients by the map that are kept at once

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _wide(kind: ir.Type, lanes: int = _LANES) -> ir.VectorType:
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

    def spread(self, scalar, lanes: int = _LANES):
        """The scalar in every lane."""
        kind = _wide(scalar.type, lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, _INT(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(_wide(_INT, lanes), [0] * lanes))

    def constant(self, number: float):
        return ir.Constant(_wide(_FLOAT), [number] * _LANES)

    def floor(self, vector):
        return self._call("llvm.floor.v8f32", vector)

    def multiply_add(self, a, b, c):
        """a * b + c."""
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
        width = _LONG(2 * _LANES)
        first = self.builder.mul(cell, _LONG(4))
        rows = [self.load(cells, self.builder.add(first, _LONG(k)), _INT) for k in range(4)]
        return [self.builder.mul(self.builder.zext(row, _LONG), width) for row in rows]

    def weights(self, bary, voxel):
        """A voxel's four barycentric weights, each in every lane."""
        first = self.builder.mul(voxel, _LONG(4))
        return [self.spread(self.load(bary, self.builder.add(first, _LONG(k)), _FLOAT)) for k in range(4)]

    def locate(self, vertices, corners, weights, grid, stride):
        """Fractions (x, y) of the voxel's position in eight images, and the offset of its pixel in their canvases."""
        builder = self.builder
        side = self.spread(builder.sitofp(grid, _FLOAT))
        zero, inverse = self.constant(0.0), builder.fdiv(self.constant(1.0), side)
        fractions, pixels = [], []
        for axis in range(2):
            position = None
            for corner, weight in zip(corners, weights, strict=True):
                at = self.load(vertices, builder.add(corner, _LONG(_LANES * axis)), _wide(_FLOAT))
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
            return [self.shuffle(*vectors, lane, _LANES + lane) for lane in range(_LANES)]
        pairs = [self.by_lane(vectors[:2]), self.by_lane(vectors[2:])]
        return [self.shuffle(a, b, 0, 1, 2, 3) for a, b in zip(*pairs, strict=True)]

    def by_tap(self, short):
        """The inverse: eight vectors, one an image, of 2 or 4 numbers to 2 or 4 vectors of eight images."""
        while len(short) > 1:
            width = 2 * short[0].type.count
            short = [self.shuffle(a, b, *range(width)) for a, b in zip(short[::2], short[1::2], strict=True)]
        taps = short[0].type.count // _LANES
        return [self.shuffle(short[0], short[0], *range(tap, taps * _LANES, taps)) for tap in range(taps)]

    def weighted(self, weights, vectors):
        """Sum of products."""
        total = self.builder.fmul(weights[0], vectors[0])
        for weight, vector in zip(weights[1:], vectors[1:], strict=True):
            total = self.multiply_add(weight, vector, total)
        return total


def _splat_voxel(taps: int):
    """Intrinsic that adds voxel ``voxel`` of cell ``cell`` to eight canvases."""

    def typed(typingctx, canvas, vertices, cells, bary, cell, voxel, value, grid, stride):
        def codegen(context, builder, signature, arguments):
            emit = _Emit(context, builder, signature, arguments)
            canvas, vertices, cells, bary = (emit.data(k) for k in range(4))
            cell, voxel, value, grid, stride = arguments[4:]
            x, y, offsets = emit.locate(vertices, emit.corners(cells, cell), emit.weights(bary, voxel), grid, stride)
            value = emit.spread(value)
            along_y = [builder.fmul(value, w) for w in emit.kernel(taps, y)]
            along_x = emit.kernel(taps, x)
            if taps == 2:
                pieces = [emit.by_lane([builder.fmul(w, a) for a in along_x]) for w in along_y]
            else:
                short = emit.by_lane(along_x)
            for lane in range(_LANES):
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

        arguments = (canvas, vertices, cells, bary, types.int64, types.int64, types.float32, types.int64, types.int64)
        return types.void(*arguments), codegen

    return intrinsic(typed)


def _read_voxel(taps: int, slopes: bool):
    """Intrinsic that reads eight canvases at the voxel's place into ``read``: values, slopes along x and y (8 each)."""

    def typed(typingctx, canvas, vertices, cells, bary, cell, voxel, read, grid, stride):
        def codegen(context, builder, signature, arguments):
            emit = _Emit(context, builder, signature, arguments)
            canvas, vertices, cells, bary = (emit.data(k) for k in range(4))
            read = emit.data(6)
            cell, voxel, _, grid, stride = arguments[4:]
            x, y, offsets = emit.locate(vertices, emit.corners(cells, cell), emit.weights(bary, voxel), grid, stride)
            along_x, along_y = emit.kernel(taps, x), emit.kernel(taps, y)
            slope_x, slope_y = emit.kernel_slope(taps, x), emit.kernel_slope(taps, y)
            kind = _wide(_FLOAT, taps)
            if taps == 2:
                rows = [[], []]
                for lane in range(_LANES):
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
                for lane in range(_LANES):
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
                emit.store(along, read, _LONG(_LANES))
                emit.store(down, read, _LONG(2 * _LANES))
            return context.get_dummy_value()

        arguments = (canvas, vertices, cells, bary, types.int64, types.int64, read, types.int64, types.int64)
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
        slopes = [builder.fmul(value, emit.load(read, _LONG(_LANES * k), _wide(_FLOAT))) for k in (1, 2)]
        for corner, weight in zip(emit.corners(cells, cell), emit.weights(bary, voxel), strict=True):
            for axis, slope in enumerate(slopes):
                place = builder.add(corner, _LONG(_LANES * axis))
                old = emit.load(forces, place, _wide(_FLOAT))
                emit.store(emit.multiply_add(weight, slope, old), forces, place)
        return context.get_dummy_value()

    return types.void(forces, cells, bary, types.int64, types.int64, types.float32, read), codegen


@intrinsic
def _sum_lanes(typingctx, read):
    """Sum of the first eight numbers."""

    def codegen(context, builder, signature, arguments):
        emit = _Emit(context, builder, signature, arguments)
        total, width = emit.load(emit.data(0), _LONG(0), _wide(_FLOAT)), _LANES
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
    block = np.empty((vertices.shape[1], 2, _LANES), np.float32)
    change = np.float32(0)  # of any number that is subtracted from itself
    for lane in range(_LANES):
        image = min(first + lane, last - 1)
        for vertex in range(vertices.shape[1]):
            x, y = vertices[image, vertex, 0], vertices[image, vertex, 1]
            block[vertex, 0, lane] = x
            block[vertex, 1, lane] = y
            change += (x - x) + (y - y)
    return block, change == 0


@njit(cache=True, parallel=True)
def _splat(values, vertices, cells, cell, bary, grid, taps, images, finite):
    batch = len(vertices)
    stride = grid + _MARGIN
    shift = 0 if taps == 2 else 1  # the cubic kernel's first tap sits one pixel before floor(p)
    for block in prange((batch + _LANES - 1) // _LANES):
        first = block * _LANES
        last = min(batch, first + _LANES)
        places, finite[block] = _interleave(vertices, first, last)
        canvas = np.zeros((_LANES, stride, stride), np.float32)
        if taps == 2:
            for j in range(len(values)):
                _splat_linear(canvas, places, cells, bary, cell[j], j, values[j], grid, stride)
        else:
            for j in range(len(values)):
                _splat_cubic(canvas, places, cells, bary, cell[j], j, values[j], grid, stride)
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
def _adjoint(
    images, values, vertices, cells, cell, bary, taps, need_values, need_vertices, sums, grad_vertices, finite
):
    """``sums`` (blocks, nvox): each block's part of the gradient by the values."""
    batch, grid = images.shape[:2]
    stride = grid + _MARGIN
    for block in prange((batch + _LANES - 1) // _LANES):
        first = block * _LANES
        last = min(batch, first + _LANES)
        places, finite[block] = _interleave(vertices, first, last)
        forces = np.zeros(places.shape if need_vertices else (0, 2, _LANES), np.float32)
        canvas = np.zeros((_LANES, stride, stride), np.float32)  # a lane without an image adds nothing
        for i in range(first, last):
            _pad(images[i], 0 if taps == 2 else 1, canvas[i - first])
        read = np.empty(3 * _LANES, np.float32)
        for j in range(len(values)):
            c = cell[j]
            if taps == 2:
                _read_linear(canvas, places, cells, bary, c, j, read, grid, stride)
            elif need_vertices:
                _read_cubic(canvas, places, cells, bary, c, j, read, grid, stride)
            else:
                _read_cubic_value(canvas, places, cells, bary, c, j, read, grid, stride)
            if need_values:
                sums[block, j] = _sum_lanes(read)
            if need_vertices:
                _add_forces(forces, cells, bary, c, j, values[j], read)
        if need_vertices:
            for i in range(first, last):
                for vertex in range(len(forces)):
                    grad_vertices[i, vertex, 0] = forces[vertex, 0, i - first]
                    grad_vertices[i, vertex, 1] = forces[vertex, 1, i - first]


@njit(cache=True, parallel=True)
def _add_up(sums, total):
    for j in prange(sums.shape[1]):
        for block in range(len(sums)):
            total[j] += sums[block, j]


@njit(cache=True, fastmath=True, parallel=True)
def _view(vertices, displacements, turn, origin, views):
    for i in prange(len(turn)):
        of_image = vertices[min(np.int64(i), len(vertices) - 1)]
        r, shift = turn[i], origin[i]
        for v in range(vertices.shape[1]):
            x, y, z = of_image[v, 0], of_image[v, 1], of_image[v, 2]
            if len(displacements):
                x += displacements[i, v, 0]
                y += displacements[i, v, 1]
                z += displacements[i, v, 2]
            views[i, v, 0] = r[0, 0] * x + r[0, 1] * y + r[0, 2] * z - shift[0]
            views[i, v, 1] = r[1, 0] * x + r[1, 1] * y + r[1, 2] * z - shift[1]


@njit(cache=True, fastmath=True, parallel=True)
def _view_adjoint(grad, turn, back):
    for i in prange(len(turn)):
        r = turn[i]
        for v in range(grad.shape[1]):
            x, y = grad[i, v, 0], grad[i, v, 1]
            back[i, v, 0] = r[0, 0] * x + r[1, 0] * y
            back[i, v, 1] = r[0, 1] * x + r[1, 1] * y
            back[i, v, 2] = r[0, 2] * x + r[1, 2] * y


def _arrays(*tensors):
    share_threads_with_numba()
    return [t.detach().contiguous().numpy() for t in tensors]


def _num_blocks(images):
    return -(-len(images) // _LANES)


def _check(finite):
    if not finite.all():
        raise FloatingPointError("mesh vertices are not finite: the model has diverged")


def splat(values, vertices, cells, cell, bary, grid, taps):
    """See ``op.splat_voxels``."""
    images = torch.empty((len(vertices), grid, grid), dtype=torch.float32)
    finite = np.ones(_num_blocks(images), np.bool_)
    values, vertices, cells, cell, bary = _arrays(values, vertices, cells, cell, bary)
    _splat(values, vertices, cells, cell, bary, grid, taps, images.numpy(), finite)
    _check(finite)
    return images


def splat_adjoint(grad_images, values, vertices, cells, cell, bary, taps, need_values, need_vertices):
    """See ``op.splat_voxels_adjoint``."""
    grad_values = torch.zeros(len(values) if need_values else 0)
    grad_vertices = torch.empty(vertices.shape if need_vertices else (0, 0, 2))
    images, values, vertices, cells, cell, bary = _arrays(grad_images, values, vertices, cells, cell, bary)
    batch, voxels = len(images), len(values)
    at_once = _LANES * max(1, _PARTIAL_SUMS // max(1, voxels)) if need_values else max(1, batch)
    for first in range(0, batch, at_once):
        some = slice(first, first + at_once)
        blocks = _num_blocks(images[some])
        finite = np.ones(blocks, np.bool_)
        sums = np.empty((blocks, voxels) if need_values else (0, 0), np.float32)
        _adjoint(
            images[some], values, vertices[some], cells, cell, bary, taps, need_values, need_vertices,
            sums, grad_vertices.numpy()[some], finite,
        )  # fmt: skip
        _check(finite)
        if need_values:
            _add_up(sums, grad_values.numpy())
    return grad_values, grad_vertices


def view(vertices_A, displacements_A, turn, origin_px):
    """See ``op.view_vertices``; ``turn`` (b, 2, 3) holds the rotations' first two rows over the pixel size."""
    num_vertices = vertices_A.shape[-2]
    if displacements_A is None:
        displacements_A = torch.empty((0, num_vertices, 3))
    views = torch.empty((len(turn), num_vertices, 2))
    _view(*_arrays(vertices_A.view(-1, num_vertices, 3), displacements_A, turn, origin_px), views.numpy())
    return views


def view_adjoint(grad, turn):
    """(b, nv, 3) gradient by the moved vertices, from that by their views, (b, nv, 2)."""
    back = torch.empty((*grad.shape[:2], 3))
    _view_adjoint(*_arrays(grad, turn), back.numpy())
    return back
