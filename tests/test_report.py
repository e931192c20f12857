"""The report: one file, complete, safe, and alive in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_results import CONFIG, NASTY, POINT, finished_report, write_fake_results
from PIL import Image

import flexlib
from flexlib.layout import RunFolder
from flexlib.model.flex_model import FlexModel, FlowGenerator
from flexlib.model.frame import MotionFrame
from flexlib.model.motion import rms_displacement_A
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.records import ChecksumsRecord, InputFile, PreparedRecord, ResolutionRecord, ValidationRecord
from flexlib.render.surface import Surface, isosurface, quarter_turn
from flexlib.report import facts, morph, sections, sentences, sweep_plots, write_report, write_summary_figure
from flexlib.report.facts import neighbour_r2
from flexlib.report.morph import Gallery
from flexlib.report.packing import pack_column, pack_rows
from flexlib.report.pictures import cell_sections
from flexlib.report.results import Results
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.scores import SIGNIFICANT_ERRORS, SIGNIFICANT_NATS
from flexlib.workflow_support.settings import Align

SECTIONS = (
    *("input", "mesh", "sweep", "training", "latents", "landscape", "explore", "motion", "bodies"),
    *("resolution", "independent", "settings"),
)
NOTHING = Gallery([], None, [])


class _Page(HTMLParser):
    """Collects ids, everything that would load from outside, and the JSON of each plot."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.json: dict[str, dict] = {}
        self.text: list[str] = []
        self.vertical = ""  # the second axis of the latent plot
        self._list = ""
        self._block: str | None = None
        self._script = False

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "select":
            self._list = values.get("id") or ""
        elif tag == "option" and self._list == "latent-y" and "selected" in values:
            self.vertical = values["value"] or ""
        for key in ("src", "href", "srcset", "poster", "data"):
            target = values.get(key) or ""
            if target and not target.startswith(("data:", "#")) and tag != "a":  # a link loads nothing
                self.loads.append(f"{tag} {key}={target[:80]}")
        self._script = tag in ("script", "style")
        self._block = values.get("id") if values.get("type") == "application/json" else None

    def handle_endtag(self, tag):
        self._script, self._block = False, None

    def handle_data(self, data):
        if self._block:
            self.json[self._block] = json.loads(data)
        elif not self._script:
            self.text.append(data)


def unpack(column: dict) -> np.ndarray:
    """The numbers of a packed column, as page.js reads them."""
    codes = np.frombuffer(base64.b64decode(column["data"]), "<u2" if column["bits"] == 16 else "u1").astype(float)
    last = 2 ** column["bits"] - 1
    values = column["low"] + codes / (last - 1) * (column["high"] - column["low"])
    return np.where(codes == last, np.nan, values)


