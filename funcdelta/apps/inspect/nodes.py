"""The tree of the modules and tensors of any model, with the deltas where they act; plain frozen data.

A tensor with several names is listed under each and counted under the first. What trains, what is frozen and what
belongs to a delta is read off the delta's plan, never off the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import ConfigError
from ...fresh import trained_dtype
from ...plan.attachment import Attachment
from ...plan.plan import Plan
from ...plan.sharing import Shared

Kind = Literal["frozen", "trainable", "delta", "constant", "buffer"]


@dataclass(frozen=True)
class Leaf:
    """One tensor of a node.

    Attributes:
        name: its own name, ``weight`` or ``lora_A``.
        shape, dtype: of one member's tensor.
        kind: ``delta`` (a leaf of a delta that trains), ``constant`` (one that never does), ``trainable`` (the
            model's own, trained), ``frozen`` (the model's own) or ``buffer``.
        tied_to: empty where the tensor is counted; else its first names, under which it is counted.

    >>> Leaf("weight", (8, 4), torch.float32, "frozen").numel
    32
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    tied_to: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Node:
    """A module, or a delta at a module; after folding perhaps several equal ones.

    Attributes:
        name: the last token of its path, or what several are called: ``0-11``, ``0-2,4-7``, ``query,value``.
        paths: the path of every real module that it represents, in the model's order; the root's is ``""``.
        class_name: the class of the module, or of the delta's config.
        qualified_class: the class with its module, which tells classes of one name apart.
        kind: ``module`` or ``delta``.
        leaves: its own tensors, not those of its children.
        children: the modules and deltas in it.
        members: the real nodes that a node of a folded tree represents, in the order of ``paths``.

    >>> node = tree(torch.nn.Sequential(torch.nn.Linear(4, 8)))
    >>> node.children[0].paths, node.children[0].class_name, node.numel()
    (('0',), 'Linear', 40)
    """

    name: str
    paths: tuple[str, ...]
    qualified_class: str
    kind: Literal["module", "delta"]
    leaves: tuple[Leaf, ...]
    children: tuple[Node, ...]
    members: tuple[Node, ...] = field(default=(), repr=False, compare=False)

    @property
    def class_name(self) -> str:
        """The class without the module that defines it."""
        return self.qualified_class.rpartition(".")[2]

    def walk(self) -> Iterator[Node]:
        """This node and every node below it, parents first.

        >>> [node.name for node in tree(torch.nn.Sequential(torch.nn.Linear(4, 8))).walk()]
        ['', '0']
        """
        yield self
        for child in self.children:
            yield from child.walk()

    def numel(self, *kinds: Kind) -> int:
        """Numbers of the given kinds of tensors (default: all but buffers) here and below, in all real modules.

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> tree(model, fd.LoraModel(model, lora_r=2, modified_modules=["0"]).plan).numel("delta")
        24
        """
        return self.total(lambda leaf: leaf.numel, *kinds)

    def nbytes(self, *kinds: Kind) -> int:
        """The bytes of the same tensors.

        >>> tree(torch.nn.Sequential(torch.nn.Linear(4, 8))).nbytes()
        160
        """
        return self.total(lambda leaf: leaf.nbytes, *kinds)

    def total(self, measure: Any, *kinds: Kind) -> int:
        """The sum of ``measure(leaf)`` over the same tensors, tied ones once."""
        wanted = kinds or ("frozen", "trainable", "delta", "constant")
        return sum(
            measure(leaf) * len(node.paths)
            for node in self.walk()
            for leaf in node.leaves
            if leaf.kind in wanted and not leaf.tied_to
        )


