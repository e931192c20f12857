"""The report's HTML: templates filled in by jinja2, which escapes everything that comes from files or settings."""

from __future__ import annotations

import base64
import functools
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flexlib.layout import RunFolder
from flexlib.report.formats import number
from flexlib.report.packing import column_label

_PACKAGE = "flexlib.report"


@functools.cache
def environment() -> Environment:
    """The templates; ``run`` in them names the files of a run, from its folder on."""
    templates = Environment(
        loader=PackageLoader(_PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.globals["run"] = RunFolder(Path())
    templates.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "column_label": column_label,
        "fixed": lambda value, decimals: f"{value:.{decimals}f}",
        "number": number,
        "script_json": script_json,
        "thousands": lambda count: f"{count:,}",
    }
    return templates


def render(template: str, **values: Any) -> Markup:
    """The HTML of ``templates/<template>.html.j2``; text in ``values`` is escaped, ``Markup`` is taken as it is."""
    return Markup(environment().get_template(f"{template}.html.j2").render(values))


def script_json(content: str) -> Markup:
    """JSON text for the inside of a script element, which it cannot end early."""
    return Markup(content.replace("</", "<\\/").replace("<!--", "\\u003c!--"))


def own_file(name: str) -> Markup:
    """The text of a style sheet or script of this package."""
    return Markup(resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8"))
