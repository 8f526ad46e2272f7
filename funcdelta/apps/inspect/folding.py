"""Fold equal siblings into one node, ``{0, 1, …, 11} → "0-11"``, and unfold them again.

Two siblings are equal if their classes, tensors (names, shapes, dtypes, kinds, ties) and deltas are equal, and so is
everything below them, names included. Their own names do not count: ``query`` and ``value`` fold to ``query,value``.
Every folded node knows the paths of the real modules that it represents, so no label is ever parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from .nodes import Leaf, Node, tree

__all__ = ["folded", "label", "unfold"]


def folded(model: nn.Module | Node) -> Node:
    """The tree of ``model`` (or a tree of real nodes) with equal siblings folded, at every level.

    A folded node takes the place of its first member. A child of a folded node represents modules in all members: its
    ``paths`` list them all.

    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.query, self.value = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    >>> layers = folded(torch.nn.Sequential(*(Block() for _ in range(3)))).children[0]
    >>> layers.name, layers.children[0].name, layers.children[0].paths
    ('0-2', 'query,value', ('0.query', '0.value', '1.query', '1.value', '2.query', '2.value'))
    """
    node = tree(model) if isinstance(model, nn.Module) else model
    return _fold(_reals([node]))


def unfold(node: Node) -> list[Node]:
    """A folded node taken apart one level: ``0-11`` becomes ``0``, ``1``, …, each still folded inside.

    A node with one name is returned as it is. Below a folded parent, each part still represents a module in each of the
    parent's: ``query,value`` below ``0-11`` becomes ``query`` (12 paths) and ``value`` (12 paths).

    >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    >>> [(part.name, part.paths) for part in unfold(folded(model).children[0])]
    [('0', ('0',)), ('1', ('1',)), ('2', ('2',))]
    """
    groups: dict[str, list[Node]] = {}
    for real in _reals([node]):
        groups.setdefault(real.name, []).append(real)
    return [node] if len(groups) == 1 else [_fold(group) for group in groups.values()]


def label(names: Iterable[str]) -> str:
    """What several siblings are called: numbers as ranges, then the other names in their order.

    >>> label(["0", "1", "2", "4", "5", "7"]), label(["query", "value"]), label(["1"])
    ('0-2,4-5,7', 'query,value', '1')
    """
    names = list(dict.fromkeys(names))
    numbers = sorted(int(name) for name in names if _is_number(name))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(start) if start == stop else f"{start}-{stop}" for start, stop in ranges]
    return ",".join([*texts, *(name for name in names if not _is_number(name))])


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _reals(nodes: Sequence[Node]) -> list[Node]:
    """The real nodes that ``nodes`` represent."""
    return [real for node in nodes for real in (node.members or (node,))]


def _fold(reals: Sequence[Node]) -> Node:
    """One node for equal real nodes, folded inside; being equal, their children agree one by one."""
    first = reals[0]
    groups: dict[object, list[int]] = {}
    for position, child in enumerate(first.children):
        groups.setdefault(_form(child, child.paths[0]), []).append(position)
    children = tuple(
        _fold([real.children[position] for real in reals for position in group]) for group in groups.values()
    )
    leaves = tuple(_merge(row) for row in zip(*(real.leaves for real in reals), strict=True))
    return replace(
        first,
        name=label(real.name for real in reals),
        paths=tuple(real.paths[0] for real in reals),
        leaves=leaves,
        children=children,
        members=tuple(reals),
    )


def _merge(row: Sequence[Leaf]) -> Leaf:
    """One leaf for those of equal nodes; if they are tied, it lists the first names of all."""
    return replace(row[0], tied_to=tuple(dict.fromkeys(name for leaf in row for name in leaf.tied_to)))


def _form(node: Node, base: str) -> object:
    """What equal nodes have in common: a tie to a tensor below ``base`` counts by its place there."""
    leaves = tuple(replace(leaf, tied_to=tuple(_below(name, base) for name in leaf.tied_to)) for leaf in node.leaves)
    children = tuple((child.name, _form(child, base)) for child in node.children)
    return node.qualified_class, node.kind, leaves, children


def _below(name: str, base: str) -> str:
    return name[len(base) :] if name.startswith(base + ".") else name
