"""Merging: the delta written into weight space, as a new state dict or a new module; the backbone stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .run.bound import rewritten
from .run.call import Params
from .errors import MergeError
from .sites.structure import copy_module, is_quantised

if TYPE_CHECKING:
    from .model import DeltaModel


def merge(delta: DeltaModel, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """The backbone's state dict with ``params`` written in: new tensors where something changed, its own elsewhere.

    Raises :class:`MergeError` where a delta is no function of the site's weights, and where it acts on one end of a
    tied pair alone, unless ``untie`` says that the two ends may differ from then on.
    """
    return {name: tensor.detach() for name, tensor in delta.backbone.state_dict().items()} | changes(
        delta, params, untie
    )


def changes(delta: DeltaModel, params: Params, untie: bool = False) -> dict[str, Tensor]:
    """Of :func:`merge`, the tensors that ``params`` write anew."""
    backbone, plan = delta.backbone, delta.plan
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    aliases = _aliases(backbone)
    changed: dict[str, Tensor] = {}
    for name, ends in plan.trained.items():
        for end in ends if name in params else ():
            changed[end] = params[name].to(aliases_dtype(state, end, params[name]))
    for path, attachments in plan.attachments.items():
        for attachment in attachments:
            if not attachment.among(params):
                continue
            present = attachment.config.present(attachment.of(params))
            if present is not None and not present > 0:
                continue
            refusal = attachment.config.unmergeable(attachment.site)
            if refusal:
                raise MergeError(
                    f"{attachment.name} at {path} cannot be merged: {refusal}. Keep it as a delta: "
                    f"delta.apply(params, ...) "
                    f"or delta.bind(params)."
                )
            module = backbone.get_submodule(path)
            if is_parametrized(module):
                raise MergeError(
                    f"{path} is parametrised: its weight is computed at each call. Write "
                    f"torch.nn.utils.parametrize.remove_parametrizations on a copy first."
                )
            own = {
                name: changed.get(f"{path}.{name}", tensor.detach())
                for name, tensor in module._parameters.items()
                if tensor is not None
            }
            quantised = [
                name for name, tensor in module._parameters.items() if tensor is not None and is_quantised(tensor)
            ]
            if quantised:
                raise MergeError(
                    f"{path}.{quantised[0]} is quantised ({type(module._parameters[quantised[0]]).__name__}): "
                    f"{attachment.name} cannot be written into it without rounding it away. Keep it as a delta: "
                    f"delta.apply(params, ...) or delta.bind(params); or merge into the model before it is quantised."
                )
            for name, tensor in rewritten(attachment, attachment.of(params), own, training=False).items():
                same = [end for end in aliases.get(name, ()) if _owner(backbone, end) is module]
                for end in same:
                    changed[end] = tensor
                for other in aliases.get(name, ()):
                    if other not in same and not untie and changed.get(other) is not tensor:
                        raise MergeError(
                            f"{name} is tied to {other}, and {attachment.name} acts on {path} alone: merged, the "
                            f"two would "
                            f"differ. Write delta.merge(params, untie=True), and load it into an untied model "
                            f"(tie_word_embeddings=False)."
                        )
                changed[name] = tensor
    return changed


def _owner(backbone: nn.Module, name: str) -> nn.Module:
    return backbone.get_submodule(name.rpartition(".")[0])


def aliases_dtype(state: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The backbone's tensor of that name, whose dtype and device a merged leaf takes."""
    return state.get(name, tensor)


def _aliases(backbone: nn.Module) -> dict[str, list[str]]:
    """Every parameter's name with all names of the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: ends for ends in names.values() for name in ends}


def merged(delta: DeltaModel, params: Params, untie: bool = False) -> nn.Module:
    """A new module of the backbone's class with the merged weights; it shares no storage with the backbone."""
    state = merge(delta, params, untie)
    model = copy_module(delta.backbone)
    if untie:
        _untie(model)
    for name, tensor in state.items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if own in module._buffers:
            continue
        parameter = module._parameters.get(own)
        value = tensor.detach().clone()
        if parameter is None:
            module.register_parameter(own, nn.Parameter(value, requires_grad=False))
        else:
            parameter.data.copy_(value)
    return model


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
