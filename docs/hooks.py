"""Pages of the site that are not in docs/: the README and its like, and a reference for each room of the package."""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TITLES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINKS = {
    "LICENSE": "license.md",
    "config/README.md": "config.md",
    "config/examples": "examples.md",
    "examples": "examples.md",
    **TITLES,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the rooms' pages into the navigation."""
    config.nav = [*(config.nav or []), {"Reference": list(reference())}]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""

    def turned(match: re.Match[str]) -> str:
        path, anchor = match[1].removeprefix("../").removeprefix("docs/"), match[2] or ""
        return f"]({LINKS.get(path, path)}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", turned, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {target: (ROOT / source).read_text() for source, target in TITLES.items()}
    pages["config.md"] = (ROOT / "config/README.md").read_text()
    pages["license.md"] = "# License\n\n" + (ROOT / "LICENSE").read_text()
    pages["examples.md"] = "# Example configs\n" + "".join(
        f"\n## {path.stem}\n\n```yaml\n{path.read_text()}```\n"
        for path in sorted((ROOT / "config/examples").glob("*.yaml"))
    )
    pages |= reference()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def rooms() -> dict[str, list[Path]]:
    """The modules of each package directly below flexlib, and the single modules as rooms of their own."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "flexlib").iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            found[path.name] = [file for file in sorted(path.glob("*.py")) if file.stem != "__main__"]
        elif path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [path]
    return found


def reference() -> dict[str, str]:
    """A page for each room, and one that lists them by what their docstrings say."""
    pages, lines = {}, ["# Reference\n", "| room | what it holds |", "|---|---|"]
    for room, paths in rooms().items():
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
        pages[f"reference/{room}.md"] = f"# {room}\n" + "".join(f"\n::: {name}\n" for name in names)
        first = (ast.get_docstring(ast.parse(paths[0].read_text())) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [`{room}`]({room}.md) | {first} |")
    return {"reference/index.md": "\n".join(lines) + "\n", **pages}
