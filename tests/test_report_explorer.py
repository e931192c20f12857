"""The live surface, in a real browser: it is where generate puts it, and what is said and saved beside it is true."""

from __future__ import annotations

import csv
import functools
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser import console_errors, drag, open_browser, requests, scroll_to, wait_for
from fake_results import CONFIG, POINT, write_fake_results, write_moving_model
from PIL import Image
from scipy.spatial import cKDTree
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from flexlib.generate.neighbourhood import Neighbourhood
from flexlib.generate.run import generate_series
from flexlib.imaging.fourier import fourier_pad_map
from flexlib.imaging.maps import read_map
from flexlib.layout import GenerateFolder, RunFolder
from flexlib.model.frame import MotionFrame
from flexlib.render.surface import isosurface
from flexlib.report import explorer, sections
from flexlib.report.explorer import EXPLORER_ROOM_BYTES, Reach, explorer_content
from flexlib.report.morph import Gallery, trained_motion
from flexlib.report.page import build_page
from flexlib.report.results import Results
from flexlib.tetra.rotations import rotations
from flexlib.workflow_support.settings import Align, GenerateSettings

NO_MORE_A = 0.5  # rms between the surface in the page and that of the generated map
REACH_A = 4.0  # of the motion for a unit of a latent: some 8 A rms over the particles


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``runs(dims)`` is a finished run with a moving model of that many latents, made once."""

    @functools.cache
    def made(dims: int) -> Path:
        root = tmp_path_factory.mktemp(f"explored{dims}") / "antibody"
        point = write_fake_results(root, box=40, pixel_size_A=6.0, frames=3, num_particles=600, dims=dims)
        write_moving_model(root, point, REACH_A)
        write_page(root, root / "report.html")
        return root

    return made


def results_of(root: Path, align: Align = "rigid_core") -> Results:
    return Results(root, {**CONFIG, "generate": {"align": align}})


def write_page(root: Path, out: Path, align: Align = "rigid_core") -> None:
    results = results_of(root, align)
    build_page(results, Gallery([], None, [], trained_motion(results)), out)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paths")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Chrome]:
    chrome = open_browser(downloads)
    yield chrome
    chrome.quit()


def open_page(browser: Chrome, path: Path) -> Chrome:
    """The page, loaded anew, at its live surface."""
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    settled(browser)
    scroll_to(browser, "#explorer-plot")
    return browser


def settled(page: Chrome) -> None:
    wait_for(lambda: page.execute_script("return Boolean(flexlib.explorer) && flexlib.explorer.drawn()"), "the surface")


def move_to(page: Chrome, z: np.ndarray | list[float]) -> None:
    page.execute_script("flexlib.explorer.moveTo(arguments[0])", np.asarray(z, float).tolist())
    settled(page)


def latents(page: Chrome) -> np.ndarray:
    return np.array(page.execute_script("return flexlib.explorer.latents()"))


def shown(page: Chrome, name: str, columns: int = 3) -> np.ndarray:
    """An array of the page's flow, as rows."""
    text = page.execute_script(f"return JSON.stringify(Array.from(flexlib.explorer.flow.{name}))")
    return np.array(json.loads(text)).reshape(-1, columns)


def picture(page: Chrome) -> np.ndarray:
    png = page.find_element("id", "explorer-surface").screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def all_over(vertices: np.ndarray, faces: np.ndarray, parts: int = 5) -> np.ndarray:
    """Points on all triangles, a fifth of a side apart."""
    steps = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    return np.einsum("wk,fkx->fwx", np.array(steps) / parts, vertices[faces]).reshape(-1, 3)


def distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) of each point from the nearest of others."""
    far = 1e4  # where denormal numbers count as zero, a tree that splits at zero never ends
    return cKDTree(others + far).query(points + far)[0]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


# The same surface as generate's ---------------------------------------------------------------------------------------


def generated_surface(root: Path, z: np.ndarray, level: float, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of the map that generate makes, finely sampled."""
    results = results_of(root)
    generate_series(results.train_folder.path, out, GenerateSettings(), points=z[None])
    made = read_map(GenerateFolder(out).frame("at", 0))
    fine = fourier_pad_map(made.data, 128)
    return isosurface(fine, made.pixel_size_A * made.box / 128, level, 10**7)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_dragged_point_shows_the_surface_that_generate_makes(
    runs: Any, browser: Chrome, tmp_path: Path, dims: int
) -> None:
    page = open_page(browser, runs(dims) / "report.html")
    level = page.execute_script("return JSON.parse(document.querySelector('#explorer-data').textContent).level")
    box = scroll_to(page, "#explorer-plot")
    at_rest = shown(page, "positions")
    for number, (right, up) in enumerate([(0.25, 0.35), (0.85, 0.65)]):
        corner = np.array([box["left"] + 46, box["top"] + 10])
        size = np.array([box["width"] - 56, box["height"] - 50])
        start, end = corner + [0.5, 0.5] * size, corner + [right, 1 - up] * size
        drag(page, np.array([start, (start + end) / 2, end]).round())
        settled(page)
        z = latents(page)
        content = Reach.of(results_of(runs(dims)).latents[[f"z{i + 1}" for i in range(dims)]].to_numpy())
        wanted = content.low + np.array([right, up, 0])[:dims] * (content.high - content.low)
        assert np.abs(z - wanted)[: min(dims, 2)] == pytest.approx(0, abs=0.05)  # where the mouse let go
        mine, faces = shown(page, "positions"), shown(page, "faces").astype(int)
        vertices, triangles = generated_surface(runs(dims), z, level, tmp_path / str(number))
        surface = all_over(vertices, triangles)
        away = distance(mine, surface)
        back = distance(vertices, all_over(mine, faces))
        assert rms(shown(page, "displacement", 1)) > 2  # it has moved, and is easily told from what is at rest
        assert rms(distance(at_rest, surface)) > 2 * NO_MORE_A
        assert rms(away) < NO_MORE_A and rms(back) < NO_MORE_A, (rms(away), rms(back))
    assert console_errors(page) == []


@pytest.mark.parametrize("align", ["rigid_core", "density"])
def test_the_mesh_moves_as_the_model_says(runs: Any, browser: Chrome, tmp_path: Path, align: Align) -> None:
    root = runs(2)
    write_page(root, tmp_path / "page.html", align)
    page = open_page(browser, tmp_path / "page.html")
    motion = trained_motion(results_of(root, align))
    assert motion is not None
    mesh = motion.model.mesh
    apart, own = cKDTree(mesh.vertices_A).query(shown(page, "rest"))
    assert apart.max() < 0.01 and len(np.unique(own)) == len(own)  # as packed
    reach = Reach.of(motion.model.latents.astype(float))
    ends = np.array([reach.low, reach.high, [reach.low[0], reach.high[1]]])
    for states, allowed_A in ((reach.known[::60], 0.03), (ends, 0.1)):  # 0.02 A by fewer fields, and by packing
        wanted = mesh.vertices_A + motion.displacements_A(states).numpy()
        moved = page.execute_script(
            "const { flow } = flexlib.explorer;"
            "return JSON.stringify(arguments[0].map((z) => { flow.moveMesh(z); return Array.from(flow.moved); }))",
            states.tolist(),
        )
        error = np.linalg.norm(np.array(json.loads(moved)).reshape(len(states), -1, 3) - wanted[:, own], axis=2)
        assert rms(error) < allowed_A and rms(wanted - mesh.vertices_A) > 20 * rms(error)


def test_the_rotation_is_that_of_the_frame(runs: Any, browser: Chrome) -> None:
    """Also where the best orthogonal matrix is a reflection."""
    page = open_page(browser, runs(1) / "report.html")
    rng = np.random.default_rng(0)
    sums = rng.standard_normal((60, 3, 3))
    assert (np.linalg.det(sums) < 0).any() and (np.linalg.det(sums) > 0).any()
    mine = page.execute_script("return arguments[0].map((one) => flexlib.bestRotation(one.flat()))", sums.tolist())
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    wanted = [rotations(torch.from_numpy(one), zeros).numpy() for one in sums]
    assert np.allclose(np.array(mine).reshape(-1, 3, 3), wanted, atol=1e-7)


