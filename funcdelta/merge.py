"""Merging: the delta written into weight space, as a new state dict or a new module; the backbone stays as it is.

A tensor may have several names: ends that are tied, and modules that are reached under two paths. What is written is
written under every name, so that a state dict, whichever of its keys a loader reads last, holds one value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import MergeError
from .match import below
from .plan.attachment import Attachment
from .plan.plan import Plan, Planned
from .run.bound import rewritten
from .structures.modules.structure import copy_module, is_quantised
from .transforms import is_wrapped

Params = Mapping[str, Tensor]


def merge(delta: Planned, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """:func:`merged_state` of a delta's backbone and plan.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), modified_modules=["0"])
    >>> list(merge(delta, delta.init(0)))
    ['0.weight', '0.bias']
    """
    return merged_state(delta.backbone, delta.plan, params, untie)


def changes(delta: Planned, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """:func:`written` of a delta's backbone and plan.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), modified_modules=["0"])
    >>> list(changes(delta, delta.init(0)))
    ['0.bias']
    """
    return written(delta.backbone, delta.plan, params, untie)


def merged(delta: Planned, params: Params, untie: bool = False) -> nn.Module:
    """:func:`merged_module` of a delta's backbone and plan.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), modified_modules=["0"])
    >>> merged(delta, delta.init(0))
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    return merged_module(delta.backbone, delta.plan, params, untie)


def merged_state(backbone: nn.Module, plan: Plan, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """The backbone's state dict with ``params`` written in: new tensors where something changed, its own elsewhere.

    Raises :class:`MergeError` where a delta is not a function of the site's weights, and where it acts on one end of a
    tied pair alone, unless ``untie`` says that the two ends may differ from then on.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> delta = fd.BitFitModel(backbone, modified_modules=["0"])
    >>> merged_state(backbone, delta.plan, {"0.bitfit.bias": torch.tensor([1.0, 2.0])})["0.bias"]
    tensor([1., 2.])
    """
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    temporary = {
        f"{path}.{name}".lstrip(".")
        for path, module in backbone.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    new = written(backbone, plan, params, untie)
    return state | {name: tensor for name, tensor in new.items() if name not in temporary}


def merged_module(backbone: nn.Module, plan: Plan, params: Params, untie: bool = False) -> nn.Module:
    """A new module of the backbone's class with the merged weights; it shares no storage with the backbone.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> delta = fd.BitFitModel(backbone, modified_modules=["0"])
    >>> model = merged_module(backbone, delta.plan, {"0.bitfit.bias": torch.tensor([1.0, 2.0])})
    >>> (model[0].bias - backbone[0].bias).detach()
    tensor([1., 2.])
    """
    new = written(backbone, plan, params, untie)
    model = copy_module(backbone)
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


def written(backbone: nn.Module, plan: Plan, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """Of :func:`merged_state`, the tensors that ``params`` write anew, under every name; all names of one hold one.

    Parameters and buffers of the backbone among ``params`` (trained leaves, running statistics) are written as well.

    >>> backbone = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    >>> delta = fd.LoraModel(backbone, modified_modules=["1"])
    >>> written(backbone, delta.plan, {"0.running_mean": torch.ones(2)})
    {'0.running_mean': tensor([1., 1.])}
    """
    names, paths = _names(backbone), _paths(backbone)
    own = dict(backbone.named_parameters(remove_duplicate=False))
    own |= dict(backbone.named_buffers(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    apart: dict[str, tuple[str, str]] = {}  # an end of a tied pair: the site that changed it, and by what delta
    for name, tensor in params.items():
        if name in own and not _is_same(tensor, own[name]):
            changed |= dict.fromkeys(names[name], tensor.to(own[name].dtype))
    for path, attachments in plan.attachments.items():
        module = backbone.get_submodule(path)
        # As in a call: what rewrites the module's tensors does so before anything acts on its hidden values.
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
                here = [f"{at}.{leaf}".lstrip(".") for at in paths[id(module)]]
                if any(other not in here for other in names.get(name, ())):
                    apart[name] = path, attachment.name
                changed |= dict.fromkeys(here, tensor)
    for name, (path, acting) in apart.items() if not untie else ():
        for other in names[name]:
            if other not in changed or not torch.equal(changed[other], changed[name]):
                raise MergeError(
                    f"{name} is tied to {other}, and {acting} acts on {path} alone, or otherwise there: merged, the "
                    f"two would differ. Write delta.merge(params, untie=True), and load it into an untied model "
                    f"(tie_word_embeddings=False)."
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
    """Raises `MergeError` where nothing can be written into the module's tensors."""
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
            f"{path} is parametrised: its weight is computed at each call. Write "
            f"torch.nn.utils.parametrize.remove_parametrizations on a copy first."
        )
    for name, tensor in module._parameters.items():
        if tensor is not None and is_quantised(tensor):
            raise MergeError(
                f"{path}.{name} is quantised ({type(tensor).__name__}): {attachment.name} cannot be written into it "
                f"without rounding it away. Keep it as a delta: delta.apply(params, ...) or delta.bind(params); or "
                f"merge into the model before it is quantised."
            )


def _is_same(tensor: Tensor, own: Tensor) -> bool:
    """Whether ``tensor`` is the backbone's own, as ``delta.attach`` hands it out."""
    if tensor is own:
        return True
    wrapped = is_wrapped(tensor) or is_wrapped(own)
    return not wrapped and tensor.data_ptr() == own.data_ptr() != 0 and tensor.shape == own.shape


def _names(backbone: nn.Module) -> dict[str, list[str]]:
    """Every parameter's and buffer's name with all names of the same tensor."""
    found: dict[int, list[str]] = {}
    tensors = [*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        found.setdefault(id(tensor), []).append(name)
    return {name: ends for ends in found.values() for name in ends}


def _paths(backbone: nn.Module) -> dict[int, list[str]]:
    """Every path of every module, by the module's id."""
    found: dict[int, list[str]] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def _untie(model: nn.Module) -> None:
    """Give every end of a tied parameter a tensor of its own."""
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
