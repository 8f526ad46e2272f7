"""Losses and gradients of every member in one pass: ``L = Σᵢ Lᵢ(pᵢ)``, so ``∂L/∂pᵢ`` is member i's own gradient.

Members are summed, never averaged: an average would divide every member's gradient by n.
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
    """A function of ``(stack, *data)`` that gives the losses (n,) and the gradients of every member's leaves.

    ``loss(stack, *data)`` either takes the whole stack and gives one loss a member, (n,), as with
    ``delta.apply_many``; or takes one member and gives its loss, (), as with ``delta.apply``: it is then mapped over
    the members. Given one member's params, ``loss`` gives () and so do the gradients have no member axis.

    Args:
        in_dims: which data carry a member axis: 0, ``None`` (shared), or one of these for each of ``data``.
        chunk_size: members at a time, forward and backward, so that memory is that of one chunk.
        has_aux: ``loss`` gives ``(loss, aux)``; the result is then ``((losses, aux), grads)``.

    On a backbone that checkpoints its activations, the losses of single members are computed in turn.

    Constants get zero gradients, so gradients have the structure of the stack.

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
            f"in_dims={in_dims!r} for {len(data)} data arguments: write 0 (an axis of members) or None (shared), "
            f"or one of "
            f"these for each."
        )
    return dims


def _members_of(tree: Any, dim: int | None, part: slice) -> Any:
    return tree if dim is None else pytree.tree_map_only(Tensor, lambda t: t[part], tree)


def _one_pass(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    try:
        return _differentiate(loss, stack, data, has_aux)
    except StackError:
        # The loss calls delta.apply, so it is one member's loss; but of no members there is none.
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
    # What torch cannot map, and what autograd has to recompute, runs member by member; so does a mistake of the loss
    # itself, which then raises again.
    found = _in_turn(loss, stack, data, dims, has_aux)
    if not isinstance(refused, RecomputeError):
        warnings.warn(
            f"The loss of one member runs for each of {members(stack)} members in turn, which is slower: it cannot be "
            f"mapped. {str(refused)[:200]} Write the loss for the whole stack, with delta.apply_many(stack, ...), one "
            f"loss a member, where a fold can run it.",
            EngineWarning,
            stacklevel=3,
        )
    return found


def _in_turn(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    """One member's loss and gradients after the other's, stacked."""
    found = []
    for i in range(members(stack)):
        rows = [
            value if dim is None else pytree.tree_map_only(Tensor, lambda t, i=i: t[i], value)
            for value, dim in zip(data, dims, strict=True)
        ]
        found.append(_differentiate(loss, take(stack, i), rows, has_aux))
    return pytree.tree_map(lambda *each: torch.stack(each) if isinstance(each[0], Tensor) else each[0], *found)


def _mapped(loss: Callable[..., Any], stack: Any, data: Sequence[Any], dims: list[int | None], has_aux: bool) -> Any:
    """The loss of one member, mapped over members."""
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
            f"{reason}. Write the loss for the whole stack, with delta.apply_many(stack, ..., in_dims=0, "
            f'engine="fold"), one loss a member.'
        ) from error
    return value, grads


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _differentiate(loss: Callable[..., Any], stack: Any, data: Sequence[Any], has_aux: bool) -> Any:
    """Values and gradients of the sum over members, by plain autograd where nobody differentiates around it."""
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
                f"The params given to fd.value_and_grad require grad, so that it has to be differentiable itself, and "
                f"{error} Give it params that do not: fd.tree.map(torch.Tensor.detach, params)."
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
            raise ParamsError("The params have no leaf of floating point, so there is nothing to differentiate.")
        losses = _losses(value, has_aux)
        if not losses.requires_grad:
            raise ParamsError(
                "The loss does not depend on the params: it has no gradient. Was it computed under no_grad?"
            )
        found = iter(gradients_of(losses.sum(), differentiable))
    grads = [next(found) if isinstance(root, Tensor) and root.requires_grad else _zeros(root) for root in roots]
    value = pytree.tree_map_only(Tensor, Tensor.detach, value)
    return value, pytree.tree_unflatten(grads, spec)


def _own(leaf: Tensor) -> Tensor:
    """The leaf as one that may require grad; what was made in inference mode never may."""
    if not leaf.is_inference():
        return leaf.detach()
    with torch.inference_mode(False), torch.no_grad():
        return leaf.clone()


def _refuse_average(loss: Callable[..., Any], stack: Any, data: Sequence[Any], value: Any, has_aux: bool) -> None:
    """Raise where ``loss`` gave one number for a stack: a loss that takes stacks alone refuses one of its members."""
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
            f"loss gave one number for a stack of {n} members, so gradients would mix them: return one loss a member, "
            f"({n},), for example torch.vmap(F.cross_entropy)(logits, labels)."
        ) from None
    except Exception:
        pass


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def _losses(value: Any, has_aux: bool) -> Tensor:
    losses = value[0] if has_aux else value
    if not isinstance(losses, Tensor) or losses.ndim > 1:
        found = f"a tensor of the shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        hint = " With aux values write has_aux=True." if isinstance(losses, tuple) else ""
        raise ParamsError(
            f"loss gave {found}; expected one loss, (), or one a member, (n,): sum or average over rows, not over "
            f"members.{hint}"
        )
    return losses
