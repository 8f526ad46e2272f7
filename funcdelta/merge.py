"""Merging writes a delta into weights, as a new state dict or a new module; the backbone stays as it is.

A tensor may have several names: tied parameters, and modules that are reached by two paths. It is written under every
name, so a loader gets the same value whichever of the keys it reads last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import MergeError
from .match import below
from .plan.attachment import Attachment
from .plan.plan import Planned
from .run.bound import rewritten
from .structures.modules.structure import copy_module, is_quantised
from .transforms import is_wrapped

Params = Mapping[str, Tensor]


def merge(delta: Planned, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """The backbone's state dict with ``params`` written in: new tensors where something changed, its own elsewhere.

    Raises :class:`MergeError` if the delta is not a function of its sites' weights, or if it acts on one end of a tied
    pair only, unless ``untie`` says that the two ends may differ from then on.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)), modified_modules=["0"])
    >>> merge(delta, {"0.bitfit.bias": torch.tensor([1.0, 2.0])})["0.bias"]
    tensor([1., 2.])
    """
    state = {name: tensor.detach() for name, tensor in delta.backbone.state_dict().items()}
    temporary = {
        below(path, name)
        for path, module in delta.backbone.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    new = changes(delta, params, untie)
    return state | {name: tensor for name, tensor in new.items() if name not in temporary}


def merged(delta: Planned, params: Params, untie: bool = False) -> nn.Module:
    """A new module of the backbone's class with the merged weights; it shares no storage with the backbone.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), modified_modules=["0"])
    >>> model = merged(delta, {"0.bitfit.bias": torch.tensor([1.0, 2.0])})
    >>> (model[0].bias - delta.backbone[0].bias).detach()
    tensor([1., 2.])
    """
    new = changes(delta, params, untie)
    model = copy_module(delta.backbone)
    if untie:
        _untie(model)
    with torch.no_grad():
        for name, tensor in new.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters.get(own)
            held = module._buffers.get(own) if held is None else held
            if held is None:
                module.register_parameter(own, nn.Parameter(tensor.detach().clone(), requires_grad=False))
            else:
                held.copy_(tensor)
    return model


def changes(delta: Planned, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """The tensors of :func:`merge` that differ from the backbone's; a tied tensor is one tensor under all its names.

    Parameters and buffers of the backbone among ``params`` (trained leaves, running statistics) are written as well.

    >>> backbone = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    >>> changes(fd.LoraModel(backbone, modified_modules=["1"]), {"0.running_mean": torch.ones(2)})
    {'0.running_mean': tensor([1., 1.])}
    """
    backbone = delta.backbone
    names, paths = _names(backbone), _paths(backbone)
    own = dict(backbone.named_parameters(remove_duplicate=False))
    own |= dict(backbone.named_buffers(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    apart: dict[str, tuple[str, str]] = {}  # an end of a tied pair: the site that changed it, and by what delta
    for name, tensor in params.items():
        if name in own and not _is_same(tensor, own[name]):
            changed |= dict.fromkeys(names[name], tensor.to(own[name].dtype))
    for path, attachments in delta.plan.attachments.items():
        module = backbone.get_submodule(path)
        # As in a call: methods that rewrite the module's tensors come before those that act on hidden values.
        for attachment in sorted(attachments, key=lambda attachment: not attachment.by_weights):
            if not _acts(attachment, params):
                continue
            _check_mergeable(attachment, path, module)
            tensors = {
                name: changed.get(below(path, name), tensor.detach())
                for name, tensor in module._parameters.items()
                if tensor is not None
            }
            for name, tensor in rewritten(attachment, attachment.of(params), tensors, training=False).items():
                leaf = name.rpartition(".")[2]
                here = [below(at, leaf) for at in paths[id(module)]]
                if any(other not in here for other in names.get(name, ())):
                    apart[name] = path, attachment.name
                changed |= dict.fromkeys(here, tensor)
    for name, (path, acting) in apart.items() if not untie else ():
        for other in names[name]:
            if other not in changed or not torch.equal(changed[other], changed[name]):
                raise MergeError(
                    f"{name} is tied to {other}, but {acting} acts on {path} only, or otherwise there: merged, the "
                    f"two would differ. Write delta.merge(params, untie=True), and load the result into an untied "
                    f"model (tie_word_embeddings=False)."
                )
            changed[other] = changed[name]
    return changed


def _acts(attachment: Attachment, params: Params) -> bool:
    """Whether the member has this delta at this site."""
    if not attachment.among(params):
        return False
    shown = attachment.acts().present
    present = shown(attachment.of(params)) if shown is not None else None
    return present is None or bool(present > 0)


def _check_mergeable(attachment: Attachment, path: str, module: nn.Module) -> None:
    """Raises `MergeError` if the method or the module does not allow writing into the module's tensors."""
    acts = attachment.acts()
    refusal = acts.unmergeable
    if acts.weights is None and not refusal:
        refusal = f"{attachment.config.delta_type or type(attachment.config).__name__} has no weights form"
    if refusal:
        raise MergeError(
            f"{attachment.name} at {path} cannot be merged: {refusal}. Keep it as a delta: delta.apply(params, ...) "
            f"or delta.bind(params)."
        )
    if is_parametrized(module):
        raise MergeError(
            f"{path} is parametrised: its weight is computed at each call. First apply "
            f"torch.nn.utils.parametrize.remove_parametrizations to a copy of the model."
        )
    for name, tensor in module._parameters.items():
        if tensor is not None and is_quantised(tensor):
            raise MergeError(
                f"{path}.{name} is quantised ({type(tensor).__name__}), so merging would round {attachment.name} away. "
                f"Keep it as a delta, delta.apply(params, ...) or delta.bind(params), or merge into the model before "
                f"it is quantised."
            )


def _is_same(tensor: Tensor, own: Tensor) -> bool:
    """Whether ``tensor`` is the backbone's tensor ``own``, perhaps as the alias that ``delta.attach`` returns."""
    if tensor is own:
        return True
    wrapped = is_wrapped(tensor) or is_wrapped(own)
    return not wrapped and tensor.data_ptr() == own.data_ptr() != 0 and tensor.shape == own.shape


def _names(backbone: nn.Module) -> dict[str, list[str]]:
    """``{name: all names of that tensor}`` for parameters and buffers."""
    found: dict[int, list[str]] = {}
    tensors = [*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        found.setdefault(id(tensor), []).append(name)
    return {name: ends for ends in found.values() for name in ends}


def _paths(backbone: nn.Module) -> dict[int, list[str]]:
    """``{id(module): all its paths}``."""
    found: dict[int, list[str]] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def _untie(model: nn.Module) -> None:
    """Give every end of a tied parameter its own tensor."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            elif parameter is not None:
                seen.add(id(parameter))
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
