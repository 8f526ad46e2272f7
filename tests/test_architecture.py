"""Imports point one way: each package stands on those named before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import funcdelta

ROOT = Path(funcdelta.__file__).parent
FROM_BELOW = (
    *("errors", "locks", "randomness", "match", "metrics", "transforms", "pytrees", "tree", "functional"),
    *("sites", "structures", "config", "planning", "fresh", "stacks", "run", "deltas"),
    *("merge", "views", "files", "derivatives", "habits", "model"),
    *("from_module", "packing", "optim", "algebra", "distributed", "inspect", "picker", "auto", "interop"),
    *("recipes", "train", "bench", "costs", "cli", "__main__", "__init__"),
)
"""Where a module imports another only in a function or for its types, that is no import of its file."""


def place(module: str) -> str:
    """The package or the module right under ``funcdelta`` that a dotted name stands in."""
    return ([*module.split("."), "__init__"])[1]


def imported(file: Path) -> Iterator[str]:
    """What a file imports from funcdelta when it is imported itself."""
    package = ["funcdelta", *file.parent.relative_to(ROOT).parts]
    for node in ast.parse(file.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        start = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*start, *([node.module] if node.module else [])])
        if module == "funcdelta":
            yield from (f"funcdelta.{name.name}" for name in node.names)
        elif module.startswith("funcdelta."):
            yield module


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = place(".".join(["funcdelta", *file.relative_to(ROOT).with_suffix("").parts]))
    upwards = [name for name in imported(file) if FROM_BELOW.index(place(name)) > FROM_BELOW.index(own)]
    assert upwards == [], f"{own} stands below what it imports"


def test_every_package_has_a_place() -> None:
    found = {entry.stem for entry in ROOT.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    assert found == set(FROM_BELOW)
