"""How a table of common names is written and read: one row per module of a family, with ``*`` for a layer's number.

A table maps a module's own dotted name, without any wrapper's prefix, to

* its common name, or several (``("ff@.w1@", "ff@")``): the first is its name, the others are aliases;
* :class:`Fused`, if one layer computes several projections at once;
* for a numbered layer (``"encoder.layer.*"``), a table of its contents, by names relative to the layer.

Modules that a table leaves out keep their own names, below the common name of the module that contains them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .parts import Part

Layout = Callable[[Any, Sequence[str], int], tuple[Part, ...]]
"""``layout(model config, names, width)`` returns the named parts of ``width`` features."""


@dataclass(frozen=True)
class Fused:
    """A layer that computes several projections at once.

    Attributes:
        owner: common name of the module that the projections belong to.
        names: the names of the parts, in order.
        layout: says where the parts are.
        whole: common name of the layer itself; by default, the names of all parts (``attn@.q,k,v@``).

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
    """One row prepared for look-ups: full common names with ``*`` for numbers, and the fused layer, if any."""

    names: tuple[str, ...]
    fused: Fused | None = None
    owner: str = ""


@dataclass
class Node:
    """A tree of rows by the tokens of their own names."""

    row: Row | None = None
    below: dict[str, Node] = field(default_factory=dict)

    def add(self, own: str, row: Row) -> None:
        """Put ``row`` under the dotted name ``own``."""
        node = self
        for token in own.split("."):
            node = node.below.setdefault(token, Node())
        node.row = row

    def longest(self, tokens: Sequence[str]) -> tuple[Row, int, list[str]] | None:
        """``(row, length, numbers)`` of the longest name that ``tokens`` begin with."""
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
    """A table prepared for look-ups: of a whole model, and of a stack of layers used without its model."""

    whole: Node
    bare: Node


def read(table: Table) -> Rows:
    """Prepare a table for look-ups.

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
    """A table of stacks by the last token of their names, without names whose stacks are built differently."""
    merged: dict[str, dict[str, Any] | None] = {}
    for own, layer in table.items():
        if isinstance(layer, Mapping):
            name = own.removesuffix(".*").rpartition(".")[2]
            known = merged.setdefault(name, {})
            if known is not None and any(known.get(key, entry) != entry for key, entry in layer.items()):
                merged[name] = None  # the name means different things in encoder and decoder
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
            assert isinstance(container, str), f"{path}: the container of layers needs exactly one common name"
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
    """The names of a module, the common name first and then aliases, and the fused parts of its output.

    >>> Translation(("attn@.q@",)).name
    'attn@.q@'
    """

    names: tuple[str, ...]
    fused: Fused | None = None
    owner: str = ""

    @property
    def name(self) -> str:
        """The common name; tokens that are in no table stay as they are."""
        return self.names[0]

    def under(self, path: str) -> Translation:
        """The same translation with ``path`` in front of every name.

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
    """The common names of a path, in which the leftmost stretch found in the table is translated.

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