def _parse(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def change_scores(root: Path, **scores: float) -> None:
    """Write other scores into the chosen sweep point's validation record."""
    path = Results(root, CONFIG).train_folder.validation
    replace(ValidationRecord.read(path), **scores).write(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_report(tmp_path_factory.getbasetemp())


def test_report_is_one_small_file_that_loads_nothing(results: Path) -> None:
    page = _parse(results / "report.html")
    assert page.loads == []
    css = "".join(re.findall(r"<style>(.*?)</style>", (results / "report.html").read_text(), re.S))
    assert "url(" not in css and "@import" not in css
    assert (results / "report.html").stat().st_size < 15e6


def test_report_has_all_sections_and_plots(results: Path) -> None:
    page, html = _parse(results / "report.html"), (results / "report.html").read_text()
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    for name in ("mesh-view", "sweep-gains", "spectrum", "latent-scatter", "morph-axis_1", "morph-axis_2", "fsc"):
        assert page.json[f"{name}-data"]["data"], name
    for title in ("axis 1", "axis 2"):
        assert all(f'alt="{kind} along {title}"' in html for kind in ("Morph", "Frames", "Projections"))
    text = " ".join(page.text)
    assert "1,500" in text and "30.1 ± 1.2" in text and "6.3 Å rms" in text
    assert "R² = 0.9" in text  # the fake latents follow the true angles
    drawn = page.json["latent-columns"]
    assert drawn["count"] == drawn["total"] == len(unpack(drawn["columns"]["z1"])) < 1500


def test_inputs_are_shown_and_the_record_of_the_run_is_linked(results: Path, tmp_path: Path) -> None:
    html = sections.settings_section(Results(results, CONFIG))
    assert '<a href="ro-crate-metadata.json">' in html
    assert f"<td>input.star</td><td>particles</td><td>1.235 MB</td><td>{'ab' * 32}</td>" in html
    assert "<td>stacks/big.mrcs</td><td>images</td><td>9.877 GB</td><td>not taken</td>" in html
    many = [InputFile(f"{number}.mrcs", ["images"], 999, 0, "0") for number in range(100)]
    ChecksumsRecord(many).write(RunFolder(tmp_path).checksums)
    html = sections.settings_section(Results(tmp_path, CONFIG))
    assert "<summary>All 100 input files</summary>" in html and html.count("<td>0.mrcs</td>") == 2
    RunFolder(tmp_path).checksums.unlink()
    html = sections.settings_section(Results(tmp_path, CONFIG))
    assert "No checksums of the input files were taken." in html and "href" not in html


def test_the_health_check_comes_first(results: Path) -> None:
    html = sections.input_section(Results(results, CONFIG))
    assert "<li>All images match.</li>" in html
    assert '<li class="warning">9 images are left out.</li>' in html
    assert 'alt="Noise spectra of the optics groups"' in html


def test_user_text_is_escaped(results: Path) -> None:
    html = (results / "report.html").read_text()
    assert NASTY not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; co" in html


def test_truth_follows_the_rows_of_the_input(results: Path) -> None:
    columns = {
        name: unpack(one) for name, one in _parse(results / "report.html").json["latent-columns"]["columns"].items()
    }
    assert np.corrcoef(columns["z1"], columns["True angle 1 (deg)"])[0, 1] > 0.9
    assert set(columns["Half-set"]) == {1.0, 2.0}


def test_resolution_in_the_table_is_the_crossing(results: Path) -> None:
    fsc = np.genfromtxt(Results(results, CONFIG).reconstruct_folder.fsc, delimiter=",", names=True)
    first = int(np.flatnonzero(fsc["fsc_flex_corrected"] < 0.143)[0])
    ends_A = 1 / fsc["frequency_1_per_A"][[first, first - 1]]
    row = re.search(r"<td>corrected</td><td>([\d.]+) Å</td><td>([\d.]+) Å", (results / "report.html").read_text())
    assert row and ends_A[0] - 0.1 <= float(row[2]) <= ends_A[1] + 0.1
    assert float(row[2]) < float(row[1])


def test_choice_is_reported_with_the_errors_of_differences(results: Path, tmp_path: Path) -> None:
    said = sentences.choice_sentence(Results(results, CONFIG))
    assert "simplest within one standard error" in said and "particle by particle, it gains 0.5 ± 0.7 nats less" in said
    sweep = Results(results, CONFIG).sweep
    assert sweep is not None
    groups = {trace.name: list(trace.y) for trace in sweep_plots.sweep_gains(sweep).data}
    assert groups == {
        "chosen": ["K 2, λ 2"],
        "within one standard error of the best": ["K 3, λ 2"],
        "worse": ["K 3, λ 0.5", "K 2, λ 0.5", "K 1, λ 2", "K 1, λ 0.5"],
    }
    alone = sweep.drop(columns=["difference_to_best", "difference_to_best_se"])
    assert set(facts.gain_errors(alone)) == {1.2} and set(facts.gain_errors(sweep)) == {0.0, 0.7}


def test_heat_map_has_a_panel_for_each_value_of_a_third_setting() -> None:
    points = [(cells, dims, rigidity) for cells in (10, 14, 20) for dims in (1, 2) for rigidity in (0.5, 2.0)]
    sweep = pd.DataFrame(points, columns=["cells", "latent_dims", "rigidity"]).assign(seed=0, chosen=False)
    sweep["validation_gain"] = sweep["cells"] + 10 * sweep["latent_dims"] + 100 * sweep["rigidity"]
    sweep.loc[7, "chosen"] = True  # cells 14, dims 2, rigidity 2
    figure = sweep_plots.sweep_heat_map(sweep)
    assert figure is not None
    *panels, frame = figure.data
    # cells across, dims up, a panel for each rigidity
    assert [np.array(panel.z).tolist() for panel in panels] == [
        [[70.0, 74.0, 80.0], [80.0, 84.0, 90.0]],
        [[220.0, 224.0, 230.0], [230.0, 234.0, 240.0]],
    ]
    assert (list(frame.x), list(frame.y), frame.xaxis) == (["14"], ["2"], "x2")
    assert sweep_plots.sweep_heat_map(sweep.query("rigidity == 2 and cells == 10")) is None


def test_summary_figure(results: Path) -> None:
    with Image.open(results / "summary.png") as picture:
        assert picture.width == 1400 and 0.15 < picture.height / picture.width < 0.6
    assert (results / "summary.png").stat().st_size < 500e3


@pytest.mark.parametrize(
    ("gone", "section", "sentence"),
    [
        ("reconstruct", lambda results: sections.resolution_section(results, NOTHING), "not reconstructed"),
        ("rigid_*", lambda results: sections.resolution_section(results, NOTHING), "Only the flexible map"),
        ("train", sections.latent_section, "no latent coordinates"),
        ("train", sections.training_section, "no training log"),
        ("train", lambda results: sections.motion_section(results, NOTHING), "no trained model"),
        ("generate", lambda results: sections.motion_section(results, NOTHING), "No series of maps was generated"),
        ("mesh", sections.mesh_section, "There is no mesh"),
        ("particles", sections.input_section, "The prepared particles (particles/particles.star) are not there."),
        ("sweep.csv", sections.sweep_section, "no sweep table"),
    ],
)
def test_missing_input_becomes_a_sentence(results: Path, tmp_path: Path, gone: str, section, sentence: str) -> None:
    root = tmp_path / "partial"
    shutil.copytree(results, root, ignore=shutil.ignore_patterns("report.html", gone))
    assert sentence in section(Results(root, CONFIG))


def test_moving_part_and_maps_that_did_not_converge_are_reported(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "results")
    folder = Results(tmp_path / "results", CONFIG).reconstruct_folder
    table = pd.read_csv(folder.fsc)
    table["fsc_flex_moving"] = np.linspace(1.0, 0.0, len(table))
    table.to_csv(folder.fsc, index=False)
    converged = {"flex_half1": True, "flex_half2": True, "rigid_half1": True, "rigid_half2": False}
    replace(ResolutionRecord.read(folder.resolution), converged=converged).write(folder.resolution)
    html = sections.resolution_section(Results(tmp_path / "results", CONFIG), NOTHING)
    assert "Not converged: rigid half 2. Raise reconstruct.max_bfgs_iterations" in html
    half_A = 2 / table["frequency_1_per_A"].max()  # a straight line is at 0.5 in the middle
    assert re.search(rf"<td>corrected, where it moves</td>.*<td>{half_A:.1f}", html)


def test_a_model_set_to_rest_is_reported(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "results")
    change_scores(tmp_path / "results", validation_gain=0.0, validation_gain_se=0.0, rejected_gain=0.123)
    change_scores(tmp_path / "results", rejected_gain_se=0.05)
    text = sentences.verdict(Results(tmp_path / "results", CONFIG))
    assert "No motion was found" in text and "0.123 ± 0.05 nats" in text and "Motion is doubtful" not in text


def test_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    write_report(tmp_path, tmp_path / "report.html", {})
    assert "This run is not complete" in " ".join(_parse(tmp_path / "report.html").text)
    assert not write_summary_figure(tmp_path, tmp_path / "summary.png")


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_latents(tmp_path: Path, dims: int) -> None:
    write_fake_results(tmp_path, box=32, pixel_size_A=7.0, dims=dims, frames=1)
    page = _Page()
    page.feed(sections.latent_section(Results(tmp_path, CONFIG, tmp_path / "truth.npz")))
    assert ("Histogram2d".lower() in json.dumps(page.json["latent-density-data"])) == (dims == 3)
    assert page.json["latent-columns"]["latents"] == [f"z{i + 1}" for i in range(dims)]
    assert page.vertical == ("True angle 1 (deg)" if dims == 1 else "z2")


def test_rendered_view_keeps_the_hand() -> None:
    """x runs right, y up, and what is nearer along +z hides what lies behind."""
    z, y, x = np.indices((32, 32, 32)) - 16

    def ball(cx, cy, cz):
        return np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / 8.0).astype(np.float32)

    picture = Surface(ball(8, 0, 0) + ball(0, 5, 0), 0.5).picture(np.eye(3), extent=16, size_px=64)
    rows, columns = np.nonzero(picture[..., 3] > 128)
    right = columns > 40
    assert right.any() and abs(rows[right].mean() - 31.5) < 1.5
    assert rows[~right].mean() < 25  # up is towards the first row
    paint = (z > 0).astype(np.float32)
    shown = Surface(ball(0, 0, 9) + ball(0, 0, -9), 0.5)
    both = shown.picture(np.eye(3), 16, 64, paint=paint)
    behind = shown.picture(np.diag([1.0, -1, -1]), 16, 64, paint=paint)
    assert both[32, 32, 0] > 1.5 * both[32, 32, 2]  # 1 is painted red,
    assert behind[32, 32, 0] < 1.1 * behind[32, 32, 2]  # 0 is grey
    turned = quarter_turn(np.eye(3)) @ [0, 0, 1.0]
    assert np.allclose(turned, [1, 0, 0])


def test_isosurface_lies_where_the_density_crosses() -> None:
    z, y, x = np.indices((32, 32, 32)) - 16
    density = np.exp(-((x - 4) ** 2 + y**2 + z**2) / 18.0).astype(np.float32)
    vertices, faces = isosurface(density, 2.0, 0.5, max_faces=5000)
    radius_A = np.linalg.norm(vertices - [8.0, 0, 0], axis=1)
    assert np.allclose(radius_A, 2 * np.sqrt(18 * np.log(2)), atol=0.1)
    corner = vertices[faces].astype(float)
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    assert (np.einsum("fi,fi->f", normal, corner.mean(1) - [8.0, 0, 0]) > 0).mean() > 0.99  # they look outwards
    assert len(isosurface(density, 2.0, 0.5, max_faces=200)[1]) <= 200


def test_sections_and_surface_of_a_mesh() -> None:
    from flexlib.mesh.lattice import bcc_mesh
    from flexlib.tetra.tetmesh import boundary_faces

    mask = np.zeros((16, 16, 16), bool)
    mask[4:12, 4:12, 4:12] = True
    mesh = bcc_mesh(mask, 4.0, 16.0)
    faces, _ = boundary_faces(mesh)
    corner = mesh.vertices_A[faces]
    area = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    outward = np.sign(np.einsum("fi,fi->f", area, corner.mean(1) - mesh.vertices_A.mean(0)))
    volume = np.einsum("fi,fi->f", area * outward[:, None], corner[:, 0]).sum() / 6
    assert volume == pytest.approx(mesh.cell_volumes_A3().sum(), rel=0.15)  # a closed, nearly star-shaped surface
    polygons, cells = cell_sections(mesh, axis=2)
    assert len(polygons) == len(cells) > 0
    assert {len(polygon) for polygon in polygons} <= {3, 4}


def test_a_segmented_mesh_is_shown_by_segment() -> None:
    """A table row, a colour and a surface per segment, and a second picture."""
    from types import SimpleNamespace

    from flexlib.mesh.build import mesh_quality
    from flexlib.mesh.lattice import bcc_mesh
    from flexlib.mesh.segments import Segmentation
    from flexlib.report.scenes import mesh_view
    from flexlib.report.sections import mesh_section
    from flexlib.tetra.voxels import voxelise

    mask = np.zeros((16, 16, 16), bool)
    mask[4:12, 4:12, 4:12] = True
    labels = np.where(np.arange(16) < 8, 3, 7) * np.ones((16, 16, 16), int)
    mesh = bcc_mesh(mask, 4.0, 16.0, Segmentation(labels, (3, 7), ()))
    quality = mesh_quality(mesh, voxelise(mesh, mask, 4.0))
    html = mesh_section(SimpleNamespace(mesh=mesh, mesh_quality=quality, consensus=None))
    assert html.count("The segments cut by the central planes") == 1
    assert all(f"<td>{one}</td>" in html for one in (3, 7))
    traces = mesh_view(mesh, None).data
    assert [trace.name for trace in traces] == ["segment 3", "segment 7"]
    assert len({trace.line.color for trace in traces}) == 2
    assert max(traces[0].x[~np.isnan(traces[0].x)]) < max(traces[1].x[~np.isnan(traces[1].x)])


def test_neighbour_score_tells_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 2))
    assert neighbour_r2(z, z[:, 0]) > 0.9
    assert neighbour_r2(z, rng.standard_normal(500)) < 0.1


