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
from numba import njit, prange, types
from numba.extending import intrinsic

from flexlib.projection.cpu_vectors import FLOAT, INT, LANES, LONG, MARGIN, Emit, wide
from flexlib.runtime import keeps_compiled


def _splat_voxel(taps: int):
    """Intrinsic that adds voxel ``voxel`` of cell ``cell`` to eight canvases."""

    def typed(typingctx, canvas, vertices, cells, bary, cell, voxel, value):
        def codegen(context, builder, signature, arguments):
            emit = Emit(context, builder, signature, arguments)
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
                    kind = wide(FLOAT, taps)
                    old = emit.load(canvas, offset, kind)
                    if taps == 2:
                        new = builder.fadd(old, pieces[row][lane])
                    else:
                        across = emit.spread(builder.extract_element(along_y[row], INT(lane)), taps)
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
            emit = Emit(context, builder, signature, arguments)
            canvas, vertices, cells, bary = (emit.data(k) for k in range(4))
            read = emit.data(6)
            cell, voxel = arguments[4:6]
            stride = emit.stride()
            x, y, offsets = emit.locate(vertices, emit.corners(cells, cell), emit.weights(bary, voxel), stride)
            along_x, along_y = emit.kernel(taps, x), emit.kernel(taps, y)
            slope_x, slope_y = emit.kernel_slope(taps, x), emit.kernel_slope(taps, y)
            kind = wide(FLOAT, taps)
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
                        return [emit.spread(builder.extract_element(v, INT(lane)), taps) for v in vectors]

                    summed.append(emit.weighted(in_lane(along_y), rows))
                    if slopes:
                        sloped.append(emit.weighted(in_lane(slope_y), rows))
                columns = emit.by_tap(summed)
                values = emit.weighted(along_x, columns)
                if slopes:
                    along = emit.weighted(slope_x, columns)
                    down = emit.weighted(along_x, emit.by_tap(sloped))
            emit.store(values, read, LONG(0))
            if slopes:
                emit.store(along, read, LONG(LANES))
                emit.store(down, read, LONG(2 * LANES))
            return context.get_dummy_value()

        arguments = (canvas, vertices, cells, bary, types.int64, types.int64, read)
        return types.void(*arguments), codegen

    return intrinsic(typed)


@intrinsic
def _add_forces(typingctx, forces, cells, bary, cell, voxel, value, read):
    """Share ``value`` times the slopes in ``read`` among the four vertices of the voxel's cell."""

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        forces, cells, bary, read = (emit.data(k) for k in (0, 1, 2, 6))
        cell, voxel, value = arguments[3:6]
        value = emit.spread(value)
        slopes = [builder.fmul(value, emit.load(read, LONG(LANES * k), wide(FLOAT))) for k in (1, 2)]
        for corner, weight in zip(emit.corners(cells, cell), emit.weights(bary, voxel), strict=True):
            for axis, slope in enumerate(slopes):
                offset = builder.add(corner, LONG(LANES * axis))
                old = emit.load(forces, offset, wide(FLOAT))
                emit.store(emit.multiply_add(weight, slope, old), forces, offset)
        return context.get_dummy_value()

    return types.void(forces, cells, bary, types.int64, types.int64, types.float32, read), codegen


@intrinsic
def _sum_lanes(typingctx, read):
    """Sum of the first eight numbers."""

    def codegen(context, builder, signature, arguments):
        emit = Emit(context, builder, signature, arguments)
        total, width = emit.load(emit.data(0), LONG(0), wide(FLOAT)), LANES
        while width > 1:
            width //= 2
            total = builder.fadd(
                emit.shuffle(total, total, *range(width)), emit.shuffle(total, total, *range(width, 2 * width))
            )
        return builder.extract_element(total, INT(0))

    return types.float32(read), codegen


_splat_linear, _splat_cubic = _splat_voxel(2), _splat_voxel(4)
_read_linear, _read_cubic, _read_cubic_value = _read_voxel(2, True), _read_voxel(4, True), _read_voxel(4, False)


@njit(cache=keeps_compiled())
def interleave(vertices, first, last):
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


@njit(cache=keeps_compiled(), parallel=True)
def splat_blocks(voxels, vertices, taps, images, finite):
    """Write ``images`` (b, G, G), and whether each block's vertices are ``finite``; ``voxels`` from values to bary."""
    values, cells, cell, bary = voxels
    batch, grid = images.shape[:2]
    stride = grid + MARGIN
    shift = 0 if taps == 2 else 1  # the cubic kernel's first tap sits one pixel before floor(p)
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        block_vertices, finite[block] = interleave(vertices, first, last)
        canvas = np.zeros((LANES, stride, stride), np.float32)
        if taps == 2:
            for j in range(len(values)):
                _splat_linear(canvas, block_vertices, cells, bary, cell[j], j, values[j])
        else:
            for j in range(len(values)):
                _splat_cubic(canvas, block_vertices, cells, bary, cell[j], j, values[j])
        for i in range(first, last):
            fold(canvas[i - first], shift, images[i])


@njit(cache=keeps_compiled())
def fold(canvas, shift, image):
    """Write a (G, G) image: a canvas whose first tap's pixel is at index 0, wrapped around."""
    grid, stride = image.shape[0], canvas.shape[0]
    image[:, :] = 0
    for y in range(stride):
        row, source = image[(y - shift) % grid], canvas[y]
        for x in range(grid):
            row[x] += source[x + shift]
        for x in range(shift):
            row[grid - shift + x] += source[x]
        for x in range(grid + shift, stride):
            row[x - shift - grid] += source[x]


@njit(cache=keeps_compiled())
def pad(image, shift, canvas):
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


@njit(cache=keeps_compiled(), parallel=True)
def adjoint_blocks(images, voxels, vertices, taps, needs, sums, grad_vertices, finite):
    """``needs`` (values, vertices): the gradients to write; ``sums`` (blocks, nvox) each block's part by the values."""
    values, cells, cell, bary = voxels
    need_values, need_vertices = needs
    batch, grid = images.shape[:2]
    stride = grid + MARGIN
    for block in prange((batch + LANES - 1) // LANES):
        first = block * LANES
        last = min(batch, first + LANES)
        block_vertices, finite[block] = interleave(vertices, first, last)
        forces = np.zeros(block_vertices.shape if need_vertices else (0, 2, LANES), np.float32)
        canvas = np.zeros((LANES, stride, stride), np.float32)  # a lane without an image adds nothing
        for i in range(first, last):
            pad(images[i], 0 if taps == 2 else 1, canvas[i - first])
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
