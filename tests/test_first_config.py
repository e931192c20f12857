"""flex-init on simulated particles of known truth: what it proposes, warns of, refuses, and draws."""

import re
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import yaml
from particle_files import cs_records, save_cs, write_relion_star, write_stacks
from run_snakemake import snakemake
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.first_config.command import main
from flexlib.first_config.config_text import shown_path
from flexlib.first_config.facts import particle_facts, particle_warnings, view_coverage
from flexlib.first_config.find import find_half_maps, find_symmetry
from flexlib.first_config.molecule import compare_half_maps, look_at_mask, molecule_warnings
from flexlib.first_config.proposals import propose_cells, propose_train_box, smooth_even
from flexlib.first_config.survey import default_name
from flexlib.images.stack import open_stacks
from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.maps import read_map, write_map
from flexlib.particles import read_particles
from flexlib.prepare import prepare_particles
from flexlib.simulate import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.checks import check_config, check_maps, check_paths
from flexlib.workflow_support.settings import MaskSettings

COUNT, BOX, PIXEL_SIZE_A = 240, 48, 5.0


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """Folder of an antibody's particles with their consensus and truth."""
    folder = tmp_path_factory.mktemp("project") / "Refine3D"
    simulate_particles(folder, Simulation(num_particles=COUNT, box=BOX, pixel_size_A=PIXEL_SIZE_A, snr=0.3))
    return folder


