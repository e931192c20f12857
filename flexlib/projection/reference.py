"""Plain-torch backend of the operator: any device, any float type; what the fast backends are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def bspline_weights(fraction: torch.Tensor, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B-spline weights and their derivatives by position at ``fraction`` in [0, 1): two (..., taps) tensors.

    Taps sit at floor(p) + 0, 1 (linear) or floor(p) - 1, 0, 1, 2 (cubic).
    """
    f = fraction
    if taps == 2:
        return torch.stack([1 - f, f], -1), torch.stack([-torch.ones_like(f), torch.ones_like(f)], -1)
    g = 1 - f
    weights = torch.stack([g**3 / 6, 2 / 3 - f * f + f**3 / 2, 2 / 3 - g * g + g**3 / 2, f**3 / 6], -1)
    slopes = torch.stack([-g * g / 2, -2 * f + 1.5 * f * f, 2 * g - 1.5 * g * g, f * f / 2], -1)
    return weights, slopes


def _positions(
    vertices: torch.Tensor, cells: torch.Tensor, cell: torch.Tensor, bary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels below the voxels and fractions past them, (b, nvox, 2), and the voxels' vertices (nvox, 4)."""
    corner = cells.long()[cell.long()]
    position = (vertices[:, corner] * bary[None, :, :, None]).sum(2)
    base = torch.floor(position)
    return base.long(), position - base, corner


def _pixels(base: torch.Tensor, grid: int, taps: int) -> torch.Tensor:
    """Flat indices (b, nvox, taps, taps) of the taps of voxels past the pixels ``base`` (b, nvox, 2)."""
    offset = torch.arange(taps, device=base.device) - (taps // 2 - 1)
    ix, iy = ((base[..., axis, None] + offset) % grid for axis in range(2))
    return iy[..., :, None] * grid + ix[..., None, :]


def _taps(
    vertices: torch.Tensor, cells: torch.Tensor, cell: torch.Tensor, bary: torch.Tensor, grid: int, taps: int
) -> tuple[torch.Tensor, ...]:
    """Flat pixel indices (b, nvox, taps, taps) and weights, slopes (b, nvox, taps) along x and y."""
    base, fraction, corner = _positions(vertices, cells, cell, bary)
    wx, sx = bspline_weights(fraction[..., 0], taps)
    wy, sy = bspline_weights(fraction[..., 1], taps)
    return _pixels(base, grid, taps), wx, sx, wy, sy, corner


def splat(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    taps: int,
) -> torch.Tensor:
    """See ``op.splat_voxels``."""
    pixel, wx, _, wy, _, _ = _taps(vertices, cells, cell, bary, grid, taps)
    weight = wy[..., :, None] * wx[..., None, :] * values[None, :, None, None]
    images = vertices.new_zeros((vertices.shape[0], grid * grid))
    images.scatter_add_(1, pixel.flatten(1), weight.flatten(1))
    return images.view(-1, grid, grid)


def splat_adjoint(
    grad_images: torch.Tensor,
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    taps: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``op.splat_voxels_adjoint``."""
    need_values, need_vertices = needs
    grid = grad_images.shape[-1]
    pixel, wx, sx, wy, sy, corner = _taps(vertices, cells, cell, bary, grid, taps)
    gathered = grad_images.flatten(1).gather(1, pixel.flatten(1)).view(pixel.shape)
    empty = values.new_empty(0)
    grad_values = (gathered * wy[..., :, None] * wx[..., None, :]).sum((0, 2, 3)) if need_values else empty
    if not need_vertices:
        return grad_values, empty.clone()
    slope = torch.stack(
        [
            (gathered * wy[..., :, None] * sx[..., None, :]).sum((2, 3)),
            (gathered * sy[..., :, None] * wx[..., None, :]).sum((2, 3)),
        ],
        -1,
    )
    force = (slope * values[None, :, None])[:, :, None, :] * bary[None, :, :, None]  # (b, nvox, 4, 2)
    grad_vertices = torch.zeros_like(vertices)
    grad_vertices.index_add_(1, corner.flatten(), force.flatten(1, 2))
    return grad_values, grad_vertices


def splat_fitted(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    coefficients: np.ndarray,
) -> torch.Tensor:
    """As ``op.splat_voxels``, with the kernel of ``fitted.kernel_coefficients`` and without gradients."""
    pixel, weight = _fitted_taps(vertices, cells, cell, bary, grid, coefficients)
    images = vertices.new_zeros((vertices.shape[0], grid * grid))
    images.scatter_add_(1, pixel.flatten(1), (weight * values[None, :, None, None]).flatten(1))
    return images.view(-1, grid, grid)


def gather_fitted(
    images: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    coefficients: np.ndarray,
) -> torch.Tensor:
    """(nvox,) adjoint of ``splat_fitted`` by the values, from (b, grid, grid)."""
    pixel, weight = _fitted_taps(vertices, cells, cell, bary, images.shape[-1], coefficients)
    return (images.flatten(1).gather(1, pixel.flatten(1)).view(pixel.shape) * weight).sum((0, 2, 3))


def _fitted_taps(
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    coefficients: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat pixel indices and weights, (b, nvox, taps, taps) both."""
    base, fraction, _ = _positions(vertices, cells, cell, bary)
    powers = torch.as_tensor(coefficients).to(vertices)
    weights = torch.zeros_like(fraction)[..., None]
    for row in powers:
        weights = weights * fraction[..., None] + row
    along_x, along_y = weights.unbind(2)
    return _pixels(base, grid, powers.shape[1]), along_y[..., :, None] * along_x[..., None, :]