def test_packed_columns_and_rows_come_back() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.standard_normal(1000), [np.nan, 40.0])
    for bits in (8, 16):
        back = unpack(pack_column(values, bits))
        step = (np.nanmax(values) - np.nanmin(values)) / (2**bits - 2)
        assert np.isnan(back[1000]) and np.nanmax(np.abs(back - values)) <= 0.5001 * step
    assert np.array_equal(unpack(pack_column(np.full(3, 7.0), 8)), [7.0, 7.0, 7.0])
    rows = np.array([0, 1, 1, 5, 260, 515, 516, 100_000])
    row, back = -1, []
    for gap in base64.b64decode(pack_rows(rows)):
        row += gap
        if gap < 255:
            back.append(row)
    assert back == rows.tolist()


@pytest.mark.slow
def test_many_particles_fit_into_the_page(tmp_path: Path) -> None:
    """200,000 particles in the whole page; where they do not fit, as many as do, and the page says so."""
    write_fake_results(tmp_path, box=32, pixel_size_A=7.0, frames=2, num_particles=200_000)
    write_report(tmp_path, tmp_path / "report.html", CONFIG, tmp_path / "truth.npz")
    assert 4e6 < (tmp_path / "report.html").stat().st_size < 15e6
    content = _parse(tmp_path / "report.html").json["latent-columns"]
    assert content["count"] == content["total"] > 170_000
    part = sections.latent_section(Results(tmp_path, CONFIG, tmp_path / "truth.npz"), room_bytes=1e6)
    page = _Page()
    page.feed(part)
    drawn = page.json["latent-columns"]["count"]
    assert len(json.dumps(page.json["latent-columns"])) < 1.05e6 and drawn > 20_000
    assert f"{drawn:,} of {content['total']:,} particles are drawn, picked at random" in part


