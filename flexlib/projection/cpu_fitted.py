"""Numba kernels for the map alone, float32, with the fitted kernel: eight images at a time, as in ``cpu_blocks.py``.

What the map's normal equations need, and nothing more: no gradient by the vertices. A few voxels are first located in
all eight images, then added to (or read from) one image after the other. A processor looks ahead by some two hundred
instructions: in one piece a voxel is longer than that, and its long chain of dependent instructions was waited for.
Weights are computed where they are needed, in the four lanes that hold the four taps, so nothing is transposed.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from flexlib.projection.cpu_blocks import fold, interleave, pad
from flexlib.projection.cpu_vectors import FLOAT, INT, LANES, LONG, MARGIN, Emit, wide
from flexlib.runtime import keeps_compiled

_AT_ONCE = 32  # voxels that are located before the first is added
_TAPS = 4
_SHIFT = 1  # the first tap sits one pixel before floor(p)


@intrinsic
def _enter_cell(typingctx, vertices, cells, cell, frame):
    """Write what makes positions of the cell's barycentric weights: (2 axes, 4, 8), differences to the last vertex."""

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        vertices, cells, frame = (emit.data(k) for k in (0, 1, 3))
        corners = emit.corners(cells, arguments[2])
        for axis in range(2):
            *others, last = (emit.load(vertices, builder.add(c, LONG(LANES * axis)), wide(FLOAT)) for c in corners)
            for k, vector in enumerate([*(builder.fsub(other, last) for other in others), last]):
                emit.store(vector, frame, LONG(LANES * (4 * axis + k)))
        return context.get_dummy_value()

    return types.void(vertices, cells, types.int64, frame), codegen


@intrinsic
def _locate(typingctx, canvas, frame, bary, voxel, found, slot):
    """Write into ``found`` (slots, 3, 8) where a voxel is in eight canvases: offset, fractions along x and y (bits).

    The frame is in parts of the image's side, so that whole numbers are turns. What is no number, or rounded up to the
    side, is kept in the image.
    """

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        frame, bary, found = (emit.data(k) for k in (1, 2, 4))
        stride = emit.stride()
        grid = builder.trunc(builder.sub(stride, LONG(MARGIN)), INT)
        side, last = emit.spread(builder.sitofp(grid, FLOAT)), emit.spread(builder.sub(grid, INT(1)))
        first_weight, base = builder.mul(arguments[3], LONG(4)), builder.mul(arguments[5], LONG(3 * LANES))
        weights = [emit.spread(emit.load(bary, builder.add(first_weight, LONG(k)), FLOAT)) for k in range(3)]
        pixels = []
        for axis in range(2):
            rows = [emit.load(frame, LONG(LANES * (4 * axis + k)), wide(FLOAT)) for k in range(4)]
            position = rows[3]
            for weight, row in zip(weights, rows, strict=False):
                position = emit.multiply_add(weight, row, position)
            position = builder.fmul(builder.fsub(position, emit.floor(position)), side)
            pixel = builder.fptosi(position, wide(INT))
            pixel = builder.select(builder.icmp_unsigned("<", pixel, last), pixel, last)
            fraction = builder.fsub(position, builder.sitofp(pixel, wide(FLOAT)))
            emit.store(builder.bitcast(fraction, wide(INT)), found, builder.add(base, LONG(LANES * (1 + axis))))
            pixels.append(pixel)
        row = builder.mul(pixels[1], emit.spread(builder.trunc(stride, INT)))
        image = emit.spread(builder.trunc(builder.mul(stride, stride), INT))
        image = builder.mul(image, ir.Constant(wide(INT), list(range(LANES))))
        emit.store(builder.add(builder.add(row, pixels[0]), image), found, base)
        return context.get_dummy_value()

    return types.void(canvas, frame, bary, types.int64, found, types.int64), codegen


def _taps(emit: Emit, found: ir.Value, slot: ir.Value, along_x, along_y):
    """For each image: weights along x (4 lanes), along y (4 vectors of one number), and offsets of the four rows.

    ``along_x`` and ``along_y`` are the polynomials' coefficients, four taps in a vector, highest power first.
    """
    builder, stride = emit.builder, emit.stride()
    base = builder.mul(slot, LONG(3 * LANES))
    strides = [builder.mul(stride, LONG(row)) for row in range(_TAPS)]

    def weights(lane: int, axis: int, coefficients):
        bits = emit.load(found, builder.add(base, LONG(LANES * (1 + axis) + lane)), INT)
        fraction = emit.spread(builder.bitcast(bits, FLOAT), _TAPS)
        value = coefficients[0]
        for coefficient in coefficients[1:]:
            value = emit.multiply_add(value, fraction, coefficient)
        return value

    for lane in range(LANES):
        x, y = weights(lane, 0, along_x), weights(lane, 1, along_y)
        offset = builder.zext(emit.load(found, builder.add(base, LONG(lane)), INT), LONG)
        yield x, [emit.shuffle(y, y, *[row] * _TAPS) for row in range(_TAPS)], [builder.add(offset, s) for s in strides]