def tree(model: nn.Module, plan: Plan | None = None, params: Mapping[str, Tensor] | None = None) -> Node:
    """Every module of ``model`` as a :class:`Node`, with the deltas of ``plan`` at the sites where they act.

    With ``params`` only what they hold: without a delta's leaves it is detached, and a backbone leaf that they lack
    is frozen. Without a plan the kind of a parameter is its ``requires_grad``. A stack is listed with the shapes of
    one member.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> delta = fd.LoraModel(model, lora_r=2, modified_modules=["0"])
    >>> [(node.paths[0], [leaf.name for leaf in node.leaves]) for node in tree(model, delta.plan).walk()]
    [('', []), ('0', ['weight', 'bias']), ('0.lora', ['lora_A', 'lora_B', 'scale']), ('1', [])]
    >>> [node.paths[0] for node in tree(model, delta.plan, {}).walk()]
    ['', '0', '1']
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"The tree is that of a module; found {type(model).__name__}. "
            "Write tree(model), or tree(delta.backbone, delta.plan) for one with a delta in it."
        )
    return _Builder(plan, params).module("", "", model)


def pruned(node: Node) -> Node:
    """The tree without buffers and without modules that have no parameters in or below them (the root stays).

    >>> node = pruned(tree(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())))
    >>> [child.class_name for child in node.children]
    ['Linear']
    """
    children = [pruned(child) for child in node.children]
    return replace(
        node,
        leaves=tuple(leaf for leaf in node.leaves if leaf.kind != "buffer"),
        children=tuple(child for child in children if child.leaves or child.children or child.kind == "delta"),
    )


class _Builder:
    """Walks the modules, and remembers the first name of each module and each tensor."""

    def __init__(self, plan: Plan | None, params: Mapping[str, Tensor] | None) -> None:
        self.plan = plan
        self.params = params
        self.homes: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.seen: set[str] = set()
        self.constants = frozenset(plan.constants) if plan is not None else frozenset[str]()
        parts: list[Shared | Attachment] = [*plan.shared, *plan.all()] if plan is not None else []
        self.shapes = {key: shape for part in parts for key, shape in part.shapes.items()}
        self.dtypes = {key: dtype for part in parts for key, dtype in part.dtypes.items()}

    def module(self, path: str, name: str, module: nn.Module) -> Node:
        home = self.homes.setdefault(id(module), path)
        leaves = [self.tensor(path, own, p) for own, p in module._parameters.items() if p is not None]
        leaves += [self.tensor(path, own, b, "buffer") for own, b in module._buffers.items() if b is not None]
        children = [
            self.module(_join(path, own), own, child) for own, child in module._modules.items() if child is not None
        ]
        if self.plan is not None:
            for attachment in self.plan.attachments.get(home, ()):
                if self.params is None or attachment.among(self.params):
                    children.append(self.delta(path, attachment))
            for group in self.plan.shared if not path else ():
                if self.params is None or group.among(self.params):
                    children.append(self.delta("", group))
        return Node(name, (path,), _class(type(module)), "module", tuple(leaves), tuple(children))

    def tensor(self, path: str, own: str, tensor: Tensor, kind: Kind | None = None) -> Leaf:
        name = _join(path, own)
        if is_lazy(tensor):
            raise ConfigError(f"{name} has no shape yet: run the model once, then look at it.")
        first = self.names.setdefault(id(tensor), name)
        dtype = tensor.dtype
        if kind is None:
            kind = "trainable" if self.trains(first, tensor) else "frozen"
            if kind == "trainable" and self.plan is not None:
                # What trains is a copy in params, perhaps of another precision.
                dtype = trained_dtype(tensor) if self.params is None else self.params[first].dtype
        return Leaf(own, tuple(tensor.shape), dtype, kind, () if first == name else (first,))

    def trains(self, name: str, tensor: Tensor) -> bool:
        if self.plan is None:
            return tensor.requires_grad
        return name in self.plan.trained and (self.params is None or name in self.params)

    def delta(self, path: str, part: Attachment | Shared) -> Node:
        leaves = [self.leaf(leaf, key, key in part.shapes) for leaf, key in part.leaves.items() if key in self.shapes]
        return Node(part.name, (_join(path, part.name),), _class(type(part.config)), "delta", tuple(leaves), ())

    def leaf(self, name: str, key: str, own: bool) -> Leaf:
        """A leaf of a delta: counted where the delta owns it, the first time; leaves computed from others are none."""
        tied = () if own and key not in self.seen else (key,)
        if own:
            self.seen.add(key)
        dtype = self.dtypes[key] if self.params is None else self.params[key].dtype
        return Leaf(name, self.shapes[key], dtype, "constant" if key in self.constants else "delta", tied)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
