"""Docstrings' text as Markdown: Sphinx roles become links or code, double backticks single ones; tables and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ROLE = re.compile(r":([a-z]+):`([^`]+)`")


@dataclass(frozen=True)
class Links:
    """Where each public name and its methods are described: ``{path: page#anchor}``."""

    where: Mapping[str, str]

    def text(self, text: str, space: str = "fd") -> str:
        """``text`` with roles as links where the name has an entry, as seen from the namespace or class ``space``.

        >>> known = Links({"fd.optim.sgd": "optim.md#fd.optim.sgd"})
        >>> known.text("As :func:`sgd` or :func:`~funcdelta.x.f` do, in ``x``.", "fd.optim")
        'As [`sgd`](optim.md#fd.optim.sgd) or `f` do, in `x`.'
        """
        told = ROLE.sub(lambda role: self._role(role[1], role[2], space), text)
        return re.sub(r"``(.+?)``", r"`\1`", told, flags=re.DOTALL)

    def home(self, path: str) -> str:
        """The path under which ``path`` has its entry, which may be another one.

        >>> Links({"fd.grad.hvp": "grad.md#fd.grad.hvp", "fd.grad": "grad.md"}).home("fd.grad.hvp")
        'fd.grad.hvp'
        """
        return self.where[path].partition("#")[2] or path

    def to(self, path: str, shown: str | None = None) -> str:
        """A link to the entry of ``path``, which is shown as ``shown``.

        >>> Links({"fd.take": "funcdelta.md#fd.take"}).to("fd.take")
        '[`fd.take`](funcdelta.md#fd.take)'
        """
        return f"[`{shown or path}`]({self.where[path]})"

    def _role(self, kind: str, target: str, space: str) -> str:
        if kind == "math":
            return f"${target}$"
        name = target.lstrip("~").lstrip(".")
        shown = name.rpartition(".")[2] if target.startswith("~") else name
        below = "fd." + name.removeprefix("funcdelta.")
        for path in (f"{space}.{name}", f"{space.rpartition('.')[0]}.{name}", below):
            if path in self.where:
                return self.to(path, shown)
        return f"`{shown}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; ``|`` in a cell is escaped.

    >>> print(table(["name", "type"], [("x", "`int | None`")]))
    | name | type |
    |---|---|
    | x | `int \\| None` |
    """
    lines = [head, ["---"] * len(head)]
    shown = ["| " + " | ".join(lines[0]) + " |", "|" + "|".join(lines[1]) + "|"]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join([*shown, *("| " + " | ".join(row) + " |" for row in cells)])


def code(text: str, language: str) -> str:
    """A block of code.

    >>> print(code("x = 1", "python"))
    ```python
    x = 1
    ```
    """
    return f"```{language}\n{text}\n```"


def plain(text: str) -> str:
    """Markdown for a terminal: links as their text, without anchors.

    >>> plain('<a id="fd.take"></a>\\n\\nSee [`fd.take`](funcdelta.md#fd.take).')
    'See `fd.take`.'
    """
    without = re.sub(r'<a id="[^"]*"></a>\n*', "", text)
    return re.sub(r"\[(`[^`]+`)\]\([^)\s]+\)", r"\1", without)