def test_symmetry_copies_are_not_counted_as_particles(results: Path) -> None:
    particles = pd.DataFrame({"RandomSubset": [1] * 12 + [2] * 24})
    prepared = replace(
        PreparedRecord.read(RunFolder(results).particles.record),
        symmetry="T",
        symmetry_copies=12,
        num_input=5,
        num_particles=3,
        num_rows=36,
    )
    copies = SimpleNamespace(particles=particles, prepared=prepared, consensus=None)
    assert facts.particle_count(copies) == (3, 5, "each in 12 poses of symmetry T (36 rows)")
    sentence = sentences.particle_sentence(copies)
    assert "3 particles, kept out of 5, each in 12 poses of symmetry T (36 rows), in half-sets of 1 and 2" in sentence
    latents = pd.DataFrame({"row": np.repeat([0, 2, 4], 12), "z1": 0.0})
    sentence = sentences.latent_sentence(SimpleNamespace(latents=latents, latent_dims=1))
    assert sentence == "3 particles in 36 rows, one for each symmetry copy, each with 1 latent coordinate."


@pytest.mark.parametrize(
    ("gain", "error", "sentence"),
    [
        (0.7, 0.2, "The particles move"),
        (0.5, 0.1, "The particles move"),
        (0.49, 0.01, "Motion is doubtful"),  # forty-nine standard errors, but less than half a nat
        (5.0, 1.7, "Motion is doubtful"),  # many nats, but less than three standard errors
        (-0.2, 0.1, "No motion was found"),
    ],
)
def test_verdict_claims_motion_where_the_score_confirms_it(
    results: Path, tmp_path: Path, gain: float, error: float, sentence: str
) -> None:
    root = tmp_path / "results"
    shutil.copytree(results, root)
    change_scores(root, validation_gain=gain, validation_gain_se=error)
    said = sentences.verdict(Results(root, CONFIG))
    assert said.startswith(sentence)
    assert ("it takes three standard errors and half a nat" in said) == (sentence == "Motion is doubtful")
    assert (SIGNIFICANT_ERRORS, SIGNIFICANT_NATS) == (3.0, 0.5)  # the sentence's words


