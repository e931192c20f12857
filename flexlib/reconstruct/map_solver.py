"""The map as a linear least-squares problem: flow and latents fixed, one half-set at a time.

The objective (see ``normal_equations``) is quadratic. L-BFGS with an exact line search on a quadratic takes the same
steps as preconditioned conjugate gradients started with the same matrix (L. Nazareth, SIAM J. Numer. Anal. 16, 794
(1979)), so that is what is computed: one projection and one adjoint per image and iteration, no history to store, and
*the images themselves are read only once*, for the right-hand side. The preconditioner is the Hessian of particles at
rest, a convolution (``at_rest``); where they are at rest, no view is gone through after the first pass. The start is
zero, so nothing is shared between the half-sets but the mask, the flow and the latents. By hand:
``scipy.sparse.linalg.cg`` was considered, but it works on one process' arrays in the host's memory, and with a
preconditioner that does not change. Density is assumed to lie inside the mask: what lies outside is not modelled.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.images.batch import ImageSource
from flexlib.model.forward import Operator
from flexlib.projection.op import scatter_volume
from flexlib.reconstruct.normal_equations import Displacements, NormalEquations, accumulate_normal_equations

logger = logging.getLogger(__name__)

TOLERANCE = 2e-3  # of the preconditioned gradient's norm at zero
REFRESH = 10  # iterations between gradients computed anew, against the drift of the recursion


@dataclass(frozen=True)
class SolverSettings:
    """When to stop, and what memory may be used."""

    max_iterations: int = 20
    tolerance: float = TOLERANCE  # that the preconditioned gradient has to fall to, in parts of its start
    batch_size: int | None = None  # images at a time (None: by memory); the result depends on it by rounding only
    keep_views: bool = False  # keep the squared transfer functions and moved vertices of all particles in memory


@dataclass
class Convergence:
    """The course of one solution; entry 0 is the start (zero map)."""

    objective: list[float] = field(default_factory=list)  # nats, prior included
    relative_gradient: list[float] = field(default_factory=list)  # preconditioned norm over that of the start
    converged: bool = False

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return len(self.objective) - 1


@torch.no_grad()
def solve_map(
    source: ImageSource,
    rows: np.ndarray,
    operator: Operator,
    displacements: Displacements | None = None,
    mask_values: torch.Tensor | np.ndarray | None = None,
    settings: SolverSettings = SolverSettings(),
    label: str = "map",
    ranks: Ranks = ALONE,
) -> tuple[torch.Tensor, Convergence]:
    """The least-squares map of the particles at ``rows``, each moved by its own displacements.

    Parameters
    ----------
    source
        Images at the box of ``operator``.
    rows
        (n,) int64 rows of ``source``.
    operator
        What projects the map; the voxels are those that it has.
    displacements
        rows (b,) -> (b, nv, 3) Angstrom; None: all particles are at rest.
    mask_values
        (nvox,) soft mask at the voxels, in (0, 1]; None for 1.
    settings
        When to stop, and what memory may be used.
    label
        Of the map, for the log.
    ranks
        That share the particles; all call this with the same ``rows``.

    Returns
    -------
    volume
        (N, N, N) float32 on the operator's device, zero outside the voxels.
    convergence
        The objective and gradient of each iteration; not converged where ``settings.max_iterations`` were too few.
    """
    start = time.perf_counter()
    equations = accumulate_normal_equations(
        source, rows, operator, displacements, mask_values, settings.batch_size, settings.keep_views, ranks
    )
    logger.info("%s: %d particles read in %.1f s", label, len(rows), time.perf_counter() - start)
    x, convergence = conjugate_gradients(equations, settings.max_iterations, settings.tolerance, label)
    return scatter_volume(equations.density(x), operator.voxels), convergence


def conjugate_gradients(
    equations: NormalEquations, max_iterations: int, tolerance: float, label: str = "map"
) -> tuple[torch.Tensor, Convergence]:
    """Minimise ``1/2 x.Hx - data.x + energy`` from zero: L-BFGS with exact line search (see the module's head).

    Returns
    -------
    x
        (nvox,) float64.
    convergence
        The course.
    """
    x = torch.zeros_like(equations.data)
    gradient = -equations.data
    scaled = equations.precondition(gradient)
    size = first_size = float(gradient @ scaled)
    convergence = Convergence([equations.energy], [1.0 if first_size > 0 else 0.0], first_size <= 0)
    direction = -scaled
    while not convergence.converged and convergence.iterations < max_iterations:
        start = time.perf_counter()
        curved = equations.hessian(direction)
        step = -float(gradient @ direction) / float(direction @ curved)
        x += step * direction
        if (convergence.iterations + 1) % REFRESH:
            new_gradient = gradient + step * curved
        else:
            new_gradient = equations.hessian(x) - equations.data
        scaled = equations.precondition(new_gradient)
        # Polak-Ribiere: equal to Fletcher-Reeves where the preconditioner is linear and arithmetic exact, which neither
        # is, and forgets a direction that was spoiled
        beta = max(0.0, float((new_gradient - gradient) @ scaled) / size)
        gradient, size = new_gradient, float(new_gradient @ scaled)
        direction = beta * direction - scaled
        convergence.objective.append(equations.energy + 0.5 * float(x @ (gradient - equations.data)))
        convergence.relative_gradient.append((size / first_size) ** 0.5)
        convergence.converged = equations.ranks.any(convergence.relative_gradient[-1] <= tolerance)
        logger.info(
            "%s: iteration %d, objective %.6g, relative gradient %.2e, %.1f s",
            label,
            convergence.iterations,
            convergence.objective[-1],
            convergence.relative_gradient[-1],
            time.perf_counter() - start,
        )
    return x, convergence
