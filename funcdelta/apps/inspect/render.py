"""Trees and figures as rich shows them: colours by kind of tensor, in a terminal, a notebook or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import FuncdeltaError
from .nodes import Kind, Leaf, Node

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

STYLES: dict[Kind, str] = {
    "delta": "bold magenta",
    "trainable": "bold cyan",
    "frozen": "dim",
    "constant": "yellow",
    "buffer": "dim italic",
}
WORDS: dict[Kind, str] = {
    "delta": "trained, of the delta",
    "trainable": "trained, of the model",
    "frozen": "frozen",
    "constant": "constant of the delta",
    "buffer": "buffer",
}
TRAINED = ("delta", "trainable")
UNWRAPPED = 100_000

CommonNames = Mapping[str, tuple[str, ...]]
"""``{module path: its common names}``."""


def console(**options: Any) -> Console:
    """A rich console; if rich is missing, an error says how to install it.

    >>> console(width=60).width
    60
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise FuncdeltaError(
            "Trees are drawn with rich, which is not installed. Run: pip install 'funcdelta[demo]' (or: pip install "
            "rich). delta.log(params, visualization=False) gives the figures without it."
        ) from error
    return Console(**options)


def show(root: Node, expand_params: bool = False, common: CommonNames | None = None) -> None:
    """Print the tree ``root``, and a legend where there is more than one colour.

    Long labels are wrapped in a terminal or a notebook, and stay on one line in a file or a pipe.

    >>> from funcdelta.apps.inspect import folded
    >>> show(folded(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))))
    Sequential
    └── 0-2 (Linear) weight:[4, 4] bias:[4]
    """
    screen = console()
    if not (screen.is_terminal or screen.is_jupyter):
        screen = console(width=UNWRAPPED)
    screen.print(drawn(root, expand_params, common))
    if len(kinds(root)) > 1:
        screen.print(legend(root))


def drawn(root: Node, expand_params: bool = False, common: CommonNames | None = None) -> Tree:
    """The tree as a rich renderable; with ``expand_params`` every tensor has a line of its own.

    Where some tensors train and others do not, those that do are marked with ``*``, which survives without colours.
    ``= name`` says under which name a tied tensor is counted. A dtype is shown where it differs from most others.
    ``common`` has common names by path.

    >>> from funcdelta.apps.inspect import tree
    >>> print(drawn(tree(torch.nn.Linear(4, 4))).label)
    Linear weight:[4, 4] bias:[4]
    """
    from rich.tree import Tree

    counts: Counter[torch.dtype] = Counter()
    for node in root.walk():
        for leaf in node.leaves:
            counts[leaf.dtype] += len(node.paths) * leaf.dtype.is_floating_point
    how = _How(
        usual=counts.most_common(1)[0][0] if counts else None,
        marked=len(kinds(root)) > 1,
        expand_params=expand_params,
        common=common or {},
    )

    def grow(node: Node, branch: Tree) -> None:
        for leaf in node.leaves if expand_params else ():
            branch.add(how.tensor(leaf))
        for child in node.children:
            grow(child, branch.add(how.label(child)))

    whole = Tree(how.label(root))
    grow(root, whole)
    return whole


def legend(root: Node) -> Text:
    """The kinds of tensors that ``root`` has, each in its colour.

    >>> from funcdelta.apps.inspect import tree
    >>> print(legend(tree(torch.nn.BatchNorm1d(4))))
    * trained, of the model   buffer
    """
    from rich.text import Text

    parts = [Text(("* " if kind in TRAINED else "") + WORDS[kind], STYLES[kind]) for kind in kinds(root)]
    return Text("   ").join(parts)


def kinds(root: Node) -> list[Kind]:
    """The kinds of tensors in the tree.

    >>> from funcdelta.apps.inspect import tree
    >>> kinds(tree(torch.nn.BatchNorm1d(4)))
    ['trainable', 'buffer']
    """
    present = {leaf.kind for node in root.walk() for leaf in node.leaves}
    return [kind for kind in STYLES if kind in present]


def bytes_text(count: int) -> str:
    """A number of bytes for people.

    >>> bytes_text(160), bytes_text(1_179_744), bytes_text(437_928_960)
    ('160 B', '1.1 MiB', '417.6 MiB')
    """
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


@dataclass(frozen=True)
class _How:
    """How labels are written in one tree."""

    usual: torch.dtype | None
    marked: bool
    expand_params: bool
    common: CommonNames

    def label(self, node: Node) -> Text:
        """``name (Class) weight:[out, in]``; the root has no name."""
        from rich.text import Text

        folded = len({member.name for member in node.members}) > 1
        text = Text()
        if node.name:
            text.append(node.name, "bold red" if folded else "bold").append(" ")
        kind = f"({node.class_name})" if node.name else node.class_name
        text.append(kind, STYLES["delta"] if node.kind == "delta" else "green")
        names = dict.fromkeys(name for path in node.paths for name in self.common.get(path, ()))
        if names:
            text.append(" " + ",".join(names), "blue")
        for leaf in () if self.expand_params else node.leaves:
            text.append(" ").append_text(self.tensor(leaf))
        return text

    def tensor(self, leaf: Leaf) -> Text:
        """``name:[shape]``, with what is unusual about it."""
        from rich.text import Text

        text = f"{leaf.name}{'*' if self.marked and leaf.kind in TRAINED else ''}:{list(leaf.shape)}"
        if leaf.dtype != self.usual:
            text += f" {str(leaf.dtype).removeprefix('torch.')}"
        if leaf.tied_to:
            text += f" = {leaf.tied_to[0]}{' …' if len(leaf.tied_to) > 1 else ''}"
        return Text(text, STYLES[leaf.kind])
