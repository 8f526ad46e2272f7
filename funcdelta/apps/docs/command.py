"""``funcdelta docs``: the pages in a folder, the entry of a name in the terminal, and what is undocumented."""

from __future__ import annotations

import difflib
from pathlib import Path

from ...errors import FuncdeltaError
from .markdown import plain
from .pages import INDEX, links, pages, told
from .public import everything, lacking


class UndocumentedError(FuncdeltaError):
    """Public names lack a docstring, types or an example; the message lists them all."""


def run(what: str | None = None) -> str:
    """The answer of ``funcdelta docs what``: a name's entry or page, the index, or where the pages are written.

    >>> run("fd.tree.add").splitlines()[0]
    '## fd.tree.add'
    >>> run("LoraConfg")
    Traceback (most recent call last):
    ...
    funcdelta.errors.FuncdeltaError: no public name is LoraConfg; did you mean LoraConfig? (A folder: ./LoraConfg)
    """
    if what is None:
        return plain(checked()[INDEX])
    found = found_by(what)
    if found:
        return "\n\n".join(found)
    last = {path.rpartition(".")[2] for path, _ in everything()}
    near = [] if "/" in what or Path(what).is_dir() else difflib.get_close_matches(what, sorted(last), cutoff=0.8)
    if near:
        raise FuncdeltaError(f"no public name is {what}; did you mean {' or '.join(near)}? (A folder: ./{what})")
    written = checked()
    folder = Path(what)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return f"{len(written)} pages in {folder}/, beginning with {INDEX}"


def checked() -> dict[str, str]:
    """The pages, where no public name lacks anything.

    >>> INDEX in checked()
    True
    """
    found = [line for path, value in everything() for line in lacking(path, value)]
    if found:
        raise UndocumentedError("\n".join(found))
    return pages()


def found_by(what: str) -> list[str]:
    """The entry of a public name or method, written in full or by its end; of a namespace, its page.

    >>> [text.splitlines()[0] for text in (*found_by("scale"), *found_by("fd.DeltaModel.apply"), *found_by("metrics"))]
    ['## fd.algebra.scale', '## fd.tree.scale', '### fd.DeltaModel.apply', '# fd.metrics']
    """
    name = what.removeprefix("funcdelta.").removeprefix("fd.")
    known = links()
    paths = [path for path in known.where if path == f"fd.{name}"]
    paths = paths or [path for path in known.where if path.endswith(f".{name}")]
    # A name that is public in two places has one entry.
    return [plain(told(path, known)) for path in dict.fromkeys(known.home(path) for path in paths)]
