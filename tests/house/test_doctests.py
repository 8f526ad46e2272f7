"""Every example in a docstring runs, and the methods of a delta have one (public names: test_public_names.py)."""

from __future__ import annotations

import doctest
import importlib
import importlib.resources
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcdelta as fd

GLOBALS = {"fd": fd, "torch": torch, "nn": nn, "F": F}
MODULES = sorted(
    {"funcdelta", *(found.name for found in pkgutil.walk_packages(fd.__path__, "funcdelta."))} - {"funcdelta.__main__"}
)


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The docstrings of ``module`` that have examples; its own names go before the ones that all may use."""
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs=GLOBALS | vars(module) | {"fd": fd})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    report: list[str] = []
    for test in examples(importlib.import_module(name)):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_the_methods_of_a_delta_have_examples() -> None:
    refused = {"train", "eval", "forward"}
    methods = {name for name, value in vars(fd.DeltaModel).items() if inspect.isfunction(value) and name[0] != "_"}
    assert not [name for name in methods - refused if ">>>" not in (inspect.getdoc(getattr(fd.DeltaModel, name)) or "")]


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files(fd).joinpath("py.typed").is_file()
