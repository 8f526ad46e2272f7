"""Separates the backbone's tensors in a file into trained leaves and copies of the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ...match import matches
from .keys import Keys

Problem = tuple[str, list[str], str]
"""What is wrong, the names concerned, and what to do."""


def trained_leaves(
    backbone: nn.Module, keys: Keys, tensors: Mapping[str, Tensor], kept: Iterable[str]
) -> tuple[dict[str, Tensor], list[Problem]]:
    """``(trained leaves, problems)``: leaves under the first name of their tensor in the backbone.

    OpenDelta saves what requires grad, so the tensors in a file were trained. But a model that was never frozen is
    saved whole; then tensors that equal the backbone's are dropped, unless ``kept`` (``unfrozen_modules``) names them.

    >>> from .keys import sort_keys
    >>> backbone = nn.Linear(2, 1)
    >>> whole = {name: tensor.detach() for name, tensor in backbone.named_parameters()}
    >>> trained_leaves(backbone, sort_keys(whole, backbone), whole, [])
    ({}, [])
    """
    first: dict[int, str] = {}
    here = dict(backbone.named_parameters(remove_duplicate=False))
    here |= dict(backbone.named_buffers(remove_duplicate=False))
    for name, tensor in here.items():
        first.setdefault(id(tensor), name)
    parameters = {name for name, _ in backbone.named_parameters()}
    leaves = [key for group in keys.deltas.values() for at in group.own.values() for key in at.values()]
    whole = parameters <= {first[id(here[key])] for key in (*keys.backbone, *leaves) if key in here}
    found: dict[str, Tensor] = {}
    shapes: list[str] = []
    ends: list[str] = []
    buffers: list[str] = []
    for key in keys.backbone:
        value, own = tensors[key], here[key].detach().cpu()
        name, same = first[id(here[key])], tensors[key].to(here[key].dtype).equal(own)
        if value.shape != own.shape:
            shapes.append(f"{key} (expected {tuple(own.shape)}, found {tuple(value.shape)})")
        elif name not in parameters:
            buffers += [] if same else [key]
        elif name in found:
            ends += [] if found[name].equal(value) else [key]
        elif not (whole and same and not _named(name, kept)):
            found[name] = value
    load = " Load them into the backbone first: backbone_model.load_state_dict(those, strict=False)."
    problems: list[Problem] = [
        ("of another shape than the backbone's", shapes, ""),
        ("that name the same tied tensor but differ", ends, ""),
        ("buffers that differ from the backbone's", buffers, load),
    ]
    ordered = {name: found[name] for name, _ in backbone.named_parameters() if name in found}
    return ordered, [problem for problem in problems if problem[1]]


def _named(name: str, targets: Iterable[str]) -> bool:
    """Whether one of ``targets`` matches ``name`` or a module that contains it."""
    tokens = name.split(".")
    paths = [".".join(tokens[:end]) for end in range(1, len(tokens) + 1)]
    return any(matches(path, target) for target in targets for path in paths)
