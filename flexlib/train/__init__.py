"""Training: flow, latents and canonical map together, on the prepared particles.

What is minimised, in nats per particle: half the squared whitened residual, plus ``rigidity x RIGIDITY_NATS`` times
the rigidity energy (volume-weighted mean squared strain), plus a unit normal prior on latents that are kept at zero
mean and unit covariance, so that its strength needs no tuning. Per mini-batch

* the flow takes an Adam step, its rigidity sampled on a few of the batch's latents;
* the map takes a preconditioned Newton step (``canonical.py``);
* each latent takes a damped Gauss-Newton step with its own Fisher information, refreshed every few epochs by K
  forward derivatives at half the box;
* the flow's mean rigid-body motion is taken out, so that the canonical map stays in the consensus' frame.

Once the full band is in use, and again at the end, other local minima of every particle's objective are looked for.

Every random number is drawn from (seed, epoch, batch), so a run that is killed and restarted from its checkpoint
continues as if nothing had happened.
"""

from flexlib.distributed import EXIT_INTERRUPTED
from flexlib.train.run import train

__all__ = ["EXIT_INTERRUPTED", "train"]