ENDS_SCRIPT = "</script><script>harmed()</script><img/src=x/onerror=harmed()>"


class _Alive(HTMLParser):
    """Finds elements that could only come from ``ENDS_SCRIPT``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        if dict(attrs).get("src") == "x" or "onerror" in dict(attrs):
            self.found.append(tag)

    def handle_data(self, data):
        if self.cdata_elem == "script" and data.strip().startswith("harmed()"):
            self.found.append(data)


def test_names_and_labels_are_escaped_everywhere(results: Path, tmp_path: Path) -> None:
    root = tmp_path / "a<b>c"
    shutil.copytree(results, root, ignore=shutil.ignore_patterns("report.html"))
    point = Results(root, CONFIG).generate_folder
    point.series("axis_1").rename(point.series("<b>axis"))
    table = pd.read_csv(point.table)
    table.assign(series=table["series"].replace("axis_1", "<b>axis")).to_csv(point.table, index=False)
    latents = Results(root, CONFIG).train_folder.latents
    star = read_tables(latents).particles
    columns = {"my<b>column": np.arange(len(star)) % 7, ENDS_SCRIPT: np.arange(len(star)) % 5}
    write_star({"particles": star.assign(**columns)}, latents)
    checksums = RunFolder(root).checksums
    ChecksumsRecord([InputFile(ENDS_SCRIPT, [ENDS_SCRIPT], 1, 1_700_000_000_000_000_000, None)]).write(checksums)
    config = {"name": "run<b>name", "particles": "x<b>y.star", "mask": [ENDS_SCRIPT]}
    write_report(root, tmp_path / "report.html", config)
    html = (tmp_path / "report.html").read_text()
    assert html.count("harmed()") > 3  # as data of the scripts and as text
    alive = _Alive()
    alive.feed(html)
    assert not alive.found
    body = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)
    assert not any(raw in body for raw in ("a<b>c", "<b>axis", "my<b>column", "run<b>name", "x<b>y.star"))
    for text in ("a&lt;b&gt;c/train", "&lt;b&gt;axis", "my&lt;b&gt;column", "run&lt;b&gt;name", "x&lt;b&gt;y.star"):
        assert text in body, text


def test_report_needs_no_installation(results: Path, tmp_path: Path) -> None:
    """flexlib on the path but not installed: its version is the package's own."""
    script = """
import sys
from importlib import metadata
from pathlib import Path

def version(name, found=metadata.version):
    if name == "flexlib":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = version
from flexlib.report import write_report
write_report(Path(sys.argv[1]), Path(sys.argv[2]), {})
"""
    out = tmp_path / "report.html"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(out)], check=True)
    text = " ".join(_parse(out).text)
    assert f"Written by flexlib {flexlib.__version__} on" in text
    assert f"<td>flexlib</td><td>{flexlib.__version__}</td>" in out.read_text()


