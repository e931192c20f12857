"""What is simulated: the phantom, the microscope, the noise."""

from __future__ import annotations

from dataclasses import dataclass

from flexlib.workflow_support.simulate_settings import SimulateSettings


@dataclass(frozen=True)
class Simulation(SimulateSettings):
    """``simulate:`` of the config, and what tests and benchmarks vary besides.

    ``snr`` is the variance of the CTF-modulated signal over that of the noise, over the whole box; noise has unit
    variance.
    """

    defocus_range_A: tuple[float, float] = (8000.0, 25000.0)  # the mean defocus is uniform in it, underfocus positive
    astigmatism_sd_A: float = 300.0
    voltage_kV: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.07
    shift_sd_A: float = 4.0  # of the origins along x and y
    view_preference: float = 0.0  # views are distributed as 1 + view_preference * cos(tilt)^2; 0 is uniform
    noise_power_law: float = 0.0  # noise power falls as |k|^-noise_power_law; 0 is white
    gaussian_sigma_A: float = 1.6  # of a pseudo-atom: a B-factor of 200 A^2
    exact_limit: bool = False  # find the best possible estimate too (one hinge and white noise only; half a minute)
