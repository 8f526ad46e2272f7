"""Checks that a method's two forms agree: ``before`` and ``after`` on activations, ``weights`` on tensors.

``apply`` computes by ``before`` and ``after``, and merging writes the result of ``weights``, so a method whose forms
differ would compute something else once it is merged. Both run once, with random leaves, on a copy of the layer in
double precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods.acts import Acts
from ..methods.config import BaseDeltaConfig
from ..methods.site import Site
from ..structures.modules.forwards import is_plain
from ..structures.modules.structure import copy_structure
from ..transforms import outside_transforms
from ..trees.drawing import own_defaults
from .axes import in_order
from .rewriting import LARGEST

SPREAD = 0.3


def compare_forms(
    config: BaseDeltaConfig, site: Site, module: nn.Module, p: Mapping[str, Tensor], constants: frozenset[str]
) -> None:
    """Raise `ConfigError` if both forms of ``config`` run at ``site`` and return different outputs.

    ``p`` are the method's fresh leaves there; all but ``constants`` are moved away from their initial values.
    """
    with own_defaults():
        x = _input(site)
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    acts = config.acts(dataclasses.replace(site, training=False))
    known = x is not None and not site.own_forward and not site.packed and acts.unmergeable is None
    known = known and not acts.conditions  # which no call has told yet
    plain = all(is_plain(t) for t in own.values()) and not any(t.is_meta for t in own.values())
    if x is None or not known or not plain or not own or sum(t.numel() for t in own.values()) > LARGEST:
        return
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), outside_transforms(), own_defaults():
        away = {leaf: moved(tensor, leaf not in constants, rng) for leaf, tensor in p.items()}
        found = _both(acts, config.axis_order, module, away, x)
    if found is None:
        return
    values, weights = found
    if values.shape == weights.shape and (values - weights).abs().max() <= 1e-6 * (1 + weights.abs().max()):
        return
    told = "differ in shape"
    if values.shape == weights.shape:
        told = f"differ by {float((values - weights).abs().max()):.1e}"
    raise ConfigError(
        f"{type(config).__name__}: with random leaves, before and after return another output at {site.path} than "
        f"weights does (they {told}), so merging would change what the delta computes. Make them agree, or let "
        f"unmergeable(self, site) say why the delta cannot be merged there."
    )


def _both(
    acts: Acts, order: tuple[int, ...] | None, module: nn.Module, p: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The output by activations and by weights; ``None`` if one of them raises."""
    copied = copy_structure(module).eval().double()
    for child in copied.modules():
        child._forward_hooks.clear()
    device = next(copied.parameters()).device
    x = x.to(device) if not x.is_floating_point() else x.to(device, torch.float64)
    p = {leaf: tensor.to(device) for leaf, tensor in p.items()}
    own = {name: tensor for name, tensor in copied._parameters.items() if tensor is not None}
    try:
        entering = in_order(acts.before, order)(p, x) if acts.before is not None else x
        leaving = copied(entering)
        values = leaving
        if acts.after is not None:
            values = in_order(acts.after, order)(p, leaving, entering)
        assert acts.weights is not None
        for name, tensor in acts.weights(p, dict(own)).items():
            copied._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        return values, copied(x)
    except Exception:  # the first call raises the method's error again, and names the site
        return None


def moved(tensor: Tensor, trains: bool, rng: torch.Generator) -> Tensor:
    """A leaf in double precision; one that ``trains`` is moved from its start: a fresh LoRA would agree with anything.

    >>> moved(torch.ones(2), False, torch.Generator()), moved(torch.tensor(3), True, torch.Generator())
    (tensor([1., 1.], dtype=torch.float64), tensor(3))
    """
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.double()
    if not trains:
        return tensor
    return tensor + SPREAD * torch.randn(tensor.shape, generator=rng, dtype=torch.float64)


def _input(site: Site) -> Tensor | None:
    """A random input for a layer of the site's kind; ``None`` if its inputs are unknown."""
    rng = torch.Generator().manual_seed(0)
    if site.in_features is None:
        return None
    if site.kind == "embedding":
        return torch.randint(site.in_features, (2, 3), generator=rng)
    if site.kind in ("linear", "transposed_linear") or (site.kind == "norm" and site.channel_axis == -1):
        return torch.randn(2, 3, site.in_features, generator=rng)
    if site.kind in ("conv1d", "conv2d", "conv3d", "transposed_conv"):
        sizes = zip(site.option("kernel_size"), site.option("dilation"), strict=True)
        return torch.randn(2, site.in_features, *[(k - 1) * d + 3 for k, d in sizes], generator=rng)
    return None
