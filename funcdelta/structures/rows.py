"""How a table of common names is written and read: one row a module of a family, with ``*`` for a layer's number.

A table maps a module's own dotted name, as it stands below whatever wraps the model, to

* its common name, or several (``("ff@.w1@", "ff@")``): the first is its name, the others are names it answers to;
* :class:`Fused`, where one layer computes several projections at once;
* for a numbered layer (``"encoder.layer.*"``) a table of what is inside it, by names relative to the layer.

What a table leaves out keeps its own name, below the common name of what contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .parts import Part

Layout = Callable[[Any, Sequence[str], int], tuple[Part, ...]]
"""``layout(model config, names, width)``: where the named parts lie among ``width`` features."""


@dataclass(frozen=True)
class Fused:
    """A layer that computes several projections at once.

    Attributes:
        owner: common name of the module that the projections belong to.
        names: what the parts are called, in their order.
        layout: where they lie.
        whole: common name of the layer itself; without one, the names of all parts (``attn@.q,k,v@``).

    >>> from funcdelta.structures.layouts import side_by_side
    >>> Fused("attn@", ("q", "k", "v"), side_by_side).common
    'attn@.q,k,v@'
    """

    owner: str
    names: tuple[str, ...]
    layout: Layout
    whole: str = ""

    @property
    def common(self) -> str:
        """The common name of the whole layer."""
        return self.whole or f"{self.owner}.{','.join(self.names)}@"


Table = Mapping[str, "str | tuple[str, ...] | Fused | Table"]


@dataclass(frozen=True)
class Row:
    """One row as it is looked up: full common names with ``*`` for numbers, and what is fused there."""

    names: tuple[str, ...]
    fused: Fused | None = None
    owner: str = ""


@dataclass
class Node:
    """Rows by the tokens of their own names."""

    row: Row | None = None
    below: dict[str, Node] = field(default_factory=dict)

    def add(self, own: str, row: Row) -> None:
        """Put ``row`` under the dotted name ``own``."""
        node = self
        for token in own.split("."):
            node = node.below.setdefault(token, Node())
        node.row = row

    def longest(self, tokens: Sequence[str]) -> tuple[Row, int, list[str]] | None:
        """The row of the longest name that ``tokens`` begin with, that name's length, and the numbers in it."""
        node, numbers, found = self, [], None
        for count, token in enumerate(tokens, 1):
            if token in node.below:
                node = node.below[token]
            elif token.isdigit() and "*" in node.below:
                node = node.below["*"]
                numbers.append(token)
            else:
                break
            if node.row is not None:
                found = node.row, count, list(numbers)
        return found


@dataclass(frozen=True)
class Rows:
    """A table made ready for look-ups: of a whole model, and of a stack of layers that is used without its model."""

    whole: Node
    bare: Node


def read(table: Table) -> Rows:
    """A table made ready for look-ups.

    >>> rows = read({"decoder.h": "block@", "decoder.h.*": {"attn": "attn@"}})
    >>> rows.whole.longest(["decoder", "h", "3", "attn", "bias"])
    (Row(names=('block@.*.attn@',), fused=None, owner=''), 4, ['3'])
    >>> rows.bare.longest(["h", "3", "attn", "bias"])[1]
    3
    """
    rows = Rows(Node(), Node())
    _read(rows.whole, table, "", "")
    _read(rows.bare, _stacks(table), "", "")
    return rows


def _stacks(table: Table) -> Table:
    """The layers of each stack by the last token of its name, where all stacks of that name are built alike."""
    merged: dict[str, dict[str, Any] | None] = {}
    for own, layer in table.items():
        if isinstance(layer, Mapping):
            name = own.removesuffix(".*").rpartition(".")[2]
            known = merged.setdefault(name, {})
            if known is not None and any(known.get(key, entry) != entry for key, entry in layer.items()):
                merged[name] = None  # one name means this in the encoder and that in the decoder
            elif known is not None:
                known.update(layer)
    stacks: dict[str, Any] = {}
    for name, layer in merged.items():
        if layer is not None:
            stacks |= {name: "block@", f"{name}.*": layer}
    return stacks


def _read(root: Node, table: Table, own_prefix: str, prefix: str) -> None:
    for own, entry in table.items():
        path = own_prefix + own
        if isinstance(entry, Mapping):
            container = table[own.removesuffix(".*")]
            assert isinstance(container, str), f"{path}: what holds the layers has one common name"
            layer = f"{prefix}{container}.*"
            root.add(path, Row((layer,)))
            _read(root, entry, path + ".", layer + ".")
        elif isinstance(entry, Fused):
            root.add(path, Row((prefix + entry.common,), entry, prefix + entry.owner))
        else:
            names = (entry,) if isinstance(entry, str) else entry
            root.add(path, Row(tuple(prefix + name for name in names)))


@dataclass(frozen=True)
class Translation:
    """What a module is called: its common name, the others it answers to, and the parts of its output.

    >>> Translation(("attn@.q@",)).name
    'attn@.q@'
    """

    names: tuple[str, ...]
    fused: Fused | None = None
    owner: str = ""

    @property
    def name(self) -> str:
        """The common name; tokens that no table knows stand as they are."""
        return self.names[0]

    def under(self, path: str) -> Translation:
        """The same below ``path``.

        >>> Translation(("attn@.q@",)).under("encoder").name
        'encoder.attn@.q@'
        """
        if not path:
            return self
        owner = f"{path}.{self.owner}" if self.owner else ""
        return Translation(tuple(f"{path}.{name}" for name in self.names), self.fused, owner)

    def part_name(self, part: str) -> str:
        """The common name of one part of a fused output."""
        return f"{self.owner}.{part}@"


def translate(tokens: Sequence[str], rows: Rows) -> Translation:
    """The common names of a path: the leftmost stretch that a table knows is translated, the rest stays.

    >>> rows = read({"h": "block@", "h.*": {"attn": "attn@"}})
    >>> translate(["transformer", "h", "3", "attn", "bias"], rows).name
    'transformer.block@.3.attn@.bias'
    """
    for start, root in [(start, root) for root in (rows.whole, rows.bare) for start in range(len(tokens))]:
        found = root.longest(tokens[start:])
        if found is None:
            continue
        row, count, numbers = found
        before, after = list(tokens[:start]), list(tokens[start + count :])

        def placed(name: str, numbers: list[str] = numbers, before: list[str] = before) -> str:
            given = iter(numbers)
            return ".".join([*before, *(next(given) if token == "*" else token for token in name.split("."))])

        names = tuple(".".join([placed(name), *after]) for name in row.names)
        if row.fused is None or after:
            return Translation(names)
        return Translation(names, row.fused, placed(row.owner))
    return Translation((".".join(tokens),))