@pytest.fixture
def project(simulated, tmp_path, monkeypatch) -> Path:
    """A working folder with a copy of the simulated files in Refine3D/."""
    shutil.copytree(simulated, tmp_path / "Refine3D")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(capsys, *arguments) -> tuple[int, str, list[str]]:
    """Exit status, standard output and the lines of standard error."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


def ball(box, radius, centre=(0.0, 0.0, 0.0)):
    """(N, N, N) bool."""
    axes = np.meshgrid(*[np.arange(box) - box // 2] * 3, indexing="ij")
    return sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True)) < radius**2


# the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["star", "cs"])
def test_the_config_is_valid_complete_and_explained(project, capsys, suffix):
    status, text, told = init(capsys, f"Refine3D/particles.{suffix}", "Refine3D/consensus.mrc")
    assert status == 0
    config = yaml.safe_load(text)
    complete = check_config(config)
    check_paths(complete)
    check_maps(complete)
    assert config == {
        "name": "Refine3D_particles",
        "particles": f"Refine3D/particles.{suffix}",
        "consensus": "Refine3D/consensus.mrc",
        "prepare": {"train_box": BOX, "symmetry": "C1"},
        "mesh": {"cells": config["mesh"]["cells"], "threshold": "auto"},
        "train": {"latent_dims": 2, "rigidity": [0.5, 2.0, 8.0]},
    }
    assert 12 <= config["mesh"]["cells"] <= 24, "10 to 20 A of 240"
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.search(r"\S +# \w", line), line
    half_set = np.load(project / "Refine3D/truth.npz")["half"]
    assert f"half-sets of {(half_set == 1).sum()} and {(half_set == 2).sum()}" in text
    assert "300 kV, Cs 2.7 mm, amplitude contrast 0.07" in text and "defocus 0.8" in text
    assert "# - only 240 particles" in text and any(line.startswith("WARNING only 240 particles") for line in told)
    assert told[-2:] == ["Then run", next(line[2:] for line in text.splitlines() if "--configfile" in line)]
    with (project / "Refine3D_particles_mask.png").open("rb") as file:
        header = file.read(24)
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20]) > 1000 and int.from_bytes(header[20:24]) > 700
    assert any("Refine3D_particles_mask.png" in line for line in told)


def test_the_next_command_accepts_it(project, capsys):
    status, text, _ = init(capsys, "Refine3D/particles.star", "Refine3D/consensus.mrc", "--quick", "--name", "first")
    assert status == 0
    Path("my.yaml").write_text(text)
    result = snakemake(project, "--configfile", "my.yaml", "--cores", "2", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^train +3$", result.stdout, re.MULTILINE)


def test_cryosparc_files_with_passthrough_and_mask(project, capsys):
    table = np.load("Refine3D/particles.cs")
    here = [name for name in table.dtype.names if not name.startswith("ctf/")]
    save_cs(Path("Refine3D/J1_particles.cs"), table[here])
    passthrough = save_cs(Path("Refine3D/pass.cs"), table[["uid", *(n for n in table.dtype.names if n[:4] == "ctf/")]])
    mean = read_map("Refine3D/truth_mean.mrc").data
    write_map("Refine3D/mask.mrc", (lowpass_map(mean, PIXEL_SIZE_A, 30.0) > 0.02 * mean.max()), PIXEL_SIZE_A)
    arguments = ("Refine3D/J1_particles.cs", "Refine3D/consensus.mrc", "Refine3D/mask.mrc", "--quick")
    status, text, told = init(capsys, *arguments)
    assert status == 1 and text == "" and "is missing (is it in a passthrough file?)" in told[0]
    status, text, told = init(capsys, *arguments, "--passthrough", passthrough, "--picture", "out/m.png")
    assert status == 0, told
    config = yaml.safe_load(text)
    assert config["passthrough"] == "Refine3D/pass.cs" and config["mask"] == "Refine3D/mask.mrc"
    assert "threshold" not in config["mesh"] and Path("out/m.png").is_file() and config["name"] == "J1_particles"


def test_paths_are_short_where_they_can_be_and_quoted_where_they_must(project, capsys, monkeypatch):
    Path("Refine3D").rename("it's: #2")
    status, text, _ = init(capsys, "it's: #2/particles.star", "it's: #2/consensus.mrc", "--quick")
    assert status == 0 and yaml.safe_load(text)["particles"] == "it's: #2/particles.star"
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    status, text, _ = init(capsys, "../it's: #2/particles.star", "../it's: #2/consensus.mrc", "--quick")
    assert status == 0
    check_paths(check_config(yaml.safe_load(text)))
    assert yaml.safe_load(text)["particles"].startswith("/")
    assert shown_path(Path("a/b")) == "a/b"


def test_images_are_found_where_the_paths_do_not_lead(project, capsys):
    """The metadata were copied away from the folder that their paths start in."""
    Path("data/deep").mkdir(parents=True)
    shutil.move("Refine3D/particles.mrcs", "data/deep/particles.mrcs")
    for arguments in ([], ["--image-root", "data"]):
        status, text, told = init(capsys, "Refine3D/particles.star", "Refine3D/consensus.mrc", "--quick", *arguments)
        assert status == 1 and text == "" and "image stack not found" in told[0]
    shutil.move("data/deep/particles.mrcs", "data/particles.mrcs")
    status, text, _ = init(capsys, "Refine3D/particles.star", "Refine3D/consensus.mrc", "--quick")
    assert status == 0 and yaml.safe_load(text)["image_root"] == "data"
    status, text, _ = init(
        capsys, "Refine3D/particles.star", "Refine3D/consensus.mrc", "--quick", "--image-root", "data"
    )
    assert status == 0 and yaml.safe_load(text)["image_root"] == "data"


# refusals -------------------------------------------------------------------------------------------------------


def spoil_text(path, pattern, new):
    content, count = re.subn(pattern, new, Path(path).read_text())
    assert count
    Path(path).write_text(content)


def cut(path, count):
    Path(path).write_bytes(Path(path).read_bytes()[:-count])


def other_poses(path):
    table = np.load(path)
    table["alignments3D/pose"] = Rotation.random(len(table), rng=np.random.default_rng(8)).as_rotvec()
    table["alignments3D/shift"] += 9
    save_cs(Path(path), table)


def write_volume(path, shape, voxel_A, value=1.0):
    with mrcfile.new(path, np.full(shape, value, np.float32), overwrite=True) as file:
        file.set_volume()
        file.voxel_size = voxel_A


STAR, CS, MAP, MASK, STACK = (
    f"Refine3D/{name}" for name in ("particles.star", "particles.cs", "consensus.mrc", "mask.mrc", "particles.mrcs")
)
REFUSED = {
    "no such particles": (lambda: Path(STAR).unlink(), STAR, None, "particle file not found"),
    "no poses": (lambda: spoil_text(STAR, "_rlnAngleTilt", "_someTilt"), STAR, None, "column rlnAngleTilt is missing"),
    "not a number": (lambda: spoil_text(STAR, r"(\n000003@\S+\s+\S+\s+)\S+", r"\1oops"), STAR, None, "row 3, "),
    "no stack": (lambda: Path(STACK).unlink(), STAR, None, "row 1, column rlnImageName: image stack not found: "),
    "short stack": (lambda: cut(STACK, 1), CS, None, "row 1, column blob/path: .*truncated"),
    "other box": (lambda: spoil_text(STAR, rf"\s{BOX}\s2\n", " 50 2\n"), STAR, None, "column rlnImageSize: 50 px"),
    "no map": (lambda: Path(MAP).unlink(), STAR, None, "not a readable MRC map"),
    "flat map": (lambda: write_volume(MAP, (4, 8, 8), 5.0), STAR, None, "a cubic map is needed"),
    "other voxels": (lambda: write_volume(MAP, (BOX,) * 3, 6.0), STAR, None, "48 voxels of 6 A, but the images have"),
    "empty map": (lambda: write_volume(MAP, (BOX,) * 3, 5.0, 0.0), STAR, None, "above the threshold"),
    "no mask": (lambda: write_volume(MASK, (BOX,) * 3, 5.0, 7.0), STAR, MASK, "a mask has values from 0 to 1, not 7"),
    "other poses": (lambda: other_poses(CS), CS, None, "do not match projections of the consensus"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_prepare_refuses_is_refused_in_its_words(project, capsys, case):
    spoil, particles, mask, message = REFUSED[case]
    spoil()
    before = sorted(project.rglob("*"))
    status, text, told = init(capsys, particles, MAP, *([mask] if mask else []))
    assert status == 1 and text == "" and len(told) == 1
    assert sorted(project.rglob("*")) == before, "no picture"
    with pytest.raises(InputError, match=message) as refusal:
        prepare_particles(particles, MAP, "out", mask=mask)
    assert told == [f"ERROR {refusal.value}"]


def test_what_the_workflow_refuses_is_refused_in_its_words(project, capsys):
    write_volume(MASK, (64,) * 3, 5.0)
    status, text, told = init(capsys, STAR, MAP, MASK)
    assert status == 1 and text == "" and len(told) == 1
    with pytest.raises(InputError, match="make the mask in the consensus' box") as refusal:
        check_maps({"consensus": MAP, "mask": MASK})
    assert told == [f"ERROR {refusal.value}"]
    status, text, told = init(capsys, STAR, MAP, "--name", "two words", "--quick")
    assert status == 1 and text == "" and told[0].startswith("ERROR config: name: 'two words' is not understood")
    status, text, told = init(capsys, STAR, MAP, "--half-maps", MAP, "Refine3D/none.mrc", "--quick")
    assert status == 1 and text == "" and "Refine3D/none.mrc: not a readable MRC map" in told[0]


# maps -----------------------------------------------------------------------------------------------------------


def test_the_mask_covers_the_molecule_and_little_else(simulated):
    """Of the noise-free mean over all states, nearly all density is inside a mask of a noisy map of 240 particles."""
    density = read_map(simulated / "consensus.mrc").data
    molecule = look_at_mask(density, PIXEL_SIZE_A, None, MaskSettings())
    truth = read_map(simulated / "truth_mean.mrc").data
    truth = np.where(truth > 0.01 * truth.max(), truth, 0)
    assert molecule.threshold == "auto" and not molecule.at_edge and not molecule.dark
    assert (truth * molecule.mask).sum() > 0.95 * truth.sum()
    assert molecule.box_share < 0.12
    assert molecule.volume_A3 == pytest.approx(molecule.box_share * (BOX * PIXEL_SIZE_A) ** 3)
    assert look_at_mask(-density, PIXEL_SIZE_A, molecule.mask, MaskSettings()).dark


def test_widths_of_an_ellipsoid():
    axes = np.meshgrid(*[np.arange(64) - 32.0] * 3, indexing="ij")
    turned = np.einsum("ij,j...->i...", Rotation.from_rotvec([0.3, 0.5, 0.2]).as_matrix(), np.array(axes))
    inside = sum((axis / radius) ** 2 for axis, radius in zip(turned, (25, 15, 8), strict=True)) < 1
    molecule = look_at_mask(inside.astype(np.float32), 2.0, inside.astype(np.float32), MaskSettings())
    np.testing.assert_allclose(molecule.widths_A, (100, 60, 32), atol=5)


def test_a_level_of_its_own_where_auto_reaches_the_rim():
    """A molecule on a faint slab that runs through the whole box."""
    box, rng = 48, np.random.default_rng(0)
    core = ball(box, 9)
    density = core + 0.0015 * rng.normal(size=core.shape)
    density[20:28] += 0.15
    density = density.astype(np.float32)
    molecule = look_at_mask(density, 4.0, None, MaskSettings())
    assert isinstance(molecule.threshold, float) and molecule.threshold > molecule.auto_level
    assert not molecule.at_edge and (molecule.mask[core] > 0.5).all() and molecule.box_share < 0.1


def test_masks_that_are_tight_or_touch_the_rim_are_told():
    box = 48
    density = lowpass_map(ball(box, 10).astype(np.float32), 4.0, 12.0)
    wide, tight, off = ball(box, 13), ball(box, 7), ball(box, 13, (14, 0, 0))
    told = {
        name: " ".join(
            molecule_warnings(look_at_mask(density, 4.0, mask.astype(np.float32), MaskSettings()), None, 4.0)
        )
        for name, mask in {"wide": wide, "tight": tight, "off": off}.items()
    }
    assert told["wide"] == ""
    assert "tighter than the molecule" in told["tight"] and "rim" not in told["tight"]
    assert "your mask reaches the rim of the box" in told["off"]


@pytest.mark.parametrize("resolution_A", [9.0, 16.0])
def test_half_maps_agree_to_where_they_were_made_to(tmp_path, resolution_A):
    """Signal over noise falls as a Gaussian, to 1/6 at that resolution: there the FSC is 1/7."""
    box, pixel_size_A = 64, 3.0
    rng = np.random.default_rng(1)
    squared = sum(np.meshgrid(*[np.fft.fftfreq(box, pixel_size_A) ** 2] * 3, indexing="ij")) * resolution_A**2
    amplitude = np.sqrt(np.exp(np.log(180) * (1 - squared)) / 6)
    signal = np.fft.ifftn(np.fft.fftn(rng.normal(size=(box,) * 3)) * amplitude).real
    mask = lowpass_map(ball(box, 24).astype(np.float32), pixel_size_A, 20.0)
    paths = (tmp_path / "a.mrc", tmp_path / "b.mrc")
    for path in paths:
        write_map(path, signal + rng.normal(size=signal.shape), pixel_size_A)
    found = compare_half_maps(paths, mask, pixel_size_A)
    assert found.resolution_A == pytest.approx(resolution_A, rel=0.07) and not found.same and not found.to_nyquist
    same = compare_half_maps((paths[0], paths[0]), mask, pixel_size_A)
    assert same.same


def test_half_maps_beside_the_map_are_used(project, capsys):
    rng, density = np.random.default_rng(2), read_map(MAP).data
    shutil.copy(MAP, "Refine3D/run_class001.mrc")
    for half in (1, 2):
        half_map = density + density.std() * rng.normal(size=density.shape)
        write_map(f"Refine3D/run_half{half}_class001_unfil.mrc", half_map, PIXEL_SIZE_A)
    status, text, _ = init(capsys, STAR, "Refine3D/run_class001.mrc", "--quick")
    assert status == 0
    assert re.search(
        r"run_half1_class001_unfil.mrc and run_half2_class001_unfil.mrc,\s+#?\s*found beside the map", text
    )
    assert re.search(r"consensus: .*its half-maps agree to \d+\.\d+ A", text)
    write_volume("Refine3D/run_half1_class001_unfil.mrc", (4, 8, 8), 5.0)
    status, text, told = init(capsys, STAR, "Refine3D/run_class001.mrc", "--quick")
    assert status == 0 and any("half-maps beside the map are not used: " in line for line in told)


def test_names_of_half_maps(tmp_path):
    def made(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        found = find_half_maps(folder / names[0])
        return found and tuple(path.name for path in found)

    relion = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
    filtered = ("run_it025_half1_class001.mrc", "run_it025_half2_class001.mrc")
    cryosparc = ("J50_005_volume_map_half_A.mrc", "J50_005_volume_map_half_B.mrc")
    assert made("run_class001.mrc", *filtered, *relion) == relion
    assert made("J50_005_volume_map.mrc", *cryosparc) == cryosparc
    older = tuple(name.replace("J50", "J49") for name in cryosparc)
    assert made("J50_005_volume_map.mrc", *older, *cryosparc) == cryosparc
    assert made("run_class001.mrc", relion[0]) is None
    assert made("other.mrc", *relion) is None
    assert find_half_maps(tmp_path / "gone" / "a.mrc") is None


# symmetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "group"),
    [
        ("run_it003_sampling.star", "data_sampling_general\n\n_rlnSymmetryGroup   d2\n_rlnPsiStep 3\n", "D2"),
        ("run_optimiser.star", "# RELION optimiser\n# --o Refine3D/job1/run --sym C4 --low 50\n\ndata_x\n_a 1\n", "C4"),
        (
            "job.star",
            "data_joboptions_values\n\nloop_\n_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\nsym_name I1\ndo_x No\n",
            "I1",
        ),
        ("job.json", '{"params_spec": {"refine_symmetry": {"value": "O"}, "x": {"value": "C3"}}}', "O"),
        ("run_it003_sampling.star", "data_sampling_general\n\n_rlnSymmetryGroup   helical\n", None),
        ("run_it003_sampling.star", "no star at all", None),
    ],
)
def test_symmetry_that_a_job_states(tmp_path, name, content, group):
    (tmp_path / name).write_text(content)
    found = find_symmetry([tmp_path / "nothing", tmp_path])
    assert found == (None if group is None else (group, tmp_path / name))


def test_a_symmetry_that_the_map_has_is_proposed(project, capsys):
    """Told of the refinement's, once for a map that has it and once for one that does not."""
    Path("Refine3D/run_sampling.star").write_text("data_sampling_general\n\n_rlnSymmetryGroup C2\n")
    status, text, told = init(capsys, STAR, MAP, "--quick")
    assert status == 0 and yaml.safe_load(text)["prepare"]["symmetry"] == "C1"
    assert any("run_sampling.star states C2, but C1 is written: " in line for line in told)
    density = read_map(MAP).data
    inner = density[1:, 1:, 1:]  # voxel N//2 is the middle of these
    density[1:, 1:, 1:] = inner + inner[:, ::-1, ::-1]
    write_map(MAP, density, PIXEL_SIZE_A)
    status, text, told = init(capsys, STAR, MAP, "--quick")
    assert status == 0 and yaml.safe_load(text)["prepare"]["symmetry"] == "C2"
    assert any(line.startswith("WARNING symmetry C2: each particle is used in 2 poses") for line in told)


