"""The backbone's own tensors in a file: trained leaves, or copies of what the backbone has.

PEFT writes what ``modules_to_save`` and ``bias`` train, and of embeddings and heads that have a LoRA, or were resized,
the tensor itself: that one is dropped where the backbone has the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...plan.naming import names_of_tensors
from .keys import Key

Problem = tuple[str, list[str], str]
"""What is wrong, with which names, and what to do."""


def trained_leaves(
    backbone: nn.Module, found: Mapping[str, Key], tensors: Mapping[str, Tensor], saved: Sequence[str], tied: bool
) -> tuple[dict[str, Tensor], list[Problem]]:
    """``(trained leaves, problems)`` of ``{name in the backbone: key}``; leaves under the first name of their tensor.

    Args:
        saved: ``modules_to_save``, whose tensors are leaves even if training has not changed them.
        tied: whether one end of a tied tensor means all (``ensure_weight_tying``).

    >>> backbone = nn.Linear(2, 1)
    >>> trained_leaves(backbone, {"bias": Key("bias", "bias", "")}, {"bias": torch.ones(1)}, [], False)
    ({'bias': tensor([1.])}, [])
    """
    here = dict(backbone.named_parameters(remove_duplicate=False))
    buffers = dict(backbone.named_buffers(remove_duplicate=False))
    ends = names_of_tensors(backbone)
    tables = _tables(backbone)
    leaves: dict[str, Tensor] = {}
    shapes: list[str] = []
    changed: list[str] = []
    alone: list[str] = []
    unlike: list[str] = []
    for name, key in found.items():
        own, value = (here.get(name), tensors[key.raw])
        own = buffers[name] if own is None else own
        if value.shape != own.shape:
            shapes.append(f"{name} (expected {tuple(own.shape)}, found {tuple(value.shape)})")
            continue
        same = torch.equal(value, own.detach().to("cpu", value.dtype))
        if name not in here:
            changed += [] if same else [name]
            continue
        every = ends[id(own)]
        owner = name.rpartition(".")[0]
        copy = key.copied or owner in tables
        if same and copy and not any(owner.endswith(module) for module in saved):
            continue
        others = [end for end in every if end != name and end not in found]
        if others and not tied:
            alone.append(f"{name} (tied to {', '.join(others)})")
        elif every[0] in leaves and not torch.equal(leaves[every[0]], value):
            unlike.append(name)
        else:
            leaves[every[0]] = value
    ordered = {name: leaves[name] for name in here if name in leaves}
    given: list[Problem] = [
        (
            "of another shape than the backbone's",
            shapes,
            " Resize the backbone first, backbone_model.resize_token_embeddings(n), or make it with as many labels.",
        ),
        (
            "buffers that differ from the backbone's",
            changed,
            " Put them into the backbone first: backbone_model.load_state_dict(those, strict=False).",
        ),
        (
            "trained at one end of a tied tensor alone",
            alone,
            " Untie the backbone first, with a tensor of its own at each end: "
            "module.weight = torch.nn.Parameter(module.weight.detach().clone()).",
        ),
        ("ends of one tied tensor that differ", unlike, " Untie the backbone first."),
    ]
    return ordered, [problem for problem in given if problem[1]]


def _tables(backbone: Any) -> set[str]:
    """The paths of a Transformers model's token embedding and head, which PEFT may save without training them."""
    found = [getattr(backbone, f"get_{which}_embeddings", None) for which in ("input", "output")]
    modules: list[Any] = []
    for get in found:
        try:
            modules += [get()] if callable(get) else []
        except (NotImplementedError, AttributeError):  # a model that has none
            continue
    return {path for path, module in backbone.named_modules() if any(module is one for one in modules)}
