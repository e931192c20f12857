"""The house's rules, checked on the source text: sizes, floors, and every fact known in one module only.

``make house`` runs these alone: they import none of the package, and take a second or two. The floors themselves are a
contract of import-linter, in pyproject.toml.
"""

import ast
import graphlib
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexlib"

MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
ALLOWED_SIZES = {  # functions of Triton kernels, and why they must be so large
    "flexlib.projection.cuda._add_within_run": "a scan's function takes every number as an argument of its own",
}

# What the Snakefile imports: Snakemake's own environment has these libraries and no others of ours
LIGHT = ("flexlib.errors", "flexlib.files", "flexlib.layout", "flexlib.records", "flexlib.workflow_support")
LIGHT_LIBRARIES = {"yaml", "jsonschema"}

# Who may read (or write) a file format: by library, or by the function of a library that reads more than one
FORMATS = {
    "mrcfile": {"flexlib.imaging.maps", "flexlib.images.stack"},  # maps; stacks of images
    "meshio": {"flexlib.tetra.io"},
    "gemmi": {"flexlib.atoms.model"},
    "scipy.spatial.cKDTree": {"flexlib.runtime", "flexlib.atoms.ride"},  # the latter: its type
    "h5py": {"flexlib.mesh.segments"},  # Segger's .seg
    "pickle": {"flexlib.mesh.cryosparc"},  # CryoSPARC's flex_mesh, by an unpickler that builds arrays only
    "cramjam": {"flexlib.particles.cs_file"},
    "starfile": set(),  # the tests' second opinion; the package keeps a STAR file as text
    "json.loads": {
        "flexlib.files",
        "flexlib.particles.cs_file",  # the header of a compressed .cs
        "flexlib.particles.star",  # Zernike coefficients and matrices in a column
        "flexlib.provenance.write",  # the config turned into plain values
        "flexlib.train.results",  # settings likewise
        "flexlib.workflow_support.schema",  # tuples turned into lists
    },
    "flexlib.files.read_json": {"flexlib.records", "flexlib.report.results"},  # the latter: figures of the mesh
    "flexlib.files.write_json": {"flexlib.records", "flexlib.mesh.build", "flexlib.provenance.write"},
    "numpy.load": {
        "flexlib.untrusted",  # the user's .npy
        "flexlib.report.results",  # the simulation's truth
    },
    "torch.load": {"flexlib.runtime"},  # a model; a checkpoint
    "pandas.read_csv": {
        "flexlib.particles.star_text",  # rows of a STAR table
        "flexlib.report.results",  # the run's tables, for the report
    },
    "csv.DictReader": {
        "flexlib.mesh.weights",  # the user's weights
        "flexlib.particles.listed",  # the user's list of particles
        "flexlib.workflow_support.scores",  # held-out scores
    },
    "csv.reader": set(),
}


@cache
def tree(path: Path) -> ast.Module:
    """The parsed module at ``path``."""
    return ast.parse(path.read_text(), str(path))


def modules() -> dict[str, Path]:
    """Files of the package by the dotted names of their modules."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(paths.items())}


def is_part_of(module: str, packages: tuple[str, ...]) -> bool:
    """Whether ``module`` is one of ``packages``, or in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports, at any depth: "json", "flexlib.files.read_json"."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used_names(path: Path) -> Iterator[str]:
    """Imported names, and dotted ones that start from an imported module: "numpy.load" of ``np.load``."""
    yield from imported_names(path)
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}"


# Sizes


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Dotted name, definition and number of parameters (``self`` and ``cls`` not counted) of every function."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [argument.arg for argument in child.args.posonlyargs + child.args.args]
                bound = bool(parameters) and parameters[0] in ("self", "cls")
                count = len(parameters) + len(child.args.kwonlyargs) - bound
                yield f"{prefix}.{child.name}", child, count
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, f"{prefix}.{child.name}" if named else prefix)

    return walk(tree(path), "")


def test_modules_and_functions_are_short():
    found = []
    for module, path in modules().items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_MODULE_LINES:
            found.append(f"{module}: {lines} lines")
        for name, node, parameters in functions(path):
            length = node.end_lineno - node.lineno + 1
            if (length > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS) and module + name not in ALLOWED_SIZES:
                found.append(f"{module}{name}: {length} lines, {parameters} parameters")
    assert not found, "\n".join(["too large:", *found])


def test_allowed_sizes_are_still_needed():
    large = {
        module + name
        for module, path in modules().items()
        for name, node, parameters in functions(path)
        if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS
    }
    assert set(ALLOWED_SIZES) <= large


# Imports


