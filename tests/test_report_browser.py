"""The report in a real browser, driven by a real mouse: it is alive, quiet, and its lasso gives the right particles."""

from __future__ import annotations

import base64
import csv
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import console_errors, drag, open_browser, requests, scroll_to, wait_for
from fake_results import CONFIG, finished_report
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.support.ui import Select

from flexlib.particles.star import read_tables
from flexlib.report import sections
from flexlib.report.morph import Gallery
from flexlib.report.page import build_page
from flexlib.report.results import Results
from flexlib.select import main as flex_select


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_report(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def page(results: Path, downloads: Path) -> Iterator[Chrome]:
    """The report, open."""
    browser = open_browser(downloads)
    browser.get((results / "report.html").as_uri())
    yield browser
    browser.quit()


@pytest.fixture
def fresh(results: Path, page: Chrome) -> Chrome:
    """The page, loaded anew: plots that still grow back from a narrower window would move under the mouse."""
    page.get((results / "report.html").as_uri())
    wait_for(lambda: page.execute_script("return Boolean(document.querySelector('#latent-scatter')._fullData)"), "plot")
    return page


@pytest.fixture
def latents(fresh: Chrome) -> Chrome:
    """The page at its latent plot with every particle drawn."""
    scroll_to(fresh, "#latent-scatter")
    return fresh


def test_loads_without_errors_or_requests_and_draws_every_plot(results: Path, page: Chrome) -> None:
    drawn = page.execute_script(
        "return Object.fromEntries(Array.from(document.querySelectorAll('.plot'),"
        "  (box) => [box.id, Boolean(box._fullData && box.querySelector('.main-svg'))]))"
    )
    assert {"mesh-view", "sweep-gains", "sweep-heat-map", "spectrum", "latent-scatter", "latent-density", "fsc"} <= set(
        drawn
    )
    assert {"independent-fsc", "independent-fsc-moving", "independent-modes"} <= set(drawn)
    assert {"morph-axis_1", "morph-axis_2"} <= set(drawn) and all(drawn.values()), drawn
    pictures = page.execute_script("return Array.from(document.images, (i) => i.complete && i.naturalWidth)")
    assert len(pictures) >= 8 and all(width > 100 for width in pictures)
    time.sleep(1.0)  # anything that loads late
    assert console_errors(page) == []
    assert requests(page) == {(results / "report.html").as_uri()}
    assert page.find_elements("css selector", "[data-title*='loud']") == []  # no button that uploads the data


@pytest.mark.parametrize("size", [(1280, 800), (900, 700), (390, 800)])
def test_nothing_hangs_out_of_the_window(page: Chrome, size: tuple[int, int]) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        wait_for(
            lambda: page.execute_script("return document.documentElement.scrollWidth") <= width, "a page that fits"
        )
        wait_for(  # plots follow the window
            lambda: page.execute_script(
                "return Array.from(document.querySelectorAll('.plot .main-svg'))"
                ".every((e) => e.getBoundingClientRect().right <= innerWidth + 1)"
            ),
            "plots that fit",
        )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_slider_moves_the_drawn_surface(fresh: Chrome) -> None:
    page = fresh

    def shown() -> np.ndarray:
        return np.array(
            page.execute_script("return Array.from(document.querySelector('#morph-axis_1')._fullData[0].x)")
        )

    figure = json.loads(
        page.execute_script("return document.querySelector('#morph-axis_1-data').textContent")
    )  # what Python wrote: x of each frame's vertices
    frames = [np.frombuffer(base64.b64decode(one["data"][0]["x"]["bdata"]), "<f4") for one in figure["frames"]]
    scroll_to(page, "#morph-axis_1")
    scene = page.find_element("css selector", "#morph-axis_1 canvas")
    middle, picture = shown(), wait_for(lambda: scene.screenshot_as_png, "picture")
    assert np.array_equal(middle, frames[2])
    for number in (0, 4):
        grip, rail = page.execute_script(
            "const box = (name) => document.querySelector(`#morph-axis_1 .slider-${name}`).getBoundingClientRect();"
            "const [grip, rail] = [box('grip-rect'), box('rail-touch-rect')];"
            "return [[grip.left + grip.width / 2, grip.top + grip.height / 2], [rail.left, rail.right]]"
        )
        end = rail[0] + 4 if number == 0 else rail[1] - 4
        drag(page, np.array([grip, [(grip[0] + end) / 2, grip[1]], [end, grip[1]]]))
        wait_for(lambda wanted=frames[number]: np.array_equal(shown(), wanted), f"frame {number}")
        wait_for(lambda before=picture: scene.screenshot_as_png != before, "another picture")
        picture = scene.screenshot_as_png
    assert len(frames[0]) > 100 and abs(frames[0].mean() - frames[4].mean()) > 0.5  # the arm swings by Angstroms
    assert console_errors(page) == []


def plot_area(page: Chrome) -> tuple[np.ndarray, np.ndarray]:
    """Window positions (left, top), (right, bottom) of the scatter's area, and what they are in its units."""
    box = page.execute_script(
        "const box = document.querySelector('#latent-scatter .nsewdrag').getBoundingClientRect();"
        "return [[box.left, box.top], [box.right, box.bottom]]"
    )
    layout = "document.querySelector('#latent-scatter').layout"
    x, y = page.execute_script(f"return [{layout}.xaxis.range, {layout}.yaxis.range]")
    return np.array(box), np.array([[x[0], y[1]], [x[1], y[0]]])


def distance_to_outline(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(n,) distance of (n, 2) points to the sides of a closed outline."""
    start, step = corners, np.roll(corners, -1, 0) - corners
    start, step = start[step.any(1)], step[step.any(1)]
    along = ((points[:, None] - start) * step).sum(2) / (step**2).sum(1)
    nearest = start + np.clip(along, 0, 1)[..., None] * step
    return np.linalg.norm(points[:, None] - nearest, axis=2).min(1)


def inside_outline(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(n,) whether the outline winds around each of (n, 2) points: the sum of the angles that its sides subtend."""
    seen = corners - points[:, None]
    angle = np.arctan2(seen[..., 1], seen[..., 0])
    turn = (np.roll(angle, -1, 1) - angle + np.pi) % (2 * np.pi) - np.pi
    return np.abs(turn.sum(1)) > np.pi


LIST = "_script_alert_x_script_co_selected.csv"  # the run's name, as far as it may stand in a file's


def download(page: Chrome, folder: Path) -> list[dict[str, str]]:
    """Press the button and read the list."""
    path = folder / LIST
    path.unlink(missing_ok=True)
    scroll_to(page, "#latent-save")
    page.find_element("id", "latent-save").click()
    wait_for(path.is_file, "the download")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_lasso_lists_the_particles_inside_it(results: Path, latents: Chrome, downloads: Path, tmp_path: Path) -> None:
    table = read_tables(next(results.rglob("latents.star"))).particles
    z = table[["flexLatent1", "flexLatent2"]].to_numpy(float)
    button = latents.find_element("id", "latent-lasso")
    scroll_to(latents, "#latent-lasso")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    scroll_to(latents, "#latent-scatter")
    window, units = plot_area(latents)
    # an outline that is not convex
    corners_px = window[0] + np.ptp(window, axis=0) * [
        [0.2, 0.25], [0.5, 0.45], [0.8, 0.2], [0.85, 0.75], [0.5, 0.6], [0.3, 0.8]
    ]  # fmt: skip
    corners_px = corners_px.round()
    steps = np.linspace(0, 1, 12)[:, None]
    sides = zip(corners_px, np.roll(corners_px, -1, 0), strict=True)
    drag(latents, np.concatenate([a + steps * (b - a) for a, b in sides]))
    wait_for(lambda: latents.find_element("id", "latent-picked").is_displayed(), "the selection")
    rows = np.array([int(line["flexInputRow"]) for line in download(latents, downloads)])
    assert (np.diff(rows) > 0).all()

    scale = (window[1] - window[0]) / (units[1] - units[0])
    points_px = window[0] + (z - units[0]) * scale
    kept = np.isfinite(z).all(1)
    clear = kept & (distance_to_outline(points_px, corners_px) > 1.5)  # the mouse moves by whole pixels
    expected = np.flatnonzero(inside_outline(points_px, corners_px) & clear)
    assert 100 < len(expected) < 0.6 * kept.sum() and clear.sum() > 0.9 * kept.sum()
    assert np.array_equal(rows[clear[rows]], expected)

    # and exactly, of the outline as the plot has it
    outline = latents.execute_script("return document.querySelector('#latent-scatter').layout.selections[0].path")
    corners = np.array([[float(v) for v in part.split(",")] for part in outline.strip("MZ").split("L")])
    close = distance_to_outline(z, corners) < 1e-3 * np.ptp(z[kept], axis=0).max()  # drawn in steps of 1/65000
    assert np.array_equal(rows[~close[rows]], np.flatnonzero(inside_outline(z, corners) & kept & ~close))
    assert f"{len(rows)} particles selected" in latents.find_element("id", "latent-picked").text

    # the list goes back into the user's file
    command = latents.find_element("id", "latent-command").text
    assert f"--rows {LIST} --out subset.star" in command
    out = tmp_path / "subset.star"
    folder = next(results.rglob("latents.star")).parent
    assert flex_select([str(folder), "--rows", str(downloads / LIST), "--out", str(out)]) == 0
    given = read_tables(results / "input.star").particles
    pd.testing.assert_frame_equal(read_tables(out).particles, given.iloc[rows].reset_index(drop=True))
    assert console_errors(latents) == []


def test_outline_takes_particles_that_are_not_drawn(
    results: Path, page: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "LATENT_ROOM_BYTES", 8000)
    build_page(Results(results, CONFIG), Gallery([], None, []), tmp_path / "part.html")
    page.get((tmp_path / "part.html").as_uri())
    drawn = page.execute_script("return document.querySelector('#latent-scatter').data[0].x.length")
    assert 300 < drawn < 700
    scroll_to(page, "#latent-scatter")
    page.execute_script("Plotly.relayout('latent-scatter', {dragmode: 'select'})")
    window, units = plot_area(page)
    corners = window[0] + np.ptp(window, axis=0) * [[0.3, 0.2], [0.6, 0.8]]
    drag(page, corners.round())
    wait_for(lambda: page.find_element("id", "latent-picked").is_displayed(), "the selection")
    command = shlex.split(page.find_element("id", "latent-command").text)
    assert command[0] == "flex-select" and "--polygon" in command and command[-1] == "subset.star"
    assert flex_select([*command[1:-1], str(tmp_path / "subset.star")]) == 0
    z = read_tables(next(results.rglob("latents.star"))).particles[["flexLatent1", "flexLatent2"]].to_numpy(float)
    pixel = np.abs((units[1] - units[0]) / (window[1] - window[0]))
    ends = units[0] + (corners.round() - window[0]) * (units[1] - units[0]) / (window[1] - window[0])
    low, high = ends.min(0), ends.max(0)
    taken = len(read_tables(tmp_path / "subset.star").particles)
    smallest, largest = (((z > low + s * pixel) & (z < high - s * pixel)).all(1).sum() for s in (1.5, -1.5))
    picked = int(page.find_element("id", "latent-count").text.split()[0])
    assert 2 * picked < smallest <= taken <= largest


def test_a_box_a_second_lasso_and_clearing(latents: Chrome, downloads: Path) -> None:
    page = latents
    window, _ = plot_area(page)

    def box(left, top, right, bottom) -> np.ndarray:
        return (window[0] + np.ptp(window, axis=0) * [[left, top], [right, bottom]]).round()

    page.execute_script("Plotly.relayout('latent-scatter', {dragmode: 'select'})")
    drag(page, box(0.2, 0.3, 0.45, 0.6))
    panel = page.find_element("id", "latent-picked")
    wait_for(panel.is_displayed, "the selection")
    first = {line["flexInputRow"] for line in download(page, downloads)}
    scroll_to(page, "#latent-scatter")
    window, _ = plot_area(page)
    ActionChains(page).key_down("\ue008").perform()  # with Shift, another part is added
    drag(page, box(0.6, 0.3, 0.8, 0.6))
    ActionChains(page).key_up("\ue008").perform()
    text = page.find_element("id", "latent-count")
    wait_for(lambda: text.text != f"{len(first)} particles selected.", "more particles")
    both = {line["flexInputRow"] for line in download(page, downloads)}
    assert first < both
    page.find_element("id", "latent-clear").click()
    assert not panel.is_displayed()
    assert page.execute_script("return document.querySelector('#latent-scatter').data[0].selectedpoints") is None
    assert console_errors(page) == []


def test_axes_and_colours_are_any_column(latents: Chrome) -> None:
    def scatter(what: str) -> Any:
        return latents.execute_script(f"return document.querySelector('#latent-scatter').{what}")

    colours = Select(latents.find_element("id", "latent-colour"))
    names = [option.text for option in colours.options]
    assert {"True angle 1 (deg)", "Half-set", "Defocus (µm)", "DefocusU", "AngleRot", "latent 2"} <= set(names)
    before = scatter("data[0].marker.color[7]")
    colours.select_by_visible_text("AngleRot")
    assert scatter("data[0].marker.color[7]") != before
    assert scatter("layout.coloraxis") is None and scatter("data[0].marker.colorbar.title.text") == "AngleRot"
    Select(latents.find_element("id", "latent-y")).select_by_visible_text("Defocus (µm)")
    assert scatter("layout.yaxis.title.text") == "Defocus (µm)"
    assert 0.5 < min(scatter("layout.yaxis.range")) < max(scatter("layout.yaxis.range")) < 3
    assert all(scatter("data.slice(1).map((path) => path.visible === false)"))  # series have no defocus
    Select(latents.find_element("id", "latent-y")).select_by_visible_text("latent 2")
    assert not any(scatter("data.slice(1).map((path) => path.visible === false)"))


def test_hover_names_the_row_of_the_input(results: Path, latents: Chrome) -> None:
    z = read_tables(next(results.rglob("latents.star"))).particles[["flexLatent1", "flexLatent2"]].to_numpy(float)
    window, units = plot_area(latents)
    positions = window[0] + (z - units[0]) * (window[1] - window[0]) / (units[1] - units[0])
    known = np.flatnonzero(np.isfinite(z).all(1))
    apart = np.linalg.norm(positions[known, None] - positions[None, known], axis=2)
    np.fill_diagonal(apart, np.inf)
    row = known[np.argmax(apart.min(1))]  # the loneliest particle
    ActionBuilder(latents).pointer_action.move_to_location(*(int(v) for v in positions[row].round()))
    actions = ActionBuilder(latents)
    actions.pointer_action.move_to_location(*(int(v) for v in positions[row].round()))
    actions.perform()
    wait_for(
        lambda: (
            f"row {row + 1} of the input"
            in latents.execute_script("return document.querySelector('#latent-scatter .hoverlayer').textContent")
        ),
        f"row {row + 1}",
    )


def test_without_webgl_points_are_drawn_and_3d_views_say_so(results: Path, tmp_path: Path) -> None:
    browser = open_browser(tmp_path, "disable-3d-apis")
    try:
        browser.get((results / "report.html").as_uri())
        assert browser.find_element("id", "morph-axis_1").text == (
            "This view needs WebGL, which this browser does not offer."
        )
        assert len(browser.find_elements("css selector", "#latent-scatter .scatterlayer .point")) > 1300
        assert console_errors(browser) == []
    finally:
        browser.quit()
