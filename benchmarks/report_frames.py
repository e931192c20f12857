"""Frames a second of the report's live surface, in a headless Chromium whose WebGL is software.

    python benchmarks/report_frames.py results/demo/report.html [--size 1280 800] [--flags ...]

Says how long the page's own part of a frame takes (network, mesh, surface, normals, upload to WebGL; ``whole`` is all
of them) and how long drawing takes, each as the median and the 95th percentile over latents all over the reach of the
sliders, and how many frames a second are shown while the point moves all the time. Software WebGL draws on the CPU; a
graphics card of whatever kind draws so few triangles in next to no time: there the page's own part is what limits.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PARTS = """
const { flow, view } = flexlib.explorer;
const content = JSON.parse(document.querySelector('#explorer-data').textContent);
const any = () => content.low.map((low, k) => low + Math.random() * (content.high[k] - low));
const gl = document.querySelector('#explorer-surface').getContext('webgl2');
const draw = () => { view.draw(); gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); };
const parts = { network: (z) => flow.coefficients(z), mesh: (z) => flow.moveMesh(z), nodes: () => flow.ride(),
  surface: () => flow.findSurface(),
  normals: () => flow.findNormals(), upload: () => view.upload(), draw };
const times = Object.fromEntries([...Object.keys(parts), 'whole'].map((name) => [name, []]));
for (let i = 0; i < 300; i++) {
  const z = any();
  Object.entries(parts).forEach(([name, part]) => {
    const start = performance.now();
    part(z);
    times[name].push(performance.now() - start);
  });
  const start = performance.now();
  flow.move(z);
  view.upload();
  times.whole.push(performance.now() - start);
}
const at = (values, part) => values.slice(100).sort((a, b) => a - b)[Math.floor(part * 200)];
return { vertices: flow.positions.length / 3, nodes: flow.cell.length, triangles: flow.faces.length / 3,
  mesh_vertices: flow.moved.length / 3,
  fields: flow.fields.length, page_MB: document.documentElement.outerHTML.length / 1e6,
  explorer_MB: document.querySelector('#explorer-data').textContent.length / 1e6,
  canvas: [document.querySelector('#explorer-surface').width, document.querySelector('#explorer-surface').height],
  median_ms: Object.fromEntries(Object.entries(times).map(([name, values]) => [name, at(values, 0.5)])),
  high_ms: Object.fromEntries(Object.entries(times).map(([name, values]) => [name, at(values, 0.95)])) };
"""
FRAMES = """
const done = arguments[0], seconds = 5;
const content = JSON.parse(document.querySelector('#explorer-data').textContent);
let [first, count] = [null, 0];
function next(now) {
  if (first === null) first = now;
  const phase = (now - first) / 1000;
  if (phase > seconds) return done((count - 1) / phase);
  count++;
  const part = (k) => 0.5 + 0.4 * Math.sin(phase * (3 + k));
  flexlib.explorer.moveTo(content.low.map((low, k) => low + part(k) * (content.high[k] - low)));
  requestAnimationFrame(next);
}
requestAnimationFrame(next);
"""


def measure(page: Path, size: tuple[int, int], flags: list[str]) -> dict[str, object]:
    """Times and rates of the live surface of a report."""
    options = ChromeOptions()
    browser = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "disable-dev-shm-usage", f"window-size={size[0]},{size[1]}", *flags):
        options.add_argument(f"--{flag}")
    chrome = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        chrome.get(page.absolute().as_uri())
        chrome.execute_script("document.querySelector('#explorer').scrollIntoView({behavior: 'instant'})")
        chrome.set_script_timeout(300)
        found = chrome.execute_script(PARTS)
        return {**found, "frames_per_s": chrome.execute_async_script(FRAMES)}
    finally:
        chrome.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 800), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--flags", nargs="*", default=["disable-gpu"], help="of Chromium, without dashes (%(default)s)")
    options = parser.parse_args()
    found = measure(options.page, tuple(options.size), options.flags)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