# particles ------------------------------------------------------------------------------------------------------


def changed_star(tmp_path, **changes):
    """Warnings about the twelve particles of tests/particle_files.py after text replacements in their .star."""
    path = write_relion_star(tmp_path / "p.star", halves=True)
    write_stacks(tmp_path)
    for old, new in changes.values():
        spoil_text(path, old, new)
    return "\n".join(particle_warnings(particle_facts(open_stacks(read_particles(path))[1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((" 1.2000", " 1.2000"), "only 12 particles"),
        ((r"e\+04 11000.5", "e+01 11.5"), "defocus, A: 11.75"),
        (("300.000000", "300000.0"), "voltage, kV: 300000 to 300000 is unusual"),
        (("0.100000", "10.0"), "amplitude contrast: 10 to 10 is unusual"),
        (("Extract/job1/b.mrcs", "Extract/job1/a.mrcs"), "each image stands in 2 rows on average"),
        (("000006@Extract/job1/b.mrcs", "000005@Extract/job1/b.mrcs"), "1 rows show an image that another row shows"),
    ],
)
def test_suspicious_metadata_are_told(tmp_path, change, message):
    assert message in changed_star(tmp_path, a=change)


def test_poses_that_were_never_refined_are_told(tmp_path):
    write_stacks(tmp_path, "mrc")
    records = np.tile(cs_records(), 50)
    records["uid"] = np.arange(len(records))
    rng = np.random.default_rng(0)

    def told(pose, shift=1.0):
        records["alignments3D/pose"], records["alignments3D/shift"] = pose, shift
        path = save_cs(tmp_path / "p.cs", records)
        return "\n".join(particle_warnings(particle_facts(open_stacks(read_particles(path))[1])))

    refined = Rotation.random(len(records), rng=rng).as_rotvec()
    assert "poses" not in told(refined) and "views" not in told(refined) and "shifts" not in told(refined)
    assert "600 of 600 poses are exactly zero: these particles were never aligned" in told(0.0)
    assert "all shifts are exactly zero" in told(refined, 0.0)
    assert "views come from 12 directions only" in told(np.tile(refined[:12], (50, 1)))
    top = Rotation.from_rotvec(rng.normal(scale=0.1, size=(len(records), 3))).as_rotvec()
    assert "views are uneven" in told(top)


def test_coverage_of_known_views():
    rng = np.random.default_rng(0)
    even = rng.normal(size=(5000, 3))
    even /= np.linalg.norm(even, axis=1, keepdims=True)
    angle = rng.uniform(0, 2 * np.pi, 5000)
    side = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    assert view_coverage(even) == pytest.approx(1.0, abs=0.03)
    assert 0.6 < view_coverage(side) < 0.9
    assert view_coverage(np.tile([0.0, 0.0, 1.0], (100, 1))) < 0.05


def test_half_sets_that_are_drawn_or_uneven(project, capsys):
    content = Path(STAR).read_text()
    Path(STAR).write_text(content.replace("_rlnRandomSubset", "_someSubset"))
    status, text, told = init(capsys, STAR, MAP, "--quick")
    assert status == 0 and "half-sets are drawn at random" in text
    assert any("split at random into two halves" in line for line in told)


# rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full_box", "pixel_size_A", "resolution_A", "box", "nyquist_A"),
    [
        (320, 1.1, None, 120, 5.87),  # 6 A
        (320, 1.1, 3.2, 120, 5.87),  # good half-maps allow more, motion does not need it
        (320, 1.1, 8.0, 90, 7.82),  # poor ones limit it
        (320, 1.1, 30.0, 72, 9.78),  # but not beyond 10 A
        (64, 4.0, 8.0, 64, 8.0),  # the images' own
        (100, 3.2, None, 100, 6.4),
        (110, 3.2, None, 110, 6.4),  # never larger than the images
        (800, 1.2, None, 256, 7.5),  # never larger than 256
        (280, 3.0, None, 256, 6.56),
        (40, 2.0, None, 32, 5.0),
    ],
)
def test_train_box(full_box, pixel_size_A, resolution_A, box, nyquist_A):
    found = propose_train_box(full_box, pixel_size_A, resolution_A)
    assert found.box == box and found.box % 2 == 0
    assert found.nyquist_A == pytest.approx(nyquist_A, abs=0.01)


def test_even_numbers_of_small_factors():
    assert [smooth_even(number) for number in (31, 32, 33, 98, 102, 122, 130, 242)] == [
        32, 32, 36, 100, 108, 128, 144, 250,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extent_A", "longest_A", "pixel_size_A", "count"),
    [
        (256.0, 192.0, 4.0, 16),  # twelve along 192 A: 16 A each
        (150.0, 70.0, 3.0, 15),  # no smaller than 10 A
        (543.0, 400.0, 4.25, 28),  # no larger than 20 A
        (400.0, 100.0, 3.0, 40),
        (240.0, 100.0, 12.0, 10),  # two pixels
        (900.0, 100.0, 3.5, 40),  # no more than 40
    ],
)
def test_cells(extent_A, longest_A, pixel_size_A, count):
    cells = propose_cells(extent_A, longest_A, pixel_size_A)
    assert cells.count == count and cells.cell_A == pytest.approx(extent_A / count)


def test_names():
    assert default_name(Path("Refine3D/job042/run_data.star")) == "job042_run_data"
    assert default_name(Path("J50/J50_005_particles.cs")) == "J50_005_particles"
    assert default_name(Path("a/my set (2).star")) == "my_set_2_"
    assert default_name(Path("a/...star")) == "my_complex"
