"""Chromium without a display, and a hand on its mouse: what the report's pages are tested with."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60  # for a slow machine; nothing waits that long elsewhere


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def open_browser(downloads: Path, *flags: str) -> Chrome:
    """Chromium without a display, at 1280 x 800, that keeps downloads and logs of console and network."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    assert browser and driver, "these tests open the report: install with apt-get install chromium chromium-driver"
    options = ChromeOptions()
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,800", *flags):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=Service(driver))


def scroll_to(page: Chrome, selector: str) -> dict[str, float]:
    """Bring an element to the middle of the window; its rectangle in window coordinates."""
    return page.execute_script(
        "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const {left, top, width, height} = e.getBoundingClientRect(); return {left, top, width, height}",
        selector,
    )


def drag(page: Chrome, path: np.ndarray) -> None:
    """Press the mouse at the first of (m, 2) window positions, move through the others, let go."""
    actions = ActionBuilder(page, duration=20)
    mouse = actions.pointer_action
    mouse.move_to_location(*(int(v) for v in path[0]))
    mouse.pointer_down()
    for position in path[1:]:
        mouse.move_to_location(*(int(v) for v in position))
    mouse.pointer_up()
    actions.perform()


def console_errors(page: Chrome) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def requests(page: Chrome) -> set[str]:
    """Addresses that the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    sockets = [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    return {url for url in (*sent, *sockets) if not url.startswith(("data:", "blob:"))}
