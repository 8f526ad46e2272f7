"""Arithmetic on pytrees of tensors, leaf by leaf: gradients, updates, and params as points of factor space.

Trees that meet need one structure and leaves of one shape; ``ParamsError`` names the leaf that differs.
Results are new trees, every function is differentiable and maps under ``torch.vmap``. A leaf that is not a
tensor (a Python number, ``None``) is passed through from the first tree. With ``per_member=True`` the first
axis of every leaf is the member axis n, and scalars are one value a member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import ParamsError
from .pytrees.leaves import align, compute_dtype, leading, named
from .pytrees.seeding import derive

__all__ = ["add", "lerp", "map", "mean", "norm", "randn_like", "ravel", "scale", "sub", "vdot"]

Tree = TypeVar("Tree")
_TENSOR = object()


def map(function: Callable[..., Any], tree: Tree, *others: Any) -> Tree:
    """``function(leaf, other_leaf, ...)`` at every tensor leaf; shapes may differ between trees here.

    >>> map(lambda x, y: x * y, {"a": torch.tensor(2.0)}, {"a": torch.tensor(5.0)})
    {'a': tensor(10.)}
    """
    leaves, spec = pytree.tree_flatten(tree)
    rows = [align(tree, one, first_is="the first tree", other_is=f"tree {i}") for i, one in enumerate(others, 1)]
    results = [
        function(leaf, *column) if isinstance(leaf, Tensor) else leaf
        for leaf, *column in zip(leaves, *rows, strict=True)
    ]
    return pytree.tree_unflatten(results, spec)


def add(a: Tree, b: Any) -> Tree:
    """a + b. New params are ``add(params, updates)``.

    >>> add({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])})
    {'w': tensor([1.5000, 2.5000])}
    """
    _same_shapes(a, b)
    return map(torch.add, a, b)


def sub(a: Tree, b: Any) -> Tree:
    """a - b.

    >>> sub({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])})
    {'w': tensor([0.5000, 1.5000])}
    """
    _same_shapes(a, b)
    return map(torch.sub, a, b)


def scale(tree: Tree, s: float | Tensor, per_member: bool = False) -> Tree:
    """s·tree. ``s`` is a number or a tensor (); with ``per_member=True`` a tensor (n,).

    >>> scale({"w": torch.ones(2, 3)}, torch.tensor([1.0, 10.0]), per_member=True)["w"][:, 0]
    tensor([ 1., 10.])
    """
    return _map_named(lambda name, leaf: leaf * _factor(s, name, leaf, per_member), tree)


def lerp(a: Tree, b: Any, t: float | Tensor, per_member: bool = False) -> Tree:
    """a + t·(b - a): ``a`` at t = 0, ``b`` at t = 1. ``t`` is as ``s`` of :func:`scale`.

    >>> lerp({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([4.0, 8.0])}, 0.25)
    {'w': tensor([1., 5.])}
    """
    _same_shapes(a, b)
    return _map_named(lambda name, x, y: torch.lerp(x, y, _factor(t, name, x, per_member)), a, b)


def mean(stack: Tree) -> Tree:
    """The mean over members: leaves (n, ...) give (...).

    >>> mean({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    {'w': tensor([2., 3.])}
    """
    leading(stack)

    def one(name: str, leaf: Tensor) -> Tensor:
        _real(name, leaf, "mean")
        return leaf.mean(0)

    return _map_named(one, stack)


def vdot(a: Any, b: Any, per_member: bool = False) -> Tensor:
    """Σ over all leaves and entries of a·b, a tensor (); with ``per_member=True`` one sum a member, (n,).

    >>> a = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor(3.0)}
    >>> vdot(a, {"w": torch.ones(2), "v": torch.tensor(2.0)})
    tensor(9.)
    """
    _same_shapes(a, b)
    pairs = _tensors(a, "vdot")
    others = dict(zip((name for name, _ in named(a)), align(a, b, first_is="a", other_is="b"), strict=True))
    if per_member:
        leading(a)
    sums = []
    for name, x in pairs:
        product = x.to(compute_dtype(x.dtype)) * others[name]
        sums.append(_flat(product, per_member).sum(-1))
    return torch.stack(sums).sum(0) if sums else torch.zeros(())


def norm(a: Any, per_member: bool = False) -> Tensor:
    """√(Σ a²) over all leaves, a tensor (); with ``per_member=True`` (n,). Its gradient at 0 is 0.

    >>> norm({"w": torch.tensor([3.0, 0.0]), "v": torch.tensor(4.0)})
    tensor(5.)
    >>> norm({"w": torch.tensor([[3.0], [0.0]]), "v": torch.tensor([4.0, 2.0])}, per_member=True)
    tensor([5., 2.])
    """
    pairs = _tensors(a, "norm")
    if per_member:
        leading(a)
    norms = []
    for _, x in pairs:
        wide = x.to(compute_dtype(x.dtype))
        norms.append(torch.linalg.vector_norm(_flat(wide, per_member), dim=-1))
    return torch.linalg.vector_norm(torch.stack(norms), dim=0) if norms else torch.zeros(())


def ravel(tree: Tree, per_member: bool = False) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """``(vector, unravel)``: all entries as one vector (d,), and the way back.

    The order is that of the leaves: dicts by insertion, each leaf row by row. With ``per_member=True`` the
    vector is (n, d), and ``unravel`` takes (m, d) for any m. Leaves of unlike dtypes meet in their common
    dtype and get their own back.

    >>> vector, unravel = ravel({"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3.0)})
    >>> vector
    tensor([1., 2., 3.])
    >>> unravel(vector * 2)
    {'b': tensor([2., 4.]), 'a': tensor(6.)}
    """
    leaves, spec = pytree.tree_flatten(tree)
    if per_member:
        leading(tree)
    axes = int(per_member)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shapes = [leaf.shape[axes:] for leaf in tensors]
    dtypes = [leaf.dtype for leaf in tensors]
    sizes = [shape.numel() for shape in shapes]
    width = sum(sizes)
    # Only the leaves that are not tensors are kept, so that a long-lived unravel holds no one's memory.
    kept = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    flat = [_flat(leaf, per_member) for leaf in tensors]
    vector = torch.cat(flat, dim=axes) if flat else torch.zeros(0)

    def unravel(vector: Tensor) -> Tree:
        wanted = f"(m, {width})" if per_member else f"({width},)"
        if vector.ndim != axes + 1 or vector.shape[-1] != width:
            hint = "" if per_member else " For several vectors write torch.vmap(unravel)(vectors)."
            raise ParamsError(f"unravel expects shape {wanted}; found {tuple(vector.shape)}.{hint}")
        pieces = zip(vector.split(sizes, dim=-1), shapes, dtypes, strict=True)
        back = iter([piece.reshape((*vector.shape[:axes], *shape)).to(dtype) for piece, shape, dtype in pieces])
        return pytree.tree_unflatten([next(back) if leaf is _TENSOR else leaf for leaf in kept], spec)

    return vector, unravel


def randn_like(tree: Tree, seed: int | Sequence[int]) -> Tree:
    """Standard normal entries; a leaf's value depends on (seed, leaf name) and its shape alone.

    Several seeds are one a member: the tree is a stack, and member i is the draw of a single member with
    ``seed[i]``. Drawn on the CPU, so every device gets the same numbers. Draw outside ``torch.vmap``.

    >>> one = {"w": torch.zeros(3)}
    >>> two = randn_like({"w": torch.zeros(2, 3)}, [7, 8])
    >>> torch.equal(two["w"][1], randn_like(one, 8)["w"])
    True
    """
    if isinstance(seed, Sequence) and leading(tree) != len(seed):
        raise ParamsError(f"randn_like needs one seed a member: {len(seed)} seeds for {leading(tree)} members.")

    def draw(name: str, leaf: Tensor) -> Tensor:
        _real(name, leaf, "randn_like")
        dtype = compute_dtype(leaf.dtype)
        if isinstance(seed, Sequence):
            value = torch.stack([_normal(leaf.shape[1:], one, name, dtype) for one in seed])
        else:
            value = _normal(leaf.shape, seed, name, dtype)
        return value.to(device=leaf.device, dtype=leaf.dtype)

    return _map_named(draw, tree)


def _normal(shape: torch.Size, seed: int, name: str, dtype: torch.dtype) -> Tensor:
    """One leaf of one member. The word keeps the draw apart from an init with the same seed and name."""
    generator = torch.Generator().manual_seed(derive(seed, "randn_like", name))
    return torch.randn(shape, generator=generator, dtype=dtype)


def _map_named(function: Callable[..., Tensor], tree: Tree, *others: Any) -> Tree:
    """As :func:`map`, with the leaf's name as first argument."""
    names = iter([name for name, leaf in named(tree) if isinstance(leaf, Tensor)])
    return map(lambda *leaves: function(next(names), *leaves), tree, *others)


def _flat(leaf: Tensor, per_member: bool) -> Tensor:
    """All entries in one axis, or those of each member; there may be no members."""
    return leaf.reshape(leaf.shape[0], leaf.shape[1:].numel()) if per_member else leaf.reshape(-1)


def _tensors(tree: Any, function: str) -> list[tuple[str, Tensor]]:
    """The tensor leaves with their names; each must hold real numbers."""
    pairs = [(name, leaf) for name, leaf in named(tree) if isinstance(leaf, Tensor)]
    for name, leaf in pairs:
        _real(name, leaf, function)
    return pairs


def _real(name: str, leaf: Tensor, function: str) -> None:
    """Raise unless the leaf holds real numbers."""
    if not leaf.is_floating_point():
        raise ParamsError(
            f"{function} is of real numbers, and leaf {name!r} is {leaf.dtype}. Leave it out: "
            f"some, rest = fd.partition(params, lambda name, leaf: leaf.is_floating_point())."
        )


def _same_shapes(a: Any, b: Any) -> None:
    """Raise unless ``b`` has the structure and shapes of ``a``; torch would broadcast without a word."""
    others = align(a, b, first_is="the first tree", other_is="the second")
    for position, (x, y) in enumerate(zip(pytree.tree_leaves(a), others, strict=True)):
        if isinstance(x, Tensor) and getattr(y, "shape", None) != x.shape:
            name = named(a)[position][0]
            found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else repr(y)
            raise ParamsError(
                f"Leaf {name!r} has shape {tuple(x.shape)} in the first tree and {found} in the second. "
                "For one member beside a stack write fd.broadcast(params, n)."
            )


def _factor(s: float | Tensor, name: str, leaf: Tensor, per_member: bool) -> float | Tensor:
    """``s`` in the shape and dtype in which it multiplies ``leaf``."""
    if not per_member:
        if isinstance(s, Tensor) and s.ndim:
            raise ParamsError(
                f"The factor is a number or a tensor (); found shape {tuple(s.shape)}. "
                "For one value a member write per_member=True."
            )
        return s.to(leaf.dtype) if isinstance(s, Tensor) and leaf.is_floating_point() else s
    if not isinstance(s, Tensor) or s.ndim != 1:
        found = f"shape {tuple(s.shape)}" if isinstance(s, Tensor) else repr(s)
        raise ParamsError(f"With per_member=True the factor is a tensor (n,); found {found}.")
    if leaf.ndim == 0 or leaf.shape[0] != s.shape[0]:
        raise ParamsError(
            f"The factor has {s.shape[0]} values, one a member; leaf {name!r} has shape {tuple(leaf.shape)}."
        )
    return s.to(leaf.dtype).reshape((-1, *[1] * (leaf.ndim - 1)))
