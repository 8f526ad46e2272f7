"""The proof that a method's formula on activations is its formula on weights, at the layer that it acts on.

LoRA computes ``y + s B (A x)`` instead of running the layer with ``W + s B A``. That they agree hangs on the layer's
own forward. The first time that a method with both forms acts at a site, the two are compared on random leaves and the
values at hand: they agree, or the site is refused by name. There is no third outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import MatchError
from ..planning.plan import Attachment
from ..transforms import concrete, is_wrapped, outside_transforms
from .bound import bound_in_both_modes, rewritten
from .call import Call
from .hidden import hidden_output
from .layout import close

if TYPE_CHECKING:
    from .opened import Opened
    from .skeleton import Skeleton


def prove(
    skeleton: Skeleton, opened: Opened, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, y: Tensor
) -> None:
    """Compare both forms of every method at the site that acts for the first time.

    ``y`` is what the layer gave for ``args`` and ``kwargs``, with ``x`` the hidden value among them. Raises
    :class:`MatchError` where they differ by more than rounding.
    """
    acting = [a for a in opened.unproved if a.among(call.params)]
    if not acting or not x.numel():
        return
    args, kwargs = pytree.tree_map_only(Tensor, concrete, (args, kwargs))
    x, y = concrete(x), concrete(y)
    own = {name: concrete(tensor) for name, tensor in skeleton.own_tensors(opened.path, {}).items()}
    with torch.inference_mode(False), outside_transforms(), torch.no_grad():
        for attachment in acting:
            _compare(skeleton, opened, attachment, args, kwargs, x, y, own)
            attachment.proof.append(True)
    opened.unproved = [a for a in opened.unproved if not a.proof]


def _compare(
    skeleton: Skeleton,
    opened: Opened,
    attachment: Attachment,
    args: Any,
    kwargs: Any,
    x: Tensor,
    y: Tensor,
    own: dict[str, Tensor],
) -> None:
    p = random_leaves(attachment, x.device)
    changed = rewritten(attachment, p, own, training=False)
    before, module = skeleton.call, opened.module
    training = module.training
    skeleton.call = Call({})
    module.training = False
    opened.running += 1
    try:
        with skeleton.swapped(changed):
            expected = hidden_output(opened.path, opened.original(*args, **kwargs))[0]
        bare = y
        if training or any(is_wrapped(t) for t in opened.module._parameters.values() if t is not None):
            with skeleton.swapped({f"{opened.path}.{name}": tensor for name, tensor in own.items()}):
                bare = hidden_output(opened.path, opened.original(*args, **kwargs))[0]
    finally:
        skeleton.call, module.training = before, training
        opened.running -= 1
    function = bound_in_both_modes(attachment, "after")[1][False]
    found = function(p, bare, x)
    if not close(found, expected):
        gap = float((found - expected).abs().max()) if found.shape == expected.shape else float("nan")
        raise MatchError(
            f"{attachment.name} cannot act at {opened.path}: its formula on activations and the layer run with the "
            f"weights that it merges to differ by {gap:.2g}, so the forward of {attachment.site.module_type} is not "
            f"what its class says. Name a module inside or above it, or give the layer a class of its own."
        )


def random_leaves(attachment: Attachment, device: torch.device) -> dict[str, Tensor]:
    """One member's leaves at a site, away from their start; constants are 1."""
    rng = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for leaf, key in attachment.leaves.items():
        shape, dtype = attachment.shapes[key], attachment.dtypes[key]
        if not dtype.is_floating_point:
            found[leaf] = torch.zeros(shape, dtype=dtype, device=device)
        elif key in attachment.constants:
            found[leaf] = torch.ones(shape, dtype=dtype, device=device)
        else:
            found[leaf] = (0.3 * torch.randn(shape, generator=rng, dtype=torch.float32)).to(device, dtype)
    return found
