"""Whether what the metadata say of microscope and defocus can be: values in other units pass for fits that are poor."""

from __future__ import annotations

import numpy as np

from flexlib.particles.table import Particles

# Outside these, a value is most likely in another unit or column
_PLAUSIBLE = {
    "defocus, A": (500.0, 80_000.0),
    "voltage, kV": (60.0, 400.0),
    "spherical aberration, mm": (0.0, 8.0),
    "amplitude contrast": (0.0, 0.5),
    "pixel size, A": (0.2, 20.0),
}
_MEDIAN_DEFOCUS_A = 3000.0  # nearer to focus images show nothing, but with a phase plate:
_PHASE_PLATE_RAD = 0.5  # its shift, of the median particle at least


def implausible_values(particles: Particles) -> list[str]:
    """A sentence for each quantity of which some value is most likely wrong."""
    used = [particles.optics[group] for group in np.unique(particles.optics_index)]
    defocus_A = 0.5 * (particles.defocus_u_A + particles.defocus_v_A)
    found = {
        "defocus, A": defocus_A,
        "voltage, kV": [group.voltage_kV for group in used],
        "spherical aberration, mm": [group.spherical_aberration_mm for group in used],
        "amplitude contrast": [group.amplitude_contrast for group in used],
        "pixel size, A": [group.pixel_size_A for group in used],
    }
    sentences = [
        f"{name}: {np.min(values):g} to {np.max(values):g} is unusual: another unit or column?"
        for name, values in found.items()
        if np.min(values) < _PLAUSIBLE[name][0] or np.max(values) > _PLAUSIBLE[name][1]
    ]
    shown_in_nm = _PLAUSIBLE["defocus, A"][0], _MEDIAN_DEFOCUS_A
    median_A, shift_rad = np.median(defocus_A), np.median(np.abs(particles.phase_shift_rad))
    if shown_in_nm[0] <= median_A < shown_in_nm[1] and shift_rad < _PHASE_PLATE_RAD:
        sentences.append(f"defocus, A: a median of {median_A:g} is unusual without a phase plate: is it in nanometres?")
    return sentences
