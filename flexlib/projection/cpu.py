"""Numba backend of the operator for the CPU, float32.

Work is cut into segments (runs of voxels of one cell). Forward: a thread owns a block of images. Adjoint: a thread
owns a block of segments, so no two threads ever add to the same number, and every sum is taken in an order that does
not depend on the thread count: results are bit-identical for any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from flexlib.runtime import share_threads_with_numba

_SEGMENT_VOXELS = 512  # a segment's positions fit in L1
_GROUP_VOXELS = 4096  # a thread's share of the adjoint
_IMAGE_BLOCK = 8  # images that share one pass over the voxels


@njit(cache=True)
def _cut_segments(cell, num_cells, longest):
    """(nseg, 3) int64 rows (cell, first voxel, end voxel), no longer than ``longest`` voxels."""
    count = 0
    n = len(cell)
    start = 0
    while start < n:
        stop = start + 1
        while stop < n and stop - start < longest and cell[stop] == cell[start]:
            stop += 1
        count += 1
        start = stop
    segments = np.empty((count, 3), np.int64)
    start = 0
    for s in range(count):
        stop = start + 1
        while stop < n and stop - start < longest and cell[stop] == cell[start]:
            stop += 1
        segments[s, 0], segments[s, 1], segments[s, 2] = cell[start], start, stop
        start = stop
    return segments


@njit(cache=True, fastmath=True, inline="always")
def _locate(vertices, corner, bary, start, stop, grid, fx, fy, at, stride):
    """Fractions and flat padded index of the first tap's pixel for the voxels of one segment."""
    x0, y0 = vertices[corner[0], 0], vertices[corner[0], 1]
    x1, y1 = vertices[corner[1], 0], vertices[corner[1], 1]
    x2, y2 = vertices[corner[2], 0], vertices[corner[2], 1]
    x3, y3 = vertices[corner[3], 0], vertices[corner[3], 1]
    side = np.float32(grid)
    inverse = np.float32(1.0) / side
    for j in range(stop - start):
        b0, b1, b2, b3 = bary[start + j, 0], bary[start + j, 1], bary[start + j, 2], bary[start + j, 3]
        px = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        py = b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3
        px -= side * np.floor(px * inverse)
        py -= side * np.floor(py * inverse)
        ix = np.floor(px)
        iy = np.floor(py)
        fx[j] = px - ix
        fy[j] = py - iy
        at[j] = np.int32(iy) * stride + np.int32(ix)


@njit(cache=True, fastmath=True, parallel=True)
def _splat(values, vertices, cells, bary, segments, grid, taps, images):
    batch = vertices.shape[0]
    stride = grid + 4
    blocks = (batch + _IMAGE_BLOCK - 1) // _IMAGE_BLOCK
    sixth, two_thirds, half = np.float32(1 / 6), np.float32(2 / 3), np.float32(0.5)
    one = np.float32(1)
    for block in prange(blocks):
        first = block * _IMAGE_BLOCK
        last = min(batch, first + _IMAGE_BLOCK)
        padded = np.zeros((last - first, stride * stride), np.float32)
        fx = np.empty(_SEGMENT_VOXELS, np.float32)
        fy = np.empty(_SEGMENT_VOXELS, np.float32)
        at = np.empty(_SEGMENT_VOXELS, np.int32)
        for s in range(len(segments)):
            corner = cells[segments[s, 0]]
            start, stop = segments[s, 1], segments[s, 2]
            for i in range(last - first):
                _locate(vertices[first + i], corner, bary, start, stop, grid, fx, fy, at, stride)
                canvas = padded[i]
                if taps == 2:
                    for j in range(stop - start):
                        v = values[start + j]
                        a = at[j]
                        x, y = fx[j], fy[j]
                        lower = v * (one - y)
                        upper = v * y
                        canvas[a] += lower * (one - x)
                        canvas[a + 1] += lower * x
                        canvas[a + stride] += upper * (one - x)
                        canvas[a + stride + 1] += upper * x
                else:
                    for j in range(stop - start):
                        v = values[start + j]
                        a = at[j]
                        x, y = fx[j], fy[j]
                        gx, gy = one - x, one - y
                        wx0 = gx * gx * gx * sixth
                        wx1 = two_thirds - x * x + x * x * x * half
                        wx2 = two_thirds - gx * gx + gx * gx * gx * half
                        wx3 = x * x * x * sixth
                        wy0 = v * gy * gy * gy * sixth
                        wy1 = v * (two_thirds - y * y + y * y * y * half)
                        wy2 = v * (two_thirds - gy * gy + gy * gy * gy * half)
                        wy3 = v * y * y * y * sixth
                        canvas[a] += wy0 * wx0
                        canvas[a + 1] += wy0 * wx1
                        canvas[a + 2] += wy0 * wx2
                        canvas[a + 3] += wy0 * wx3
                        a += stride
                        canvas[a] += wy1 * wx0
                        canvas[a + 1] += wy1 * wx1
                        canvas[a + 2] += wy1 * wx2
                        canvas[a + 3] += wy1 * wx3
                        a += stride
                        canvas[a] += wy2 * wx0
                        canvas[a + 1] += wy2 * wx1
                        canvas[a + 2] += wy2 * wx2
                        canvas[a + 3] += wy2 * wx3
                        a += stride
                        canvas[a] += wy3 * wx0
                        canvas[a + 1] += wy3 * wx1
                        canvas[a + 2] += wy3 * wx2
                        canvas[a + 3] += wy3 * wx3
        shift = 0 if taps == 2 else 1  # the cubic kernel's first tap sits one pixel before floor(p)
        for i in range(last - first):
            image = images[first + i]
            image[:, :] = 0
            for y in range(stride):
                row = image[(y - shift) % grid]
                source = padded[i, y * stride : (y + 1) * stride]
                for x in range(grid):
                    row[x] += source[x + shift]
                for x in range(shift):
                    row[grid - shift + x] += source[x]
                for x in range(grid + shift, stride):
                    row[x - shift - grid] += source[x]


