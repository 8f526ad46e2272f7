"""The reference: every public name is on its page, links resolve, examples are the doctests' own, gaps are refused."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import funcdelta as fd
from funcdelta.apps import cli
from funcdelta.apps.docs.docstring import Docstring
from funcdelta.apps.docs.markdown import Links, plain
from funcdelta.apps.docs.pages import pages
from funcdelta.apps.docs.public import everything, fields_of, lacking, members_of
from funcdelta.apps.docs.signature import signature_of

LINK = re.compile(r"\]\(([^)\s]+\.md)(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return pages()


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)


def test_every_public_name_and_method_has_one_entry(reference: dict[str, str]) -> None:
    anchors = re.findall(r'<a id="(.+?)"></a>', "".join(reference.values()))
    assert len(anchors) == len(set(anchors))
    shown = {path: value for path, value in everything() if not inspect.ismodule(value)}
    first = {id(shown[path]): path for path in sorted(shown, key=lambda path: -path.count("."))}
    methods = {f"{first[id(value)]}.{name}" for value in shown.values() if isinstance(value, type)
               for name, _ in members_of(value)}  # fmt: skip
    assert set(anchors) == {*first.values(), *methods}
    assert {"fd.DeltaModel.apply", "fd.DeltaModel.sites", "fd.AutoDeltaModel.from_finetuned"} <= methods


def test_every_link_resolves(reference: dict[str, str]) -> None:
    links = [found for page in reference.values() for found in LINK.findall(without_code(page))]
    assert len(links) > 200
    missing = [
        (file, anchor)
        for file, anchor in links
        if file not in reference or (anchor and f'<a id="{anchor}"></a>' not in reference[file])
    ]
    assert missing == []


def test_the_examples_are_those_that_the_doctests_run(reference: dict[str, str]) -> None:
    blocks = re.findall(r"^```pycon\n(.*?)^```$", "".join(reference.values()), re.DOTALL | re.MULTILINE)
    shown = [example for block in blocks for example in doctest.DocTestParser().get_examples(block)]
    finder = doctest.DocTestFinder(recurse=False)
    run = [
        (example.source, example.want)
        for _, value in everything()
        for test in finder.find(value, module=False, name="x")
        for example in test.examples
    ]
    assert len(run) > 500
    assert {(example.source, example.want) for example in shown} >= set(run)


def test_sphinx_and_double_backticks_are_gone(reference: dict[str, str]) -> None:
    for name, page in reference.items():
        text = without_code(page)
        assert not re.search(r":\w+:`", text), name
        assert not re.search(r"(?<!`)``(?!`)", text), name


def test_a_config_shows_its_fields_with_defaults_and_what_they_are(reference: dict[str, str]) -> None:
    configs = [
        value for name, value in everything() if name.endswith("Config") and issubclass(value, fd.BaseDeltaConfig)
    ]
    assert len(configs) > 10
    for config in configs:
        text = "".join(reference.values()).partition(f".{config.__name__}\n\n```python\nclass")[2]
        for name, default in fields_of(config).items():
            (row, *_) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
            about = row.split(" | ")
            assert about[-2].strip("`") == ("" if default is inspect.Parameter.empty else repr(default)), row
            assert len(about[-1]) > 5, row
    assert "| `lora_alpha` | `float` | `16` | `s = lora_alpha / lora_r` (with" in reference["funcdelta.md"]


def undocumented(x): ...


def untyped(x):
    """A line.

    >>> 1
    1
    """


def without_example(x: int) -> int:
    """A line."""
    return x


class Bare:
    """A line.

    >>> 1
    1
    """

    def method(self, x) -> None: ...


@dataclasses.dataclass(frozen=True)
class FieldConfig(fd.BaseDeltaConfig):
    """A config.

    >>> 1
    1
    """

    depth: int = 1


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (undocumented, ["fd.new has no docstring", "fd.new has no example (>>>) in its docstring",
                        "fd.new has no types for x, return"]),
        (untyped, ["fd.new has no types for x, return"]),
        (without_example, ["fd.new has no example (>>>) in its docstring"]),
        (Bare, ["fd.new.method has no docstring", "fd.new.method has no types for x"]),
        (FieldConfig, ["fd.new.depth is not described"]),
    ],
)  # fmt: skip
def test_what_a_name_lacks_is_listed(
    value: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert lacking("fd.new", value) == lines
    monkeypatch.setattr(fd, "__all__", [*fd.__all__, "new"])
    monkeypatch.setattr(fd, "new", value, raising=False)
    assert cli.main(["docs", str(tmp_path / "reference")]) == 1
    told = capsys.readouterr().err
    assert told.splitlines() == ["funcdelta docs: these public names are not documented:", *lines]
    assert not (tmp_path / "reference").exists()


def test_a_folder_gets_a_page_a_namespace_and_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: dict[str, str]
) -> None:
    assert cli.main(["docs", str(tmp_path / "reference")]) == 0
    assert {file.name: file.read_text("utf-8") for file in (tmp_path / "reference").iterdir()} == reference
    assert capsys.readouterr().out == f"{len(reference)} pages in {tmp_path / 'reference'}/, beginning with index.md\n"


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("LoraConfig", ["## fd.LoraConfig"]),
        ("fd.optim.adamw", ["## fd.optim.adamw"]),
        ("adamw", ["## fd.optim.adamw"]),
        ("funcdelta.DeltaModel.apply_rows", ["### fd.DeltaModel.apply_rows"]),
        ("fd.grad.value_and_grad", ["## fd.value_and_grad"]),
        ("Leaf", ["## fd.inspect.Leaf", "## fd.methods.Leaf"]),
        ("metrics", ["# fd.metrics"]),
    ],
)
def test_a_name_prints_its_entry(name: str, heads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["docs", name]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == heads[0]
    assert set(heads) <= set(shown.splitlines())
    assert "<a id" not in shown
    assert "](" not in without_code(shown)


def test_without_a_name_the_index_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["docs"]) == 0
    assert "| `fd.recipes.soups` |" in capsys.readouterr().out


def test_a_misspelt_name_is_no_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["docs", "LoraConfg"]) == 2
    assert "no public name is LoraConfg; did you mean LoraConfig?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert cli.main(["docs", "file"]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (":func:`~funcdelta.optim.sgd` and ``x``", "[`sgd`](optim.md#fd.optim.sgd) and `x`"),
        (":func:`sgd`", "[`sgd`](optim.md#fd.optim.sgd)"),
        (":meth:`Config.step`", "[`Config.step`](optim.md#fd.optim.Config.step)"),
        (":mod:`.tracking` and :class:`~funcdelta.run.fold.Folded`", "`tracking` and `Folded`"),
        (r":math:`\frac{a}{b}`", r"$\frac{a}{b}$"),
    ],
)
def test_roles_become_links_or_code(text: str, shown: str) -> None:
    where = {path: f"optim.md#{path}" for path in ("fd.optim.sgd", "fd.optim.Config.step")}
    assert Links(where).text(text, "fd.optim") == shown
    assert ".md" not in plain(Links(where).text(text, "fd.optim"))


def test_docstrings_are_cut_where_the_doctests_cut_them() -> None:
    text = Docstring.parse(
        "One\nline.\n\nArgs:\n    a, b: two\n        lines.\n    *c: rest.\n\n>>> a\n1\n\nMore.\n>>> b"
    )
    assert text.first == "One line."
    assert text.described("Args") == {"a": "two lines.", "b": "two lines.", "*c": "rest."}
    assert [example.source for example in text.examples] == ["a\n", "b\n"]
    assert len(text.pieces) == 4


def long(one: dict[str, int], *two: tuple[int, ...], three: Callable[[int, int], int] = max, four: str = "a, b: c" * 9):
    raise NotImplementedError


def test_long_signatures_have_a_line_a_parameter() -> None:
    assert signature_of("f", long).splitlines()[:4] == [
        "f(",
        "    one: dict[str, int],",
        "    *two: tuple[int, ...],",
        "    three: Callable[[int, int], int] = max,",
    ]
