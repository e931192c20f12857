"""The JSON records that stages leave for each other, with values that a test does not care about."""

from flexlib.records import AgreementRecord, PreparedRecord, ResolutionRecord, ValidationRecord


def prepared_record(num_rows: int, crop_box: int, train_box: int) -> PreparedRecord:
    """Of particles without symmetry."""
    return PreparedRecord(
        particles="/data/p.star",
        passthrough=None,
        image_root=None,
        consensus="/data/c.mrc",
        mask=None,
        num_input=num_rows,
        num_particles=num_rows,
        symmetry="C1",
        symmetry_copies=1,
        num_rows=num_rows,
        half_sets="input",
        full_box=crop_box,
        full_pixel_size_A=1.0,
        crop_box=crop_box,
        train_box=train_box,
        train_pixel_size_A=crop_box / train_box,
        optics_groups=[],
    )


def validation_record(gain: float | None, gain_se: float | None, wall_s: float) -> ValidationRecord:
    """Of a training with this score."""
    return ValidationRecord(
        validation_gain=gain,
        validation_gain_se=gain_se,
        validation_particles=3,
        rejected_gain=None,
        rejected_gain_se=None,
        suggested_dims=2,
        rms_displacement_A=3.0,
        rms_displacement_per_unit_A=[2.0, 1.0],
        motion_share=[0.7, 0.3],
        mean_strain=0.1,
        epochs=5,
        band_shell=12.0,
        num_particles=100,
        num_voxels=1000,
        num_vertices=50,
        num_cells=200,
        wall_s=wall_s,
    )


def resolution_record(resolutions_A: dict[str, float]) -> ResolutionRecord:
    """Of half-maps with these resolutions, by model and threshold."""
    return ResolutionRecord(
        resolutions_A=resolutions_A,
        moving_rms_displacement={"largest_A": 5.0, "threshold_A": 1.0},
        flex_b_factor_A2=None,
        flex_local_A={},
        converged={"flex_half1": True, "flex_half2": True},
    )


def agreement_record(gain: float | None, gain_se: float | None, count: int) -> AgreementRecord:
    """Of a validation with this cross score."""
    return AgreementRecord(
        cross_gain=gain,
        cross_gain_se=gain_se,
        cross_particles=count,
        resolutions_A={"independent_0.143": 5.5, "independent_moving_0.143": 7.0, "independent_0.5": 8.0},
        motion_error_A=1.0,
        motion_size_A=6.0,
        moving_error_A=1.5,
        moving_size_A=9.0,
        at_rest=[False, False],
        num_modes_agreeing=12,
        mode_limit_A=40.0,
        latent_coverage=[0.68, 0.66],
        std_err_factor=[1.0, 1.05],
        rest_shape_A=0.4,
        converged={"independent_half1": True, "independent_half2": True},
        wall_s=20.0,
        device="cpu",
    )
