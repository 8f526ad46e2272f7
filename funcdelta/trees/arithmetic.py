"""Leafwise arithmetic on pytrees of tensors: gradients, updates, and params as points in factor space.

Trees in one operation need the same structure, and leaves the same shape and device; ``ParamsError`` names the leaf
that differs. Leaves keep their dtype: an operation that would change it raises. Results are new trees; all functions
are differentiable and work under ``torch.vmap``. A leaf that is not a tensor (a Python number, ``None``) is copied from
the first tree. With ``per_member=True`` the first axis of every leaf is the member axis, and scalars may be (n,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError, StackError, shown
from .constants import marked
from .leaves import align, check_tree, compute_dtype, dense, leading, like, named
from .seeding import derive

__all__ = ["add", "lerp", "map", "mean", "norm", "randn_like", "ravel", "scale", "sub", "vdot"]

Tree = TypeVar("Tree")
_TENSOR = object()


def map(function: Callable[..., Any], tree: Tree, *others: Any) -> Tree:
    """``function(leaf, other_leaf, ...)`` for every tensor leaf; unlike elsewhere, shapes may differ between trees.

    >>> map(lambda x, y: x * y, {"a": torch.tensor(2.0)}, {"a": torch.tensor(5.0)})
    {'a': tensor(10.)}
    """
    check_tree(tree)
    leaves = [leaf for _, leaf in named(tree)]
    rows = [align(tree, one, first_is="the first tree", other_is=f"tree {i}") for i, one in enumerate(others, 1)]
    results = [
        function(leaf, *column) if isinstance(leaf, Tensor) else leaf
        for leaf, *column in zip(leaves, *rows, strict=True)
    ]
    return like(tree, results)


def add(a: Tree, b: Any) -> Tree:
    """a + b, for example the new params ``add(params, updates)``.

    >>> add({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])})
    {'w': tensor([1.5000, 2.5000])}
    """
    _alike(a, b, "add")
    return _map_named(lambda name, x, y: torch.add(x, y), a, b)


def sub(a: Tree, b: Any) -> Tree:
    """a - b.

    >>> sub({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])})
    {'w': tensor([0.5000, 1.5000])}
    """
    _alike(a, b, "sub")
    return _map_named(lambda name, x, y: torch.sub(x, y), a, b)


def scale(tree: Tree, s: float | Tensor, per_member: bool = False) -> Tree:
    """s·tree, where ``s`` is a number or a tensor (); with ``per_member=True`` a tensor (n,).

    >>> scale({"w": torch.ones(2, 3)}, torch.tensor([1.0, 10.0]), per_member=True)["w"][:, 0]
    tensor([ 1., 10.])
    """
    return _map_named(lambda name, leaf: dense(name, leaf) * _factor(s, name, leaf, per_member), tree)


def lerp(a: Tree, b: Any, t: float | Tensor, per_member: bool = False) -> Tree:
    """a + t·(b - a): ``a`` at t = 0, ``b`` at t = 1; ``t`` is like ``s`` of :func:`scale`.

    >>> lerp({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([4.0, 8.0])}, 0.25)
    {'w': tensor([1., 5.])}
    """
    _alike(a, b, "lerp")

    def one(name: str, x: Tensor, y: Tensor) -> Tensor:
        if not x.is_complex():
            _real(name, x, "lerp")
        return torch.lerp(x, y, _factor(t, name, x, per_member))

    return _map_named(one, a, b)


def mean(stack: Tree) -> Tree:
    """The mean over members: leaves (n, ...) become (...).

    >>> mean({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    {'w': tensor([2., 3.])}
    """
    if not leading(stack):
        raise StackError("mean averages over the members of a stack, but this stack has none.")

    def one(name: str, leaf: Tensor) -> Tensor:
        _real(name, leaf, "mean")
        return leaf.mean(0)

    return _map_named(one, stack)


def vdot(a: Any, b: Any, per_member: bool = False) -> Tensor:
    """Σ a·b over all leaves and entries, a tensor (); with ``per_member=True`` one sum per member, (n,).

    >>> a = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor(3.0)}
    >>> vdot(a, {"w": torch.ones(2), "v": torch.tensor(2.0)})
    tensor(9.)
    """
    _alike(a, b, "vdot")
    pairs = _tensors(a, "vdot")
    others = dict(zip((name for name, _ in named(a)), align(a, b, first_is="a", other_is="b"), strict=True))
    if per_member:
        leading(a)
    sums = []
    for name, x in pairs:
        product = x.to(compute_dtype(x.dtype)) * others[name]
        sums.append(_flat(product, per_member).sum(-1))
    return _stacked(sums).sum(0) if sums else torch.zeros((), dtype=torch.float32)


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
    return torch.linalg.vector_norm(_stacked(norms), dim=0) if norms else torch.zeros((), dtype=torch.float32)


def ravel(tree: Tree, per_member: bool = False) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """``(vector, unravel)``: all entries as one vector (d,), and the inverse function.

    The order is that of the leaves: dicts in insertion order, each leaf row by row. With ``per_member=True`` the vector
    is (n, d), and ``unravel`` takes (m, d) for any m. The vector has the common dtype of all leaves; ``unravel``
    restores their own.

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
    tensors = [leaf for _, leaf in _together(tree)]
    shapes = [leaf.shape[axes:] for leaf in tensors]
    dtypes = [leaf.dtype for leaf in tensors]
    sizes = [shape.numel() for shape in shapes]
    width = sum(sizes)
    # Keep only leaves that are not tensors, so that a long-lived unravel does not hold the tensors' memory.
    kept = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    flat = [_flat(leaf, per_member) for leaf in tensors]
    vector = torch.cat(flat, dim=axes) if flat else torch.zeros(0, dtype=torch.float32)

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
    """Standard normal entries; a leaf's value depends only on the seed, its name and its shape.

    If there are several seeds, the tree is a stack, and member i is what ``seed[i]`` alone would draw. Numbers are
    drawn on the CPU, so they are the same on every device. Call it outside ``torch.vmap``.

    >>> one = {"w": torch.zeros(3)}
    >>> two = randn_like({"w": torch.zeros(2, 3)}, [7, 8])
    >>> torch.equal(two["w"][1], randn_like(one, 8)["w"])
    True
    """
    if isinstance(seed, Sequence) and leading(tree) != len(seed):
        raise ParamsError(f"randn_like needs one seed per member; found {len(seed)} for {leading(tree)} members.")

    def draw(name: str, leaf: Tensor) -> Tensor:
        _real(name, dense(name, leaf), "randn_like")
        dtype = compute_dtype(leaf.dtype)
        if isinstance(seed, Sequence) and not seed:
            return torch.zeros_like(leaf)
        if isinstance(seed, Sequence):
            value = torch.stack([_normal(leaf.shape[1:], one, name, dtype) for one in seed])
        else:
            value = _normal(leaf.shape, seed, name, dtype)
        return value.to(device=leaf.device, dtype=leaf.dtype)

    return _map_named(draw, tree)


def _normal(shape: torch.Size, seed: int, name: str, dtype: torch.dtype) -> Tensor:
    """One leaf of one member. The extra word makes it differ from an init with the same seed and name."""
    generator = torch.Generator().manual_seed(derive(seed, "randn_like", name))
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def _map_named(function: Callable[..., Tensor], tree: Tree, *others: Any) -> Tree:
    """As :func:`map`, for functions that make new tensors and take the leaf's name as their first argument."""
    names = iter([name for name, leaf in named(tree) if isinstance(leaf, Tensor)])
    return map(lambda leaf, *more: marked(function(next(names), leaf, *more), leaf), tree, *others)


def _flat(leaf: Tensor, per_member: bool) -> Tensor:
    """All entries as one axis (d,), or (n, d) per member, where n may be 0."""
    return leaf.reshape(leaf.shape[0], leaf.shape[1:].numel()) if per_member else leaf.reshape(-1)


def _together(tree: Any) -> list[tuple[str, Tensor]]:
    """The named tensor leaves, to be joined into one tensor: all must be dense and on one device."""
    check_tree(tree)
    pairs = [(name, dense(name, leaf)) for name, leaf in named(tree) if isinstance(leaf, Tensor)]
    place = pairs[0][1].device if pairs else None
    for name, leaf in pairs:
        if leaf.device != place:
            raise ParamsError(
                f"Leaf {pairs[0][0]!r} is on {place}, but {name!r} on {leaf.device}. Move one: leaf.to({str(place)!r})."
            )
    return pairs


def _tensors(tree: Any, function: str) -> list[tuple[str, Tensor]]:
    """As :func:`_together`, for leaves that must hold real numbers."""
    pairs = _together(tree)
    for name, leaf in pairs:
        _real(name, leaf, function)
    return pairs


def _stacked(numbers: list[Tensor]) -> Tensor:
    """Stack one number per leaf, in their common dtype."""
    dtype = functools.reduce(torch.promote_types, [number.dtype for number in numbers])
    return torch.stack([number.to(dtype) for number in numbers])


def _real(name: str, leaf: Tensor, function: str) -> None:
    """Raise unless the leaf holds real numbers."""
    if not leaf.is_floating_point():
        raise ParamsError(
            f"{function} takes real numbers, but leaf {name!r} is {leaf.dtype}. Leave it out: "
            f"some, rest = fd.partition(params, lambda name, leaf: leaf.is_floating_point())."
        )


def _alike(a: Any, b: Any, function: str) -> None:
    """Raise unless ``b`` has the structure, shapes and devices of ``a``; torch would silently broadcast."""
    check_tree(a)
    check_tree(b)
    others = align(a, b, first_is="the first tree", other_is="the second")
    for (name, x), y in zip(named(a), others, strict=True):
        if isinstance(x, Tensor):
            problem = _unlike(x, y, function)
            if problem:
                raise ParamsError(f"Leaf {shown(name)} {problem}")


def _unlike(x: Tensor, y: Any, function: str) -> str:
    """Why ``function`` cannot combine ``x`` of the first tree and ``y`` of the second, or an empty string."""
    if isinstance(y, Tensor) and (y.is_nested or y.is_quantized or x.is_nested or x.is_quantized):
        if x.is_nested or y.is_nested:
            return "is nested in one of the trees, but leaves must be dense. Write leaf.to_padded_tensor(0.0)."
        return "is quantised in one of the trees, but leaves must be plain numbers. Write leaf.dequantize()."
    if not isinstance(y, Tensor) or y.shape != x.shape:
        found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else repr(y)
        return (
            f"has shape {tuple(x.shape)} in the first tree and {found} in the second. "
            "To combine one member with a stack write fd.broadcast(params, n)."
        )
    if x.layout is not torch.strided or y.layout is not torch.strided or x.is_nested or y.is_nested:
        return f"is {x.layout} in the first tree and {y.layout} in the second. Write leaf.to_dense()."
    if x.device != y.device:
        place = str(x.device)
        return f"is on {place} in the first tree and on {y.device} in the second. Move one: leaf.to({place!r})."
    if function == "vdot" or (x.dtype is y.dtype and x.dtype is not torch.bool):
        return ""
    common = torch.promote_types(x.dtype, y.dtype)
    if common != x.dtype or (function == "lerp" and y.dtype != x.dtype):
        return (
            f"is {x.dtype} in the first tree and {y.dtype} in the second, and {function} would make it {common}. "
            f"Convert one: fd.tree.map(lambda leaf: leaf.to({x.dtype}), tree)."
        )
    if x.dtype == torch.bool and function == "sub":
        return "is torch.bool, which cannot be subtracted. Leave it out with fd.partition."
    return ""


def _factor(s: float | Tensor, name: str, leaf: Tensor, per_member: bool) -> float | Tensor:
    """``s`` with the shape, dtype and device that it needs to multiply ``leaf``."""
    kept = leaf.is_floating_point() or leaf.is_complex() or (leaf.dtype != torch.bool and _is_whole(s))
    if not kept or (_is_complex(s) and not leaf.is_complex()):
        factor = s.dtype if isinstance(s, Tensor) else repr(s)
        raise ParamsError(
            f"Leaf {name!r} is {leaf.dtype}, and its product with {factor} is not. Leave it out: "
            f"some, rest = fd.partition(params, lambda name, leaf: leaf.is_floating_point())."
        )
    if not per_member:
        if isinstance(s, Tensor) and s.ndim:
            raise ParamsError(
                f"The factor must be a number or a tensor (); found shape {tuple(s.shape)}. "
                "For one value per member write per_member=True."
            )
        return s.to(leaf.dtype) if isinstance(s, Tensor) and leaf.is_floating_point() else s
    if not isinstance(s, Tensor) or s.ndim != 1:
        found = f"shape {tuple(s.shape)}" if isinstance(s, Tensor) else repr(s)
        raise ParamsError(f"With per_member=True the factor must be a tensor (n,); found {found}.")
    if leaf.ndim == 0 or leaf.shape[0] != s.shape[0]:
        raise ParamsError(
            f"The factor has {s.shape[0]} values, one per member, but leaf {name!r} has shape {tuple(leaf.shape)}."
        )
    return s.to(dtype=leaf.dtype, device=leaf.device).reshape((-1, *[1] * (leaf.ndim - 1)))


def _is_whole(s: float | Tensor) -> bool:
    """Whether a factor is an integer or a boolean."""
    return not (s.is_floating_point() or s.is_complex()) if isinstance(s, Tensor) else isinstance(s, int)


def _is_complex(s: float | Tensor) -> bool:
    return s.is_complex() if isinstance(s, Tensor) else isinstance(s, complex)
