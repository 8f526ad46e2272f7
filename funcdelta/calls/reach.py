"""Is every site reached? A site that no call passes through would be a delta that silently does nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import MatchError
from ..pytrees.opaque import spare
from ..transforms import concrete, eager, outside_transforms
from .attend import attention_mark
from .skeleton import Call, Params

if TYPE_CHECKING:
    from ..model import DeltaModel
    from ..planning.plan import Plan


def verify_reached(
    delta: DeltaModel, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], reached: set[str]
) -> bool:
    """Compare the sites of ``params`` with those that the first call passed through.

    A site whose tensors are read by a module above is rerouted to the method's weights form, once and for all calls.

    Returns whether anything was rerouted, so that the call has to be made again. Raises :class:`MatchError` naming the
    sites that nothing reads.
    """
    plan = delta.plan
    missed = missed_sites(plan, params, reached)
    if missed and torch.compiler.is_compiling():
        raise MatchError(
            f"{missed[0]} is not called, and how its tensors are read has to be found out by a call: run "
            f"delta.apply(params, ...) once before compiling it."
        )
    for path in missed:
        attachments = plan.attachments[path]
        if not all(a.config.gives("weights") and not a.adds_keys for a in attachments) or not _is_read(
            delta, path, args, kwargs
        ):
            raise MatchError(
                f"{len(missed)} of {len(plan.attachments)} sites were not reached by the first call, the first is "
                f"{path}: its "
                f"module was not called, so the delta there would do nothing. Name modules that run "
                f'(exclude_modules=["{path}"] leaves it out), or call the model as it is used.'
            )
        plan.attachments[path] = tuple(dataclasses.replace(a, by_weights=True, by_values=False) for a in attachments)
        plan.uncalled.add(path)
    return bool(missed)


def missed_sites(plan: Plan, params: Params, reached: set[str]) -> list[str]:
    """The sites of ``params`` whose hidden values nothing passed through, or whose attention was not called."""
    return [
        path
        for path, attachments in plan.attachments.items()
        if any(
            a.among(params)
            and ((a.by_values and path not in reached) or (a.adds_keys and attention_mark(path) not in reached))
            for a in attachments
        )
    ]


@eager
def _is_read(delta: DeltaModel, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the outputs see the tensors of the module at ``path``: with NaN in them the outputs have NaN too."""
    skeleton = delta.skeletons.build(delta.mode_flag)
    module = skeleton.module.get_submodule(path)
    poison = {
        f"{path}.{name}": torch.full_like(tensor, torch.nan)
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.is_floating_point()
    }
    args, kwargs = pytree.tree_map_only(Tensor, concrete, spare((args, kwargs)))
    with torch.no_grad(), outside_transforms():
        skeleton.call = Call({})
        output = torch.func.functional_call(skeleton.module, poison, args, kwargs, tie_weights=False)
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(bool(leaf.isnan().any()) for leaf in tensors)
