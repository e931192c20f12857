"""Rotations that fit moved points."""

from __future__ import annotations

import torch


def rotations(overlap: torch.Tensor, at_rest: torch.Tensor) -> torch.Tensor:
    """Proper rotations (..., 3, 3) that best turn vertices at rest into moved ones (Kabsch).

    Parameters
    ----------
    overlap
        (..., 3, 3) sums over the vertices of mass times displacement (rows) times position from the centre (columns).
    at_rest
        The same sums of the positions at rest in place of the displacement.
    """
    # where all mass lies on one line, nothing says how far it turns about that: then it does not
    size = at_rest.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)[..., None, None]
    still = 1e-9 * size * torch.eye(3, dtype=at_rest.dtype)
    left, _, right = torch.linalg.svd(overlap + at_rest + still)
    proper = torch.linalg.det(left @ right)[..., None, None]
    return torch.cat([left[..., :2], left[..., 2:] * proper], dim=-1) @ right