# What a reader does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_draws_quietly_and_every_axis_has_a_slider(runs: Any, browser: Chrome, dims: int) -> None:
    root = runs(dims)
    page = open_page(browser, root / "report.html")
    rgb = picture(page)
    assert 0.05 < (np.ptp(rgb, axis=2) + 255 - rgb.max(2) > 12).mean() < 0.8  # a surface on white
    sliders = page.find_elements("css selector", "#explorer input[type=range]")
    assert [one.get_attribute("id") for one in sliders] == [f"explorer-latent-{k + 1}" for k in range(dims)]
    before = latents(page)
    for number, slider in enumerate(sliders):
        label = slider.find_element("xpath", "..").text
        assert label.startswith(f"latent {number + 1}")
        slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        settled(page)
        after = latents(page)
        assert after[number] > before[number] + 0.01 and np.array_equal(
            np.delete(after, number), np.delete(before, number)
        )
        assert f"{after[number]:.2f}" in slider.find_element("xpath", "..").text
        before = after
    sliders[-1].send_keys(Keys.END)
    settled(page)
    assert np.abs(picture(page) - rgb).max(2).mean() > 1
    if dims == 3:
        Select(page.find_element("id", "explorer-y")).select_by_visible_text("latent 3")
        box = scroll_to(page, "#explorer-plot")
        middle = np.array([box["left"] + box["width"] / 2, box["top"] + box["height"] / 2])
        drag(page, np.array([middle + np.array([0, down]) for down in (0, 20, 40)]).round())
        settled(page)
        assert latents(page)[1] == pytest.approx(before[1], abs=1e-9) and latents(page)[2] < before[2]
    assert console_errors(page) == []
    assert requests(page) == {(root / "report.html").as_uri()}


def test_keys_move_the_point_and_turn_the_surface(runs: Any, browser: Chrome) -> None:
    page = open_page(browser, runs(2) / "report.html")
    plot, surface = (page.find_element("id", f"explorer-{name}") for name in ("plot", "surface"))
    start = latents(page)
    plot.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_UP)
    settled(page)
    moved = latents(page) - start
    assert moved[0] > 0.01 and moved[1] > 1.5 * moved[0] * 0.5
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    before = picture(page)
    surface.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP)
    settled(page)
    turned = picture(page)
    assert np.abs(turned - before).max(2).mean() > 1 and np.array_equal(latents(page), start + moved)
    surface.send_keys("+", "+")
    settled(page)
    larger = picture(page)
    assert (larger.min(2) < 240).mean() > 1.2 * (turned.min(2) < 240).mean()
    page.find_element("id", "explorer-reset").click()
    settled(page)
    assert np.array_equal(latents(page), start)
    assert console_errors(page) == []


def test_the_mouse_turns_and_its_wheel_zooms(runs: Any, browser: Chrome) -> None:
    page = open_page(browser, runs(2) / "report.html")
    box = scroll_to(page, "#explorer-surface")
    before, start = picture(page), latents(page)
    middle = np.array([box["left"] + box["width"] / 2, box["top"] + box["height"] / 2])
    drag(page, np.array([middle + np.array([right, right / 4]) for right in (0, 40, 80)]).round())
    settled(page)
    turned = picture(page)
    assert np.abs(turned - before).max(2).mean() > 1
    page.execute_script(
        "document.querySelector('#explorer-surface').dispatchEvent("
        "new WheelEvent('wheel', {deltaY: 300, bubbles: true, cancelable: true}))"
    )
    settled(page)
    assert (picture(page).min(2) < 240).mean() < 0.8 * (turned.min(2) < 240).mean()
    assert np.array_equal(latents(page), start)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_particles_near_are_counted_as_generate_counts_them(runs: Any, browser: Chrome, dims: int) -> None:
    page = open_page(browser, runs(dims) / "report.html")
    motion = trained_motion(results_of(runs(dims)))
    assert motion is not None
    known = motion.model.latents.astype(float)
    neighbourhood, reach = Neighbourhood(known), Reach.of(known)
    status = page.find_element("id", "explorer-status")
    for z in (known[3], known[44], np.zeros(dims), reach.high, reach.low):
        move_to(page, z)
        wanted = int(neighbourhood.num_near(z[None])[0])
        assert abs(page.execute_script("return flexlib.explorer.near()") - wanted) <= 1  # latents are packed
        assert f"{wanted} particle" in status.text or abs(int(status.text.split()[0]) - wanted) <= 1
        beyond = bool(neighbourhood.beyond_data(z[None])[0])
        assert ("Beyond the data" in status.text) == beyond
        assert (status.value_of_css_property("color") == "rgba(198, 40, 40, 1)") == beyond
    assert beyond or dims == 1  # at the corner that no particle reaches


