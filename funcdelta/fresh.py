"""Fresh params: every leaf drawn from (seed, site, delta name) alone, so member i never depends on n.

Random numbers come from a CPU generator a leaf group, whatever the device, and torch's default dtype and device are set
aside while methods draw: a member is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .methods.leaf import as_leaves, values_of
from .planning.plan import Attachment, Plan
from .planning.sharing import Shared
from .pytrees.constants import still
from .pytrees.drawing import own_defaults
from .pytrees.seeding import derive
from .sites.own import Own
from .sites.site import Site


def fresh_member(
    plan: Plan,
    backbone: nn.Module,
    order: tuple[str, ...],
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """One member's params in the order of ``order``."""
    with own_defaults():
        params = _drawn(plan, backbone, seed, dtype, device)
    return {name: params[name] for name in order}


def _drawn(
    plan: Plan, backbone: nn.Module, seed: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    for group in plan.shared:
        rng = torch.Generator().manual_seed(derive(seed, group.name))
        drawn = values_of(as_leaves(group.config.shared(group.sites, rng), "shared"))
        params.update(_placed(group, drawn, group.sites[0], dtype, device))
    for attachment in plan.all():
        rng = torch.Generator().manual_seed(derive(seed, f"{attachment.site.address}.{attachment.name}"))
        own = Own(backbone.get_submodule(attachment.site.path))
        drawn = values_of(as_leaves(attachment.config.leaves(attachment.site, own, rng), "init"))
        params.update(_placed(attachment, drawn, attachment.site, dtype, device))
    parameters = dict(backbone.named_parameters())
    for name in plan.trained:
        tensor = parameters[name]
        value = _redrawn(backbone, name, tensor, seed) if name in plan.fresh else tensor.detach().clone()
        params[name] = value.to(dtype=dtype or trained_dtype(tensor), device=device or tensor.device)
    return params


def trained_dtype(tensor: Tensor) -> torch.dtype:
    """Trained backbone leaves follow the rule of all leaves: float32 where the backbone is half precision.

    >>> trained_dtype(torch.zeros(1, dtype=torch.bfloat16)), trained_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _placed(
    part: Attachment | Shared,
    drawn: Mapping[str, Tensor],
    site: Site,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The leaves that a method drew, by key, in their dtype and on the site's device."""
    found: dict[str, Tensor] = {}
    for leaf, key in part.leaves.items():
        if key not in part.shapes:
            continue  # shared with other sites, or expanded from such
        if leaf not in drawn or tuple(drawn[leaf].shape) != part.shapes[key]:
            raise ConfigError(
                f"{type(part.config).__name__}.init gave other leaves at {site.path} than when the delta was built: "
                f"shapes may depend on the site only. Expected {part.shapes[key]} for {leaf}."
            )
        like = dtype if dtype and drawn[leaf].is_floating_point() else part.dtypes[key]
        found[key] = drawn[leaf].to(dtype=like, device=device or site.device)
    return still(found, part.constants)


def _redrawn(backbone: nn.Module, name: str, tensor: Tensor, seed: int) -> Tensor:
    """A backbone leaf drawn anew, as its model would draw it: matrices at random, biases 0, norms 1.

    Transformers models draw N(0, initializer_range); others as torch's own layers, U(±1/sqrt(fan in)).
    """
    rng = torch.Generator().manual_seed(derive(seed, name))
    if tensor.ndim < 2:
        norm = "norm" in type(backbone.get_submodule(name.rpartition(".")[0])).__name__.lower()
        return torch.ones(tensor.shape) if norm and name.endswith("weight") else torch.zeros(tensor.shape)
    spread = getattr(getattr(backbone, "config", None), "initializer_range", None)
    if isinstance(spread, float):
        return torch.randn(tensor.shape, generator=rng) * spread
    bound = 1 / math.sqrt(math.prod(tensor.shape[1:]))
    return torch.empty(tensor.shape).uniform_(-bound, bound, generator=rng)


def random_members(
    plan: Plan, backbone: nn.Module, order: tuple[str, ...], n: int, present: frozenset[str]
) -> dict[str, Tensor]:
    """A stack of n members with every leaf moved away from its start, for the probe: a fresh LoRA would hide a mix."""
    constants = set(plan.constants)
    kept = {key for name, keys in plan.keys().items() if name in present for key in keys}
    kept |= present & plan.trained.keys()
    rng = torch.Generator().manual_seed(derive(0, "probe"))
    found: dict[str, Tensor] = {}
    for name, leaf in fresh_member(plan, backbone, order, 0, None, None).items():
        if name not in kept:
            continue
        found[name] = leaf.expand(n, *leaf.shape)
        if name not in constants and leaf.is_floating_point():
            noise = torch.randn(found[name].shape, generator=rng, dtype=torch.float32, device="cpu")
            found[name] = leaf + noise.to(leaf) * 0.05
        else:
            found[name] = found[name].clone()
    return found