def _coefficients(emit: Emit, table: ir.Value):
    """The kernel's polynomials (4, 4), a vector for each power."""
    return [emit.load(table, LONG(_TAPS * power), wide(FLOAT, _TAPS)) for power in range(_TAPS)]


@intrinsic
def _add(typingctx, canvas, found, table, slot, value):
    """Add ``value`` to eight canvases where ``found`` says."""

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        canvas, found, table = (emit.data(k) for k in range(3))
        coefficients = _coefficients(emit, table)
        scaled = [builder.fmul(emit.spread(arguments[4], _TAPS), c) for c in coefficients]
        for x, along_y, rows in _taps(emit, found, arguments[3], coefficients, scaled):
            for y, row in zip(along_y, rows, strict=True):
                emit.store(emit.multiply_add(y, x, emit.load(canvas, row, wide(FLOAT, _TAPS))), canvas, row)
        return context.get_dummy_value()

    return types.void(canvas, found, table, types.int64, types.float32), codegen


@intrinsic
def _read(typingctx, canvas, found, table, slot):
    """Sum over eight canvases of what is read where ``found`` says."""

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        canvas, found, table = (emit.data(k) for k in range(3))
        coefficients = _coefficients(emit, table)
        totals = [None, None]  # two, so that an image need not wait for the one before
        for lane, (x, along_y, rows) in enumerate(_taps(emit, found, arguments[3], coefficients, coefficients)):
            level = emit.weighted(along_y, [emit.load(canvas, row, wide(FLOAT, _TAPS)) for row in rows])
            before = totals[lane % 2]
            totals[lane % 2] = builder.fmul(level, x) if before is None else emit.multiply_add(level, x, before)
        total = builder.fadd(*totals)
        pair = builder.fadd(emit.shuffle(total, total, 0, 1), emit.shuffle(total, total, 2, 3))
        return builder.fadd(builder.extract_element(pair, INT(0)), builder.extract_element(pair, INT(1)))

    return types.float32(canvas, found, table, types.int64), codegen


@njit(cache=keeps_compiled(), parallel=True)
def splat_map_blocks(voxels, turns, table, images, finite):
    """Write ``images`` (b, G, G), and whether each block's vertices are ``finite``; ``voxels`` from values to bary.

    ``turns`` (b, nv, 2) are the vertices in parts of the image's side, ``table`` (4, 4) the kernel's coefficients.
    """
    values, cells, cell, bary = voxels
    batch, grid = images.shape[:2]
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        vertices, finite[block] = interleave(turns, first, last)
        canvas = np.zeros((LANES, grid + MARGIN, grid + MARGIN), np.float32)
        found, frame = np.empty((_AT_ONCE, 3, LANES), np.int32), np.empty((2, 4, LANES), np.float32)
        within = np.int64(-1)
        for start in range(0, len(values), _AT_ONCE):
            end = min(len(values), start + _AT_ONCE)
            for j in range(start, end):
                if cell[j] != within:
                    within = np.int64(cell[j])
                    _enter_cell(vertices, cells, within, frame)
                _locate(canvas, frame, bary, j, found, j - start)
            for j in range(start, end):
                _add(canvas, found, table, j - start, values[j])
        for i in range(first, last):
            fold(canvas[i - first], _SHIFT, images[i])


@njit(cache=keeps_compiled(), parallel=True)
def gather_map_blocks(images, voxels, turns, table, sums, finite):
    """Write ``sums`` (blocks, nvox), what each block of ``images`` (b, G, G) makes of the adjoint; ``voxels`` as above.

    The values among the voxels' arrays are not read.
    """
    _, cells, cell, bary = voxels
    batch, grid = images.shape[:2]
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        vertices, finite[block] = interleave(turns, first, last)
        canvas = np.zeros((LANES, grid + MARGIN, grid + MARGIN), np.float32)  # a lane without an image adds nothing
        for i in range(first, last):
            pad(images[i], _SHIFT, canvas[i - first])
        found, frame = np.empty((_AT_ONCE, 3, LANES), np.int32), np.empty((2, 4, LANES), np.float32)
        within = np.int64(-1)
        for start in range(0, len(cell), _AT_ONCE):
            end = min(len(cell), start + _AT_ONCE)
            for j in range(start, end):
                if cell[j] != within:
                    within = np.int64(cell[j])
                    _enter_cell(vertices, cells, within, frame)
                _locate(canvas, frame, bary, j, found, j - start)
            for j in range(start, end):
                sums[block, j] = _read(canvas, found, table, j - start)