def test_of_a_part_of_the_particles_all_are_estimated(
    runs: Any, browser: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "LATENT_ROOM_BYTES", 4000)
    write_page(runs(2), tmp_path / "part.html")
    page = open_page(browser, tmp_path / "part.html")
    drawn = page.execute_script("return flexlib.particles.rows.length")
    known = trained_motion(results_of(runs(2))).model.latents.astype(float)
    assert drawn < 0.6 * len(known)
    move_to(page, [0.0, 0.0])
    wanted = Neighbourhood(known).num_near(np.zeros((1, 2)))[0]
    assert page.find_element("id", "explorer-status").text.startswith("About ")
    assert page.execute_script("return flexlib.explorer.near()") == pytest.approx(wanted, rel=0.35)


def test_a_recorded_path_goes_through_generate(runs: Any, browser: Chrome, downloads: Path, tmp_path: Path) -> None:
    root = runs(2)
    page = open_page(browser, root / "report.html")
    save = page.find_element("id", "explorer-save")
    assert not save.is_enabled() and page.find_element("id", "explorer-path").text == "No path yet."
    move_to(page, [-0.5, 0.3])
    page.find_element("id", "explorer-add").click()
    record = page.find_element("id", "explorer-record")
    record.click()
    assert record.get_attribute("aria-pressed") == "true"
    visited = [[-0.5, 0.3]]
    for z in ([-0.2, 0.25], [0.1, 0.1], [0.4, 0.1]):
        move_to(page, z)
        visited.append(z)
    record.click()
    move_to(page, [1.0, 1.0])  # no longer recorded
    assert page.find_element("id", "explorer-path").text == "The path has 4 points."
    path = downloads / "antibody_path.csv"
    path.unlink(missing_ok=True)
    scroll_to(page, "#explorer-save")
    save.click()
    wait_for(path.is_file, "the download")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["latent_1", "latent_2"]
    assert np.array([[float(v) for v in row.values()] for row in rows]) == pytest.approx(np.array(visited), abs=1e-6)
    command = page.find_element("id", "explorer-command").text
    assert "series: antibody_path.csv" in command and "--series antibody_path.csv" in command
    train = results_of(root).train_folder.path
    assert f"python -m flexlib.generate '{train.as_posix()}' along_path" in command
    out = tmp_path / "made"
    done = subprocess.run(
        [sys.executable, "-m", "flexlib.generate", train, out, "--series", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(GenerateFolder(out).table)
    assert table[["latent_1", "latent_2"]].to_numpy() == pytest.approx(np.array(visited), abs=1e-6)
    assert set(table["series"]) == {"antibody_path"}
    page.find_element("id", "explorer-clear").click()
    assert not save.is_enabled() and not page.find_element("id", "explorer-made").is_displayed()
    assert console_errors(page) == []


def test_playing_goes_along_the_axis_or_the_path_and_pauses(runs: Any, browser: Chrome) -> None:
    page = open_page(browser, runs(2) / "report.html")
    play, choice = page.find_element("id", "explorer-play"), Select(page.find_element("id", "explorer-along"))
    assert not choice.options[-1].is_enabled()  # there is no path yet
    start = latents(page)
    choice.select_by_visible_text("latent 2")
    play.click()
    assert play.text == "Pause" and play.get_attribute("aria-pressed") == "true"
    wait_for(lambda: abs(latents(page)[1] - start[1]) > 0.2, "the motion")
    play.click()
    paused = latents(page)
    assert paused[0] == start[0] and play.text == "Play"
    assert page.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(flexlib.explorer.latents()), 300)"
    ) == list(paused)
    ends = np.array([[-0.6, -0.2], [0.7, 0.5]])
    for z in ends:
        move_to(page, z)
        page.find_element("id", "explorer-add").click()
    choice.select_by_visible_text("the path")
    play.click()
    wait_for(lambda: np.linalg.norm(latents(page) - ends[1]) > 0.2, "the way")
    between = latents(page)
    play.click()
    along = (between - ends[0]) @ (ends[1] - ends[0]) / ((ends[1] - ends[0]) ** 2).sum()
    assert 0 <= along <= 1 and between == pytest.approx(ends[0] + along * (ends[1] - ends[0]), abs=1e-6)


