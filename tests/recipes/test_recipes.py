"""Recipes stay short, and stand on public functions alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import funcdelta.recipes

LIMIT = 20
FILES = [
    Path(importlib.import_module(f"funcdelta.recipes.{found.name}").__file__ or "")
    for found in pkgutil.iter_modules(funcdelta.recipes.__path__)
]


def lines_of_code(function: ast.FunctionDef) -> int:
    """The lines of the body without its docstring and without what is blank."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return sum(statement.end_lineno - statement.lineno + 1 for statement in body if statement.end_lineno)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_has_at_most_twenty_lines(file: Path) -> None:
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert functions
    assert {f.name: lines_of_code(f) for f in functions if lines_of_code(f) > LIMIT} == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_uses_public_functions_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import funcdelta as fd"
            assert not (node.module or "").startswith("funcdelta"), f"line {node.lineno}: {node.module} is not public"
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"line {node.lineno}: {node.attr} is private"
