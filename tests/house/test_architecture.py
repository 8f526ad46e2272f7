"""Imports point one way: every package and every file builds on those below it, wherever in a file the import is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import funcdelta

ROOT = Path(funcdelta.__file__).parent
FROM_BELOW = (
    *("errors", "locks", "transforms", "randomness", "match", "kinds", "metrics", "trees", "tree", "functional"),
    *("files", "structures", "methods", "plan", "fresh", "run", "deltas"),
    *("merge", "views", "derivatives", "grad", "habits", "optim", "apps.inspect", "inspect", "model", "loading"),
    *("distributed", "from_module", "packing", "algebra", "apps.picker", "auto", "interop", "__init__"),
    *("recipes", "apps.train", "apps.bench", "apps.costs", "apps.docs", "apps.cli", "apps", "__main__"),
)
"""Packages and modules right under ``funcdelta``; ``__init__`` is ``funcdelta`` itself, on which recipes build."""


def dotted(file: Path) -> str:
    """The name by which a file of the package is imported."""
    parts = ["funcdelta", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(source: str, package: str) -> Iterator[str]:
    """The files of funcdelta that a file in ``package`` imports, also inside of functions and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = (f"{module}.{name.name}" for name in node.names)
            yield from (name if name in FILES else module for name in names if name in FILES or module in FILES)


def imports_of(name: str) -> set[str]:
    """The files that the file ``name`` imports."""
    file = FILES[name]
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    return set(imported(file.read_text(), package)) - {name}


def place(module: str) -> str:
    """The package or module right under ``funcdelta`` that a dotted name belongs to; of ``apps``, the application."""
    _, first, *below = [*module.split("."), "__init__"]
    return f"{first}.{below[0]}" if first == "apps" and below[0] != "__init__" else first


@pytest.mark.parametrize(
    "source",
    [
        "from ..run.fold import Folded",
        "from ..run import fold",
        "from funcdelta.run.fold import Folded",
        "import funcdelta.run.fold",
        "def call():\n    from ..run.fold import Folded",
        "if TYPE_CHECKING:\n    from ..run.fold import Folded",
    ],
)
def test_every_way_to_import_counts(source: str) -> None:
    assert list(imported(source, "funcdelta.views")) == ["funcdelta.run.fold"]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name: str) -> None:
    own = FROM_BELOW.index(place(name))
    upwards = sorted(found for found in imports_of(name) if FROM_BELOW.index(place(found)) > own)
    assert upwards == [], f"{name} is below what it imports"


def test_no_files_import_each_other() -> None:
    try:
        TopologicalSorter({name: imports_of(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail("these files import each other: " + " -> ".join(reversed(error.args[1])))


def test_every_package_has_a_place() -> None:
    assert {place(name) for name in FILES} == set(FROM_BELOW)
