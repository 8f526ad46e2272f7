"""Taps: the inputs x of a trained matrix and the gradients g of its outputs, row by row.

If y = x Wᵀ, the gradient of row i's loss is ∇_W Lᵢ = Σₜ gᵢₜ xᵢₜᵀ with g = ∂Lᵢ/∂y: two thin factors instead of one
matrix per row. Norms of gradients (ghost norms) and Kronecker factors of curvature (KFAC) need only these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import ParamsError
from .one_member import one_member

__all__ = ["Tap", "ghost_norms", "kronecker_factors", "taps"]


class Tap(NamedTuple):
    """``inputs`` x (b, t, in) of a matrix (out, in), and ``grads`` g (b, t, out) of each row's own loss.

    >>> tap = fd.grad.Tap(inputs=torch.tensor([[[1.0, 2.0]]]), grads=torch.tensor([[[3.0]]]))
    >>> tap.grads.mT @ tap.inputs  # the gradient of each row's loss, (b, out, in)
    tensor([[[3., 6.]]])
    """

    inputs: Tensor
    grads: Tensor


def taps(loss: Callable[..., Tensor], params: Mapping[str, Tensor], *data: Any, check: bool = True) -> dict[str, Tap]:
    """{leaf: (x, g)} with ∇_W Lᵢ = Σₜ gᵢₜ xᵢₜᵀ, for every matrix W of ``params`` that is used only as y = x Wᵀ.

    ``loss(params, *data)`` returns one number per row, (b,): one forward and one backward pass serve all rows.
    ``params`` are one member's. A position t is a token, or a further use of the same leaf; a matrix that acts on a
    pooled value has one. There is no tap for leaves that are not matrices (biases, scales), are constant, act
    otherwise (embeddings, convolutions, x @ W), or act on inputs whose first axis is not the rows:
    :func:`funcdelta.grad.per_sample_grads` computes those gradients, more slowly.

    With ``check``, a second backward pass verifies that losses of even rows do not depend on odd rows, as they would
    wherever rows mix.

    Raises ``ParamsError`` if the loss is not one number per row or rows depend on each other.

    >>> def loss(params, x):
    ...     return F.linear(x, params["w"]).square().sum((1, 2)) / 2
    >>> tap = fd.grad.taps(loss, {"w": torch.tensor([[1.0, 2.0]])}, torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]))["w"]
    >>> torch.einsum("bto,bti->boi", tap.grads, tap.inputs)
    tensor([[[1., 0.]],
    <BLANKLINE>
            [[3., 3.]]])
    """
    leaves = {
        name: leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for name, leaf in params.items()
    }
    record = _Record(leaves)
    with torch.enable_grad():
        with one_member("taps", "for a stack, one of fd.unstack(stack)"), record:
            losses = loss(leaves, *data)
        rows = _rows(losses, data)
        uses = {name: found for name, found in record.uses.items() if name not in record.otherwise}
        uses = {name: found for name, found in uses.items() if all(_has_rows(x, rows) for x, _ in found)}
        outputs = [y for found in uses.values() for _, y in found]
        grads = _gradients(losses.sum(), outputs, keep=check)
        if check and rows > 1:
            _refuse_mixed(uses, _gradients(losses[::2].sum(), outputs, keep=False))
    following = iter(grads)
    result = {}
    for name, found in uses.items():
        x = torch.cat([x.detach().reshape(rows, -1, x.shape[-1]) for x, _ in found], 1)
        g = torch.cat([next(following).reshape(rows, -1, y.shape[-1]) for _, y in found], 1)
        result[name] = Tap(x, g)
    return result


def _has_rows(x: Tensor, rows: int) -> bool:
    return x.ndim > 1 and x.shape[0] == rows


def _gradients(value: Tensor, outputs: list[Tensor], keep: bool) -> list[Tensor]:
    """∂value/∂y for every y of ``outputs``; 0 for those that the value does not depend on."""
    found = torch.autograd.grad(value, outputs, retain_graph=keep, allow_unused=True) if outputs else ()
    return [torch.zeros_like(y) if g is None else g for g, y in zip(found, outputs, strict=True)]


def _refuse_mixed(uses: Mapping[str, list[tuple[Tensor, Tensor]]], grads: list[Tensor]) -> None:
    """Raise if the losses of even rows have gradients in odd rows."""
    names = [name for name, found in uses.items() for _ in found]
    for name, g in zip(names, grads, strict=True):
        if bool(g[1::2].any()):
            raise ParamsError(
                f"fd.grad.taps: the loss of one row depends on the output of {name} in other rows, so gradients cannot "
                f"be split by row. Is the loss averaged over rows, is the batch not the first axis, or is a batch norm "
                f"in training mode?"
            )


def ghost_norms(tapped: Mapping[str, Tap]) -> Tensor:
    """‖∇Lᵢ‖ over the tapped leaves, (b,): √ΣΣ (xₜ·xₛ)(gₜ·gₛ), without the gradients themselves.

    Costs t² (in + out) per row and leaf, or t · in · out if that is less. Li et al. 2022, "Large Language Models Can
    Be Strong Differentially Private Learners".

    >>> fd.grad.ghost_norms({"w": fd.grad.Tap(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]]))})
    tensor([10.])
    """
    if not tapped:
        raise ParamsError("ghost_norms needs at least one tap; found none.")
    squares = []
    for x, g in tapped.values():
        t, width = x.shape[1], x.shape[2] * g.shape[2]
        if t * (x.shape[2] + g.shape[2]) <= width:
            square = ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
        else:
            square = (g.mT @ x).square().sum((1, 2))
        squares.append(square)
    # Rounding may take a sum of squares below 0.
    return torch.stack(squares).sum(0).clamp(min=0).sqrt()


def kronecker_factors(tapped: Mapping[str, Tap]) -> dict[str, tuple[Tensor, Tensor]]:
    """{leaf: (A, G)}, A = (1/bt) Σ x xᵀ (in, in) and G = (1/b) Σ g gᵀ (out, out): (1/b) Σᵢ ∇Lᵢ∇Lᵢᵀ ≈ G ⊗ A.

    The Kronecker product acts on W read row by row, vec(W) (out · in). Exact where t = 1 and x and g are independent
    over rows; the gradients are those of the given losses: for the Fisher matrix let the loss draw its labels from the
    model. Positions count as rows of their own ("expand"). Martens and Grosse 2015; Eschenhagen et al. 2023,
    "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures".

    >>> tap = fd.grad.Tap(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[2.0]], [[2.0]]]))
    >>> fd.grad.kronecker_factors({"w": tap})["w"]
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]]), tensor([[4.]]))
    """
    factors = {}
    for name, (x, g) in tapped.items():
        b, t = x.shape[:2]
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        factors[name] = (x.mT @ x / (b * t), g.mT @ g / b)
    return factors


class _Record(TorchFunctionMode):
    """Records every ``F.linear`` by one of the ``leaves``, and which leaves anything else computes with."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items() if leaf.ndim == 2 and leaf.requires_grad}
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.otherwise: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if not given or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # no leaf among the arguments, or only its shape or dtype was read
        if func is F.linear:
            x, weight = _bound_linear(*args, **kwargs)
            if id(weight) in self.names and len(given) == 1:
                self.uses.setdefault(self.names[id(weight)], []).append((x, result))
                return result
        self.otherwise.update(self.names[id(leaf)] for leaf in given)
        return result


def _bound_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The arguments of ``F.linear``, bound to their names."""
    return input, weight


def _rows(losses: Any, data: tuple[Any, ...]) -> int:
    """The number of rows, on which losses and data must agree."""
    lengths = {leaf.shape[0] for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor) and leaf.ndim}
    if not isinstance(losses, Tensor) or losses.ndim != 1 or (lengths and losses.shape[0] not in lengths):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ParamsError(
            f"fd.grad.taps needs one loss per row, ({next(iter(lengths), 'b')},); found {found}. Write, for example, "
            f'F.cross_entropy(logits, labels, reduction="none").'
        )
    return losses.shape[0]
