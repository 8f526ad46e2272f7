"""Whether a backward pass mixes rows, which nothing that follows the forward pass can see.

Torch's own derivatives keep rows apart wherever the operation does. A custom ``autograd.Function`` or a hook on a
tensor can do anything with the gradient of a whole batch, for example divide it by its norm. Where the probe sees one,
the gradients of two members in one batch are compared with those of each member alone, for random cotangents.
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
"""It runs modules again whose operations were followed the first time."""


def written_in_python(outputs: Iterable[Any]) -> str:
    """The name of the first custom ``autograd.Function`` in the graph of ``outputs``; ``""`` if there is none."""
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
    """Copies, which require grad, of the leaves that may be trained.

    >>> roots({"a": torch.ones(1), "scale": torch.ones(1)}, ["scale"])
    {'a': tensor([1.], requires_grad=True)}
    """
    constants = frozenset(constants)
    trained = {name: leaf for name, leaf in params.items() if leaf.is_floating_point() and name not in constants}
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in trained.items()}


def grown(params: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` with clones of the roots ``found`` in place of their leaves.

    Clones, because autograd forbids writing into a leaf of the graph, and a model may write into its params.
    """
    return {name: found[name].clone() if name in found else leaf for name, leaf in params.items()}


def check_backward(
    together: tuple[Sequence[Any], Mapping[str, Tensor]],
    alone: Callable[[int, Mapping[str, Tensor]], Sequence[Any]],
    dims: Dims,
    n: int,
    what: str,
) -> None:
    """Raise :class:`MixedBackwardError` if members in one batch get other gradients than each alone.

    Args:
        together: the leaves of the folded output, and the roots (n, …) that they were computed from.
        alone: a function of a member's number and its roots that returns the leaves of that member's output.
        dims: the axis of rows of each leaf of the folded output.
        what: what raised the suspicion, for the message.
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
    except Exception:  # a member that cannot be differentiated alone has no gradients to compare with
        return
    try:
        found = _gradients(total, stacked)
    except Exception as error:
        raise MixedBackwardError(f"The backward pass of two members in one batch fails ({what}): {error}") from error
    for name, gradient in found.items():
        for i in range(n):
            if not close(gradient[i], expected[i][name]):
                raise MixedBackwardError(
                    f"The model mixes rows of several members in the backward pass ({what}): in one batch the "
                    f"gradients of {name} differ from those of each member alone."
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