def test_a_record_of_an_older_version_is_passed_over(
    results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "results"
    shutil.copytree(results, root)
    path = Results(root, CONFIG).train_folder.validation
    path.write_text(json.dumps({"validation_gain": 1.0}))
    old = Results(root, CONFIG)
    assert old.validation is None and facts.gain(old) == (30.1, 1.2)  # the sweep table's
    assert str(path) in caplog.text
    assert "The particles move" in sentences.verdict(old)
    assert "eigenvalue" in sections.training_section(old)


def test_micrographs_that_were_held_out_are_told(results: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.copytree(results, root)
    assert "micrographs" not in sections.training_section(Results(root, CONFIG))
    path = Results(root, CONFIG).train_folder.validation
    replace(ValidationRecord.read(path), held_out_by="micrograph", held_out_micrographs=6).write(path)
    told = sections.training_section(Results(root, CONFIG))
    assert "that of all 80 particles of 6 micrographs, whose ice the training has not seen." in told


def test_the_point_is_found_without_a_sweep_table(results: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.copytree(results, root, ignore=shutil.ignore_patterns("sweep.csv"))
    assert Results(root, CONFIG).chosen == POINT


def test_displacement_is_that_of_all_particles(results: Path, tmp_path: Path) -> None:
    """The map's values are those of ``model.motion``, which other stages report too, in the frame of the series."""
    root = tmp_path / "results"
    shutil.copytree(results, root)
    run = Results(root, CONFIG)
    mesh, mask, consensus = run.mesh, run.mask, run.consensus
    assert mesh is not None and mask is not None and consensus is not None
    rng = np.random.default_rng(0)
    flow = FlowGenerator(torch.from_numpy(rng.standard_normal((4, len(mesh.vertices_A), 3))).float(), 2, 1, 4)
    with torch.no_grad():
        flow.linear.normal_(generator=torch.Generator().manual_seed(0))
    latents = rng.standard_normal((300, 2)).astype(np.float32)
    FlexModel(
        mesh=mesh,
        flow=flow,
        latents=latents,
        canonical=consensus.data,
        box=consensus.box,
        pixel_size_A=mask.pixel_size_A,
    ).save(run.train_folder.model)
    loaded = FlexModel.load(run.train_folder.model)
    voxels = voxelise(loaded.mesh, mask.data > 0.5, loaded.pixel_size_A)
    frames: tuple[Align, ...] = ("density", "rigid_core")
    for align in frames:
        found = morph.displacement_map(Results(root, {**CONFIG, "generate": {"align": align}}))
        assert found is not None
        expected = rms_displacement_A(loaded, voxels, MotionFrame.of(loaded, align).displacements_A)
        assert np.array_equal(found.values_A.ravel()[voxels.index], expected)
        assert np.count_nonzero(found.values_A) == len(voxels.index) and found.values_A.max() > 0.5
        assert (found.core_share is None) == (align == "density")
    by_default = morph.displacement_map(run)
    assert by_default is not None and by_default.core_share == found.core_share
    gallery = Gallery([], morph.paint_displacement(run, None), [])
    assert "held at\nrest, here and in all series" in sections.motion_section(run, gallery)


def test_latents_that_follow_the_imaging_are_named(results: Path, tmp_path: Path) -> None:
    html = sections.latent_section(Results(results, CONFIG))
    warnings = re.findall(r'<p class="missing">(.*?)</p>', html)
    assert [text.split(":")[0] for text in warnings] == [
        "Latent 1 goes with the view direction (12.4\N{NO-BREAK SPACE}% of its variance, by chance no more than "
        "1.1\N{NO-BREAK SPACE}%)"
    ]
    assert "from view direction and defocus, on particles" in html and "is marked" in html
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr(.*?)</tr>", html, re.DOTALL)]
    assert cells[1:] == [
        ["latent 1", "12.4 % ▲", "0.0 %"],
        ["latent 2", "0.2 %", "0.6 %"],
        ["by chance, up to", "1.1 %", "1.1 %"],
    ]
    root = tmp_path / "results"
    shutil.copytree(results, root)
    path = Results(root, CONFIG).train_folder.validation
    record = json.loads(path.read_text())
    calm = [{**one, "more_than_chance": False} for one in record["entanglement"]]
    path.write_text(json.dumps(record | {"entanglement": calm}))
    html = sections.latent_section(Results(root, CONFIG))
    assert "has not seen: no more than chance." in html and '<p class="missing">' not in html
    del record["entanglement"]  # of an older version
    path.write_text(json.dumps(record))
    assert "Do the latents follow" not in sections.latent_section(Results(root, CONFIG))


def test_latent_section_counts_particles_and_rows(results: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.copytree(results, root)
    path = Results(root, CONFIG).train_folder.latents
    table = read_tables(path).particles
    rows = np.repeat(np.arange(len(table)), 2)
    copies = table.iloc[rows].assign(flexInputRow=rows, flexSymmetryCopy=np.arange(len(rows)) % 2)
    write_star({"particles": copies}, path)
    kept = int(table["flexLatent1"].notna().sum())
    html = sections.latent_section(Results(root, CONFIG), room_bytes=8000)
    assert f"{kept:,} particles in {2 * kept:,} rows, one for each symmetry copy, each with 2 latent" in html
    assert "<b>Each dot is a particle</b> in one of its equivalent poses" in html
    assert re.search(rf"[\d,]+ of {2 * kept:,} rows are drawn, picked at random", html)
    once = sections.latent_section(Results(results, CONFIG))
    assert f"{kept:,} particles, each with" in once and "equivalent poses" not in once