@pytest.mark.parametrize("size", [(1280, 800), (390, 800)])
def test_fits_the_window(runs: Any, browser: Chrome, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = open_page(browser, runs(3) / "report.html")
        over = page.execute_script(
            "return Array.from(document.querySelectorAll('#explore *'))"
            ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.id || e.tagName)"
        )
        assert over == []
        wide, pixels = page.execute_script(
            "const e = document.querySelector('#explorer-surface'); return [e.clientWidth, e.width]"
        )
        assert pixels in (wide, 2 * wide) and wide > 300  # twice as fine where it rests
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# What cannot be shown -------------------------------------------------------------------------------------------------


def test_without_webgl_it_says_so(runs: Any, tmp_path: Path) -> None:
    chrome = open_browser(tmp_path, "disable-3d-apis")
    try:
        chrome.get((runs(2) / "report.html").as_uri())
        assert (
            chrome.find_element("id", "explorer").text == "This view needs WebGL 2, which this browser does not offer."
        )
        assert console_errors(chrome) == []
    finally:
        chrome.quit()


def test_a_model_at_rest_has_nothing_to_explore(tmp_path: Path) -> None:
    root = tmp_path / "still"
    point = write_fake_results(root, box=40, pixel_size_A=6.0, frames=3, num_particles=60)
    run = results_of(root)
    assert "There is no trained model" in explorer.explorer_section(run, Gallery([], None, []))
    write_moving_model(root, point, 0.0)
    html = explorer.explorer_section(run, Gallery([], None, [], trained_motion(run)))
    assert "The model stands still" in html and "explorer-surface" not in html and "Drag" not in html


def test_large_models_are_shown_on_a_coarser_grid(runs: Any, browser: Chrome, tmp_path: Path) -> None:
    motion = trained_motion(results_of(runs(2)))
    assert motion is not None
    fine = fourier_pad_map(motion.model.canonical, 200)
    fine = np.where(fine > 0.02 * fine.max(), fine, np.float32(0))
    large = replace(motion.model, canonical=fine, box=200, pixel_size_A=motion.model.pixel_size_A * 40 / 200)
    motion = MotionFrame(large, motion.core)
    reach = Reach.of(large.latents.astype(float))
    sizes, counts = [], []
    for room in (EXPLORER_ROOM_BYTES, 300_000):
        content = explorer_content(motion, reach, None, np.eye(3), room)
        assert content is not None
        sizes.append(len(json.dumps(content)))
        counts.append(len(content["index"]))
    assert sizes[0] < EXPLORER_ROOM_BYTES and sizes[1] < 1.1 * 300_000 and counts[1] < counts[0]
    assert explorer_content(motion, reach, None, np.eye(3), 20_000) is None
    run = results_of(runs(2))
    html = explorer.explorer_section(run, Gallery([], None, [], motion), 20_000)
    assert "too large" in html and "explorer-surface" not in html
    build_page(run, Gallery([], None, [], motion), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 15e6
    page = open_page(browser, tmp_path / "large.html")
    assert 10_000 < page.execute_script("return flexlib.explorer.flow.cell.length") <= 120_000
    assert console_errors(page) == []


def test_the_point_of_the_run_that_was_chosen_is_shown(runs: Any) -> None:
    run = RunFolder(runs(2))
    chosen = results_of(runs(2)).chosen
    assert chosen is not None and chosen.latent_dims == POINT.latent_dims == 2
    assert run.train(chosen.path).path.as_posix() in (runs(2) / "report.html").read_text()
