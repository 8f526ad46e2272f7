"""Whether a backward pass mixes rows: what Python adds to it passes by everything that follows the forward pass.

Torch's own derivatives keep rows apart where the operation does. A backward of somebody's own (``autograd.Function``)
or a hook on a tensor may do anything with the gradient of a whole batch, divide it by its norm for example. Where one
of them is seen, gradients of two members in one batch are compared with those of each alone, for random cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from ..errors import FoldError
from .layout import Dims, MixedBackwardError, close

HARMLESS = (CheckpointFunction,)
"""It calls modules again, whose operations have been followed."""


def written_in_python(outputs: Iterable[Any]) -> str:
    """The name of the first node of a graph that is somebody's own ``autograd.Function``, or nothing.

    >>> x = torch.ones(2, requires_grad=True)
    >>> written_in_python([x * 2])
    ''
    """
    todo = [leaf.grad_fn for leaf in outputs if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = getattr(type(node), "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and kind not in HARMLESS and not _ours(kind):
            return getattr(kind, "__name__", type(node).__name__)
        todo += [following for following, _ in node.next_functions if following is not None]
    return ""


def _ours(kind: Any) -> bool:
    return getattr(kind, "__module__", "").partition(".")[0] == __name__.partition(".")[0]


def roots(params: Mapping[str, Tensor], constants: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the leaves that may be trained, for gradients to be asked of.

    >>> roots({"a": torch.ones(1), "scale": torch.ones(1)}, ["scale"])
    {'a': tensor([1.], requires_grad=True)}
    """
    constants = frozenset(constants)
    trained = {name: leaf for name, leaf in params.items() if leaf.is_floating_point() and name not in constants}
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in trained.items()}


def grown(params: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` with what is made of the roots in their places: no leaves of a graph, which may not be written."""
    return {name: found[name].clone() if name in found else leaf for name, leaf in params.items()}


def check_backward(
    together: tuple[Sequence[Any], Mapping[str, Tensor]],
    alone: Callable[[int, Mapping[str, Tensor]], Sequence[Any]],
    dims: Dims,
    n: int,
    what: str,
) -> None:
    """Raise a :class:`MixedBackwardError` where members in one batch get other gradients than alone.

    Args:
        together: the leaves of the folded output, and the roots (n, …) that they were computed from.
        alone: the leaves of the output of one member for its own roots.
        dims: the axis of rows of each leaf of the folded output.
        what: was seen, for the message.
    """
    folded, stacked = together
    own = [{name: leaf[i].detach().clone().requires_grad_() for name, leaf in stacked.items()} for i in range(n)]
    rng = torch.Generator().manual_seed(0)
    total, expected = [], []
    try:
        for i in range(n):
            loss = []
            for leaf, whole, dim in zip(alone(i, own[i]), folded, dims, strict=True):
                if dim is None or not (isinstance(leaf, Tensor) and leaf.requires_grad and whole.requires_grad):
                    continue
                weights = torch.randn(leaf.shape, generator=rng, dtype=torch.float64).to(leaf.device, leaf.dtype)
                loss.append((leaf * weights).sum())
                total.append((whole.unflatten(dim, (n, -1)).select(dim, i) * weights).sum())
            expected.append(_gradients(loss, own[i]))
    except FoldError:
        raise
    except Exception:  # what cannot be differentiated for one member has no gradients to compare
        return
    try:
        found = _gradients(total, stacked)
    except Exception as error:
        raise MixedBackwardError(f"The backward pass of two members in one batch fails ({what}): {error}") from error
    for name, gradient in found.items():
        for i in range(n):
            if not close(gradient[i], expected[i][name]):
                raise MixedBackwardError(
                    f"The model mixes rows of several members in the backward pass ({what}): gradients of {name} in "
                    f"one batch are not those of each member alone."
                )


def _gradients(loss: list[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not loss:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    whole = torch.stack([part.double() for part in loss]).sum()
    found = torch.autograd.grad(whole, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
