"""Losses and gradients of all members in one pass: for ``L = Σᵢ Lᵢ(pᵢ)``, ``∂L/∂pᵢ`` is member i's own gradient.

Losses of members are summed, never averaged: an average would divide every member's gradient by n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import EngineError, EngineWarning, FuncdeltaError, ParamsError, RecomputeError, StackError
from ..run.checkpointing import gradients_of, note_reentrant
from ..run.engines import known_vmap_limit
from ..transforms import inside_transform
from ..trees.stack import members, slices, take

DataDims = int | None | Sequence[int | None]


def value_and_grad(
    loss: Callable[..., Any], in_dims: DataDims = None, chunk_size: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """A function of ``(stack, *data)`` that returns the losses (n,) and the gradients of every member's leaves.

    ``loss(stack, *data)`` may take the whole stack and return one loss per member, (n,), as with
    ``delta.apply_many``. Or it may take one member and return its loss, (), as with ``delta.apply``; it is then mapped
    over the members. If the function is given one member's params, losses and gradients have no member axis.

    Args:
        in_dims: which data have a member axis: 0, ``None`` (shared), or one of these for each of ``data``.
        chunk_size: members per forward and backward pass, so that memory is that of one chunk.
        has_aux: ``loss`` returns ``(loss, aux)``; the result is then ``((losses, aux), grads)``.

    On a backbone that checkpoints its activations, a loss of one member runs for the members one after the other.

    Constants get zero gradients, so the gradients have the structure of the stack.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> def loss(params, x, y):
    ...     return F.cross_entropy(delta.apply(params, x), y)
    >>> losses, grads = fd.value_and_grad(loss)(delta.init(0, n=5), torch.randn(8, 4), torch.randint(3, (8,)))
    >>> losses.shape, grads["0.lora.lora_B"].shape
    (torch.Size([5]), torch.Size([5, 3, 2]))
    """

    def values_and_grads(stack: Any, *data: Any) -> Any:
        dims = _dims(in_dims, data)
        if chunk_size is None:
            return _one_pass(loss, stack, data, dims, has_aux)
        parts = []
        for part in slices(members(stack), chunk_size):
            rows = [_members_of(value, dim, part) for value, dim in zip(data, dims, strict=True)]
            parts.append(_one_pass(loss, _members_of(stack, 0, part), rows, dims, has_aux))
        return pytree.tree_map(
            lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts
        )

    return values_and_grads


def _dims(in_dims: DataDims, data: Sequence[Any]) -> list[int | None]:
    dims = list(in_dims) if isinstance(in_dims, Sequence) else [in_dims] * len(data)
    if len(dims) != len(data) or any(not (dim is None or (isinstance(dim, int) and dim == 0)) for dim in dims):
        raise ParamsError(
            f"in_dims={in_dims!r} for {len(data)} data arguments: write 0 (a member axis in front) or None (shared), "
            f"or one of these for each argument."
        )
    return dims


def _members_of(tree: Any, dim: int | None, part: slice) -> Any:
    return tree if dim is None else pytree.tree_map_only(Tensor, lambda t: t[part], tree)


def _one_pass(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    try:
        return _differentiate(loss, stack, data, has_aux)
    except StackError:
        # The loss calls delta.apply, so it takes one member: map it, unless there are no members.
        if not members(stack):
            raise
    if torch.compiler.is_compiling() or inside_transform():
        return _mapped(loss, stack, data, dims, has_aux)
    try:
        return _mapped(loss, stack, data, dims, has_aux)
    except FuncdeltaError as error:
        if not isinstance(error, EngineError):
            raise
        refused: Exception = error
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        refused = error
    # Run member by member what torch cannot map or autograd has to recompute. A bug in the loss raises again there.
    found = _in_turn(loss, stack, data, dims, has_aux)
    if not isinstance(refused, RecomputeError):
        warnings.warn(
            f"The loss cannot be mapped over members, so it runs for the {members(stack)} members one after the other, "
            f"which is slower. {str(refused)[:200]} If a fold can run it, write the loss for the whole stack: "
            f"delta.apply_many(stack, ...), one loss per member.",
            EngineWarning,
            stacklevel=3,
        )
    return found


def _in_turn(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    """The loss and gradients of one member after the other, stacked."""
    found = []
    for i in range(members(stack)):
        rows = [
            value if dim is None else pytree.tree_map_only(Tensor, lambda t, i=i: t[i], value)
            for value, dim in zip(data, dims, strict=True)
        ]
        found.append(_differentiate(loss, take(stack, i), rows, has_aux))
    return pytree.tree_map(lambda *each: torch.stack(each) if isinstance(each[0], Tensor) else each[0], *found)


def _mapped(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    """The loss and gradients of one member, mapped over members."""
    mapped = tuple(None if not _has_tensors(value) else dim for value, dim in zip(data, dims, strict=True))
    alone = torch.func.grad_and_value(loss, has_aux=has_aux)
    try:
        grads, value = torch.vmap(alone, in_dims=(0, *mapped), randomness="different")(stack, *data)
    except EngineError:
        raise
    except RuntimeError as error:
        reason = known_vmap_limit(str(error))
        if reason is None:
            raise
        raise EngineError(
            f"{reason}. Write the loss for the whole stack, one loss per member: "
            f'delta.apply_many(stack, ..., in_dims=0, engine="fold").'
        ) from error
    return value, grads


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _differentiate(loss: Callable[..., Any], stack: Any, data: Sequence[Any], has_aux: bool) -> Any:
    """Values, and gradients of their sum over members; by plain autograd unless the caller differentiates them too."""
    leaves, spec = pytree.tree_flatten(stack)
    around = torch.compiler.is_compiling() or inside_transform()
    if around or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):

        def summed(stack: Any) -> tuple[Tensor, Any]:
            value = loss(stack, *data)
            return _losses(value, has_aux).sum(), value

        try:
            grads, (_, value) = torch.func.grad_and_value(summed, has_aux=True)(stack)
        except RecomputeError as error:
            if around:
                raise
            raise RecomputeError(
                f"The params given to fd.value_and_grad require grad, so its result has to be differentiable, but "
                f"{error} Pass params that do not require grad: fd.tree.map(torch.Tensor.detach, params)."
            ) from error
        return value, grads
    with torch.enable_grad():
        roots = [
            _own(leaf).requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        note_reentrant(False)
        value = loss(pytree.tree_unflatten(roots, spec), *data)
        _refuse_average(loss, stack, data, value, has_aux)
        differentiable = [root for root in roots if isinstance(root, Tensor) and root.requires_grad]
        if not differentiable:
            raise ParamsError("The params have no floating-point leaf, so there is nothing to differentiate.")
        losses = _losses(value, has_aux)
        if not losses.requires_grad:
            raise ParamsError(
                "The loss does not depend on the params, so it has no gradient. Was it computed under no_grad?"
            )
        found = iter(gradients_of(losses.sum(), differentiable))
    grads = [next(found) if isinstance(root, Tensor) and root.requires_grad else _zeros(root) for root in roots]
    value = pytree.tree_map_only(Tensor, Tensor.detach, value)
    return value, pytree.tree_unflatten(grads, spec)


def _own(leaf: Tensor) -> Tensor:
    """The leaf as a tensor that may require grad; an inference tensor may not, so it is copied."""
    if not leaf.is_inference():
        return leaf.detach()
    with torch.inference_mode(False), torch.no_grad():
        return leaf.clone()


def _refuse_average(loss: Callable[..., Any], stack: Any, data: Sequence[Any], value: Any, has_aux: bool) -> None:
    """Raise if ``loss`` averaged over a stack: it returned one number, and refuses a single member of that stack."""
    losses = value[0] if has_aux and isinstance(value, tuple) else value
    tensors = [leaf for leaf in pytree.tree_leaves(stack) if isinstance(leaf, Tensor)]
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in tensors}
    if not isinstance(losses, Tensor) or losses.ndim or len(counts) != 1 or None in counts:
        return
    try:
        with torch.no_grad():
            loss(take(stack, 0), *data)
    except StackError:
        n = counts.pop()
        raise ParamsError(
            f"loss returned one number for a stack of {n} members, so their gradients would mix. Return one loss per "
            f"member, ({n},), for example torch.vmap(F.cross_entropy)(logits, labels)."
        ) from None
    except Exception:
        pass  # only a probe, and any other error says nothing about stacks


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def _losses(value: Any, has_aux: bool) -> Tensor:
    losses = value[0] if has_aux else value
    if not isinstance(losses, Tensor) or losses.ndim > 1:
        found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        hint = " If it returns (loss, aux), write has_aux=True." if isinstance(losses, tuple) else ""
        raise ParamsError(
            f"loss returned {found}; expected one loss, (), or one per member, (n,): sum or average over rows, not "
            f"over members.{hint}"
        )
    return losses
