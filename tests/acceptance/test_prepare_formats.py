"""prepare gives the same from RELION's and CryoSPARC's files of the same particles (`pytest --data DIR`)."""

import numpy as np
import pytest
import torch

from flexlib.files import read_json
from flexlib.images.sources import open_full_images, open_training_images
from flexlib.prepare.run import prepare_particles
from flexlib.workflow_support.settings import PrepareSettings


@pytest.fixture(scope="module")
def prepared(igg, tmp_path_factory):
    """Folders prepared from particles.star and particles.cs of the flexible IgG set, cropped and resampled."""
    folders = []
    for name in ("particles.star", "particles.cs"):
        out = tmp_path_factory.mktemp(name)
        settings = PrepareSettings(crop_box=60, train_box=48)
        prepare_particles(igg / name, igg / "consensus.mrc", out, settings=settings)
        folders.append(out)
    return folders


@pytest.mark.parametrize("open_images", [open_training_images, open_full_images])
def test_both_formats_give_the_same_images(prepared, open_images):
    star, cs = (open_images(folder) for folder in prepared)
    assert len(star) == len(cs) == 4000
    np.testing.assert_array_equal(star.half_set, cs.half_set)
    for rows in np.array_split(np.arange(len(star)), 8):
        one, other = star.batch(rows), cs.batch(rows)
        torch.testing.assert_close(one.images, other.images, atol=2e-4, rtol=0)
        torch.testing.assert_close(one.transfer, other.transfer, atol=2e-4 * float(one.transfer.abs().max()), rtol=0)
        torch.testing.assert_close(one.rotation, other.rotation, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.origin_px, other.origin_px, atol=1e-4, rtol=0)


def test_both_formats_have_the_same_scale(prepared):
    star, cs = (read_json(folder / "prepared.json")["optics_groups"] for folder in prepared)
    scales = [[group["image_scale"] for group in groups] for groups in (star, cs)]
    np.testing.assert_allclose(scales[0], scales[1], rtol=1e-4)
