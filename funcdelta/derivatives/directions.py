"""Derivatives with respect to params beyond a single gradient: per row, along directions, and through a solve.

Trees are matched by name, not by the order of keys. Leaves without derivatives (integers, booleans) get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError
from ..functional.attention import higher_order
from ..kinds import count
from ..trees import arithmetic as tree
from ..trees.leaves import align
from ..trees.stack import checked_chunk
from .one_member import one_member
from .real import Parted

__all__ = ["conjugate_gradient", "hvp", "jacobian", "jvp", "per_sample_grads", "vjp"]

Tree = TypeVar("Tree")


def per_sample_grads(loss: Callable[..., Tensor], chunk_size: int | None = None) -> Callable[..., Any]:
    """A function of ``(params, *data)`` that returns ∇Lᵢ for every row i of ``data``: leaves (b, ...).

    ``loss(params, *rows)`` returns one number, (). It gets one row at a time, as a batch of one, (1, ...), because
    models need a batch axis. The mean of the gradients is the gradient of the mean loss. ``chunk_size`` rows run at a
    time. Params are one member's; for a stack: ``torch.vmap(per_sample_grads(loss), in_dims=(0, None))(stack, data)``.

    Raises ``ParamsError`` if the data differ in length or the loss is not a single number.

    >>> def loss(params, x):
    ...     return (x @ params["w"]).square().mean()
    >>> per_sample_grads(loss)({"w": torch.ones(2)}, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    {'w': tensor([[2., 0.],
            [4., 4.]])}
    """

    def grads(params: Any, *data: Any) -> Any:
        lengths = [leaf.shape[:1] for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
        if not lengths or len(set(lengths)) > 1 or not lengths[0]:
            raise ParamsError(
                f"per_sample_grads maps over the first axis of every tensor in its data: expected the same length for "
                f"all, found {[tuple(length) for length in lengths]}."
            )
        rows, parted = lengths[0][0], Parted(params)
        if not rows:
            return tree.map(lambda leaf: leaf.new_zeros((0, *leaf.shape)), params)
        if chunk_size is not None:
            checked_chunk(chunk_size, "rows")

        def alone(reals: list[Tensor], data: Any) -> Tensor:
            with one_member("per_sample_grads(loss)"):
                value = loss(parted.whole(reals), *pytree.tree_map_only(Tensor, lambda row: row.unsqueeze(0), data))
            return _one_number(value, "per_sample_grads needs one loss, (), for a batch of one row")

        mapped = torch.vmap(torch.func.grad(alone), in_dims=(None, 0), chunk_size=chunk_size, randomness="different")
        return parted.filled(mapped(parted.reals, data), lambda leaf: leaf.new_zeros((rows, *leaf.shape)))

    return grads


def hvp(loss: Callable[..., Tensor], params: Tree, vector: Tree, *data: Any) -> Tree:
    """H v, with H the Hessian of ``loss(params, *data)`` in params: the derivative of the gradient along ``vector``.

    Reverse over reverse, ∇⟨∇L, v⟩, so no operator needs a forward derivative; it costs about two gradients. If the
    loss calls a delta, fused attention is replaced by its mathematical form.

    Raises ``ParamsError`` if the loss is not a single number or ``vector`` differs in structure from ``params``.

    >>> hvp(lambda params: (params["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])})
    {'w': tensor([6., 0.])}
    """
    parted = Parted(params)
    along = parted.along(vector, "the vector of hvp")

    def one(reals: list[Tensor]) -> Tensor:
        with one_member("hvp(loss, ...)"):
            return _one_number(loss(parted.whole(reals), *data), "hvp needs a loss that is one number, ()")

    product = torch.func.grad(lambda reals: tree.vdot(torch.func.grad(one)(reals), along))(parted.reals)
    return parted.filled(product, torch.zeros_like)


def jvp(f: Callable[..., Any], params: Tree, tangent: Tree, *data: Any) -> Any:
    """J t, with J = ∂f/∂params: the derivative of ``f(params, *data)``, any pytree of tensors, along ``tangent``.

    Forward mode: one pass, no graph. A delta's constants contribute nothing. For several tangents map over them:
    ``torch.vmap(lambda t: fd.grad.jvp(f, params, t))(tangents)``.

    >>> jvp(lambda params: params["w"] ** 2, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 10.0])})
    tensor([ 2., 40.])
    """
    parted = Parted(params)
    along = parted.along(tangent, "the tangent of jvp")
    with one_member("jvp(f, ...)"):
        return torch.func.jvp(lambda reals: f(parted.whole(reals), *data), (parted.reals,), (along,))[1]


def vjp(f: Callable[..., Any], params: Tree, cotangent: Any, *data: Any) -> Tree:
    """Jᵀ c, with J = ∂f/∂params: the gradient of ⟨f(params, *data), c⟩; ``cotangent`` has the structure of f's output.

    >>> vjp(lambda params: params["w"] ** 2, {"w": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 10.0]))
    {'w': tensor([ 2., 40.])}
    """
    parted = Parted(params)
    # Callers may map over cotangents: the forward pass is outside that map, yet its backward pass must be mappable.
    with one_member("vjp(f, ...)"), higher_order():
        value, pull = torch.func.vjp(lambda reals: f(parted.whole(reals), *data), parted.reals)[:2]
        given = align(value, cotangent, first_is="the output of f", other_is="the cotangent of vjp")
        pulled = pull(pytree.tree_unflatten(given, pytree.tree_structure(value)))[0]
    return parted.filled(pulled, torch.zeros_like)


def jacobian(f: Callable[..., Any], params: Any, *data: Any, chunk_size: int | None = None) -> Any:
    """J = ∂f/∂params: for every leaf (…) of ``params`` the derivatives (out…, …) of ``f(params, *data)``.

    Reverse mode, with one backward pass for all outputs or for ``chunk_size`` of them at a time. If ``f`` returns a
    pytree, each of its leaves holds such a tree. Fused attention is replaced by its mathematical form, because its
    backward pass cannot be mapped over outputs.

    >>> jacobian(lambda params: params["w"] ** 2, {"w": torch.tensor([1.0, 2.0])})
    {'w': tensor([[2., 0.],
            [0., 4.]])}
    """
    if chunk_size is not None:
        checked_chunk(chunk_size, "outputs")
    parted, shapes = Parted(params), None
    for place in parted.places:
        if parted.leaves[place].is_complex():
            raise ParamsError(
                f"jacobian takes real leaves, but leaf {parted.names[place]!r} is {parted.leaves[place].dtype}. Use "
                f"fd.grad.vjp for each output, or pass torch.view_as_real(leaf)."
            )

    def run(reals: list[Tensor]) -> Any:
        nonlocal shapes
        outputs = f(parted.whole(reals), *data)
        shapes = pytree.tree_map(lambda out: out.shape, outputs)
        return outputs

    with one_member("jacobian(f, ...)"), higher_order():
        found = torch.func.jacrev(run, chunk_size=chunk_size)(parted.reals)
    leaves, spec = pytree.tree_flatten(shapes, is_leaf=lambda shape: isinstance(shape, torch.Size))
    each = [
        parted.filled(reals, lambda leaf, shape=shape: leaf.new_zeros((*shape, *leaf.shape)))
        for shape, reals in zip(leaves, spec.flatten_up_to(found), strict=True)
    ]
    return pytree.tree_unflatten(each, spec)


def conjugate_gradient(matvec: Callable[[Tree], Tree], b: Tree, steps: int, damping: float | Tensor = 0.0) -> Tree:
    """Solve (A + damping · I) x ≈ b by ``steps`` steps of conjugate gradients from 0; A is positive semi-definite.

    Exact after as many steps as A + damping · I has distinct eigenvalues (Hestenes and Stiefel 1952). The number of
    steps is fixed, so that the solve runs under ``torch.vmap``; once the residual is down to the rounding of b, further
    steps change nothing. A direction without curvature (A is singular and ``damping`` too small) makes the result
    infinite or nan. For implicit gradients (iMAML) and influence functions, ``matvec`` is made with :func:`hvp`.

    >>> conjugate_gradient(lambda x: {"w": x["w"] * torch.tensor([1.0, 4.0])}, {"w": torch.tensor([1.0, 2.0])}, steps=2)
    {'w': tensor([1.0000, 0.5000])}
    """
    steps = count(steps, "steps", "steps conjugate_gradient makes", least=1, most=2**24)
    x, residual, direction = tree.scale(b, 0.0), b, b
    rest = tree.vdot(residual, residual)
    # A residual below the precision of b is rounding: dividing it by its curvature would blow it up.
    floor = rest * torch.finfo(rest.dtype).eps ** 2
    for _ in range(steps):
        product = matvec(direction)
        align(direction, product, first_is="b", other_is="the output of conjugate_gradient's matvec")
        image = tree.add(product, tree.scale(direction, damping))
        length = _ratio(rest, tree.vdot(direction, image), rest <= floor)
        x = tree.add(x, tree.scale(direction, length))
        residual = tree.sub(residual, tree.scale(image, length))
        before, rest = rest, tree.vdot(residual, residual)
        direction = tree.add(residual, tree.scale(direction, _ratio(rest, before, before <= floor)))
    return x


def _ratio(a: Tensor, b: Tensor, done: Tensor) -> Tensor:
    """a / b; 0 if the solve is ``done``."""
    return torch.where(done, torch.zeros_like(a), a / torch.where(done, torch.ones_like(b), b))


def _one_number(value: Any, expected: str) -> Tensor:
    """``value``, if it is a single number."""
    if not isinstance(value, Tensor) or value.ndim:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ParamsError(f"{expected}; found {found}.")
    return value