@njit(cache=True, parallel=True)
def _pad(images, taps, padded):
    """Periodic copy of (b, G, G) images into (b, (G+4)^2), the first tap's pixel at index 0."""
    grid = images.shape[1]
    stride = grid + 4
    shift = 0 if taps == 2 else 1
    for i in prange(images.shape[0]):
        for y in range(stride):
            source = images[i, (y - shift) % grid]
            row = padded[i, y * stride : (y + 1) * stride]
            for x in range(grid):
                row[x + shift] = source[x]
            for x in range(shift):
                row[x] = source[grid - shift + x]
            for x in range(grid + shift, stride):
                row[x] = source[x - shift - grid]


@njit(cache=True, fastmath=True, parallel=True)
def _adjoint(
    padded, values, vertices, cells, bary, segments, groups, grid, taps, need_values, need_vertices,
    grad_values, force,
):  # fmt: skip
    batch = vertices.shape[0]
    stride = grid + 4
    sixth, two_thirds, half = np.float32(1 / 6), np.float32(2 / 3), np.float32(0.5)
    one, two, three_halves = np.float32(1), np.float32(2), np.float32(1.5)
    for group in prange(len(groups) - 1):
        fx = np.empty(_SEGMENT_VOXELS, np.float32)
        fy = np.empty(_SEGMENT_VOXELS, np.float32)
        at = np.empty(_SEGMENT_VOXELS, np.int32)
        gradient = np.empty(_SEGMENT_VOXELS, np.float32)
        for s in range(groups[group], groups[group + 1]):
            corner = cells[segments[s, 0]]
            start, stop = segments[s, 1], segments[s, 2]
            for i in range(batch):
                _locate(vertices[i], corner, bary, start, stop, grid, fx, fy, at, stride)
                canvas = padded[i]
                if taps == 2:
                    for j in range(stop - start):
                        a = at[j]
                        x, y = fx[j], fy[j]
                        c00, c01 = canvas[a], canvas[a + 1]
                        c10, c11 = canvas[a + stride], canvas[a + stride + 1]
                        lower = c00 + x * (c01 - c00)
                        upper = c10 + x * (c11 - c10)
                        gradient[j] = lower + y * (upper - lower)
                        fx[j] = (c01 - c00) + y * ((c11 - c10) - (c01 - c00))
                        fy[j] = upper - lower
                else:
                    for j in range(stop - start):
                        a = at[j]
                        x, y = fx[j], fy[j]
                        gx, gy = one - x, one - y
                        wx0 = gx * gx * gx * sixth
                        wx1 = two_thirds - x * x + x * x * x * half
                        wx2 = two_thirds - gx * gx + gx * gx * gx * half
                        wx3 = x * x * x * sixth
                        sx0 = -half * gx * gx
                        sx1 = -two * x + three_halves * x * x
                        sx2 = two * gx - three_halves * gx * gx
                        sx3 = half * x * x
                        w0 = gy * gy * gy * sixth
                        w1 = two_thirds - y * y + y * y * y * half
                        w2 = two_thirds - gy * gy + gy * gy * gy * half
                        w3 = y * y * y * sixth
                        b = a + stride
                        c = b + stride
                        d = c + stride
                        r0 = wx0 * canvas[a] + wx1 * canvas[a + 1] + wx2 * canvas[a + 2] + wx3 * canvas[a + 3]
                        r1 = wx0 * canvas[b] + wx1 * canvas[b + 1] + wx2 * canvas[b + 2] + wx3 * canvas[b + 3]
                        r2 = wx0 * canvas[c] + wx1 * canvas[c + 1] + wx2 * canvas[c + 2] + wx3 * canvas[c + 3]
                        r3 = wx0 * canvas[d] + wx1 * canvas[d + 1] + wx2 * canvas[d + 2] + wx3 * canvas[d + 3]
                        gradient[j] = w0 * r0 + w1 * r1 + w2 * r2 + w3 * r3
                        if need_vertices:
                            t0 = sx0 * canvas[a] + sx1 * canvas[a + 1] + sx2 * canvas[a + 2] + sx3 * canvas[a + 3]
                            t1 = sx0 * canvas[b] + sx1 * canvas[b + 1] + sx2 * canvas[b + 2] + sx3 * canvas[b + 3]
                            t2 = sx0 * canvas[c] + sx1 * canvas[c + 1] + sx2 * canvas[c + 2] + sx3 * canvas[c + 3]
                            t3 = sx0 * canvas[d] + sx1 * canvas[d + 1] + sx2 * canvas[d + 2] + sx3 * canvas[d + 3]
                            fx[j] = w0 * t0 + w1 * t1 + w2 * t2 + w3 * t3
                            fy[j] = (
                                -half * gy * gy * r0
                                + (-two * y + three_halves * y * y) * r1
                                + (two * gy - three_halves * gy * gy) * r2
                                + half * y * y * r3
                            )
                if need_values:
                    for j in range(stop - start):
                        grad_values[start + j] += gradient[j]
                if need_vertices:
                    x0 = x1 = x2 = x3 = np.float32(0)
                    y0 = y1 = y2 = y3 = np.float32(0)
                    for j in range(stop - start):
                        v = values[start + j]
                        gx = v * fx[j]
                        gy = v * fy[j]
                        b0, b1, b2, b3 = (
                            bary[start + j, 0],
                            bary[start + j, 1],
                            bary[start + j, 2],
                            bary[start + j, 3],
                        )
                        x0 += b0 * gx
                        x1 += b1 * gx
                        x2 += b2 * gx
                        x3 += b3 * gx
                        y0 += b0 * gy
                        y1 += b1 * gy
                        y2 += b2 * gy
                        y3 += b3 * gy
                    force[i, s, 0, 0], force[i, s, 0, 1] = x0, y0
                    force[i, s, 1, 0], force[i, s, 1, 1] = x1, y1
                    force[i, s, 2, 0], force[i, s, 2, 1] = x2, y2
                    force[i, s, 3, 0], force[i, s, 3, 1] = x3, y3