def test_no_import_circles():
    """Among modules, with imports inside functions, and also within one room."""
    graph = grimp.build_graph("flexlib", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("a circle: " + " <- ".join(error.args[1])) from None


def test_the_workflow_needs_only_the_standard_library_yaml_and_jsonschema():
    found = [
        f"{module} imports {name}"
        for module, path in modules().items()
        if is_part_of(module, LIGHT)
        for name in imported_names(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, *LIGHT_LIBRARIES}
        and not is_part_of(name, LIGHT)
        and name != "flexlib.__version__"
    ]
    assert not found, "\n".join(found)


def test_a_file_format_is_known_in_one_module():
    found = [
        f"{module} uses {name}; {', '.join(sorted(allowed)) or 'no module'} may"
        for module, path in modules().items()
        for name in sorted(set(used_names(path)))
        for known, allowed in FORMATS.items()
        if is_part_of(name, (known,)) and module not in allowed
    ]
    assert not found, "\n".join(found)
    assert set().union(*FORMATS.values()) <= set(modules())


# File names


def docstrings(module: ast.Module) -> set[int]:
    """Identities of the nodes of a module's docstrings, of attributes too."""
    return {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def texts(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the strings in code; what an f-string fills in is ``{}``."""
    skipped = docstrings(module)
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(value) for value in node.values)
            parts = (value.value if isinstance(value, ast.Constant) else "{}" for value in node.values)
            yield node.lineno, "".join(parts)
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def last_part(text: str) -> str:
    """The file's name of a path."""
    return text.rsplit("/", 1)[-1]


def layout_names() -> list[str]:
    """File names that layout spells; "frame_{}.mrc" where a part is filled in."""
    found = {last_part(text) for _, text in texts(tree(PACKAGE / "layout.py"))}
    names = sorted(name for name in found if re.fullmatch(r"[\w{}]*\w[\w{}]*\.[a-z]\w{1,4}|\{\}\.[a-z]\w{1,4}", name))
    assert len(names) > 30, "where are they?"
    return names


def snakemake_texts(path: Path) -> Iterator[tuple[int, str]]:
    """As ``texts``, of a file of Snakemake rules, where what is filled in by Snakemake is ``{}`` too."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    for token in tokens:
        if token.type == tokenize.STRING and '"""' not in token.string:
            text = re.sub(r"^[a-zA-Z]*[\"']|[\"']$", "", token.string)
            yield token.start[0], re.sub(r"\{+[^{}]*\}+", "{}", text)


def test_a_file_name_is_known_to_layout_only():
    known = re.compile("|".join(re.escape(name).replace(r"\{\}", r"[\w{}]+") for name in layout_names()))
    code = [path for path in modules().values() if path != PACKAGE / "layout.py"]
    code += sorted((ROOT / "workflow/scripts").glob("*.py"))
    rules = [ROOT / "Snakefile", *sorted((ROOT / "workflow").glob("**/*.smk")), ROOT / "workflow/Snakefile"]
    lines = [(path, line, text) for path in code for line, text in texts(tree(path))]
    lines += [(path, line, text) for path in rules if path.exists() for line, text in snakemake_texts(path)]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path, line, text in lines
        if not re.search(r"\s", text)
        and text != "config/config.yaml"
        and (known.fullmatch(last_part(text)) or "cells~" in text)
    ]
    assert not found, "\n".join(["names of files outside layout.py:", *found])


# One source for each fact


def test_version_is_the_same_everywhere():
    assigned = re.search(r'^__version__ = "(.*)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "flexlib.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == assigned[1]


def test_exceptions_of_the_type_checker_exist():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    listed = {module for override in overrides for module in override["module"]}
    assert {module for module in listed if module.startswith("flexlib")} <= set(modules())


def parameters_of(module: str, function: str) -> list[str]:
    """Names of a function's parameters; the function may be in any module of a package."""
    for name, path in modules().items():
        if is_part_of(name, (module,)):
            for node in tree(path).body:
                if isinstance(node, ast.FunctionDef) and node.name == function:
                    return [argument.arg for argument in node.args.args + node.args.kwonlyargs]
    raise AssertionError(f"{module}.{function} does not exist")


def test_pages_name_files_and_signatures_that_exist():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "config/README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    for page in pages:
        for path in re.findall(
            r"\b((?:flexlib|workflow|tests|benchmarks)/[\w/]+\.(?:py|smk|yaml|sh))\b", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    signatures = re.findall(r"`(flexlib[\w.]*)\.(\w+)\(([^)]*)\)`", (ROOT / "docs/architecture.md").read_text())
    assert len(signatures) == 13
    for module, function, listed in signatures:
        names, found = listed.split(", "), parameters_of(module, function)
        assert names == found if names[-1] != "..." else names[:-1] == found[: len(names) - 1], f"{function}: {found}"