@njit(cache=True, parallel=True)
def _sum_forces(force, segments, cells, grad_vertices):
    for i in prange(force.shape[0]):
        for s in range(len(segments)):
            corner = cells[segments[s, 0]]
            for k in range(4):
                grad_vertices[i, corner[k], 0] += force[i, s, k, 0]
                grad_vertices[i, corner[k], 1] += force[i, s, k, 1]


def _arrays(vertices, cells, cell, *others):
    if not bool(torch.isfinite(vertices).all()):
        raise FloatingPointError("mesh vertices are not finite: the model has diverged")
    share_threads_with_numba()
    segments = _cut_segments(cell.numpy(), len(cells), _SEGMENT_VOXELS)
    return segments, [t.detach().contiguous().numpy() for t in (vertices, cells, *others)]


def splat(values, vertices, cells, cell, bary, grid, taps):
    """See ``op.splat_voxels``."""
    segments, (vertices_, cells_, values_, bary_) = _arrays(vertices, cells, cell, values, bary)
    images = torch.empty((len(vertices_), grid, grid), dtype=torch.float32)
    _splat(values_, vertices_, cells_, bary_, segments, grid, taps, images.numpy())
    return images


def splat_adjoint(grad_images, values, vertices, cells, cell, bary, taps, need_values, need_vertices):
    """See ``op.splat_voxels_adjoint``."""
    segments, (vertices_, cells_, values_, bary_, images) = _arrays(vertices, cells, cell, values, bary, grad_images)
    batch, grid = images.shape[:2]
    ends = segments[:, 2]
    groups = np.unique(np.concatenate([np.searchsorted(ends, np.arange(0, ends[-1], _GROUP_VOXELS)), [len(segments)]]))
    grad_values = torch.zeros(len(values_) if need_values else 0)
    grad_vertices = torch.zeros(vertices.shape if need_vertices else 0)
    block = max(1, min(batch, 2**27 // (len(segments) * 32)))  # the forces of a block stay under 128 MiB
    for first in range(0, batch, block):
        last = min(batch, first + block)
        padded = np.empty((last - first, (grid + 4) ** 2), np.float32)
        _pad(images[first:last], taps, padded)
        force = np.empty((last - first, len(segments), 4, 2) if need_vertices else (1, 1, 4, 2), np.float32)
        _adjoint(
            padded, values_, vertices_[first:last], cells_, bary_, segments, groups, grid, taps,
            need_values, need_vertices, grad_values.numpy(), force,
        )  # fmt: skip
        if need_vertices:
            _sum_forces(force, segments, cells_, grad_vertices.numpy()[first:last])
    return grad_values, grad_vertices
