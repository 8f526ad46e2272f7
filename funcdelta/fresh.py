"""Fresh params: every leaf is drawn from (seed, site, name of the delta) alone, so member i does not depend on n.

Numbers always come from CPU generators, and methods draw with torch's original default dtype and device, so a member
is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .methods.leaf import Leaves, as_leaves
from .methods.own import Own
from .methods.site import Site
from .plan.attachment import Attachment
from .plan.plan import Plan
from .plan.sharing import Shared, own_at
from .trees.constants import still
from .trees.drawing import own_defaults
from .trees.noting import Noting
from .trees.seeding import derive


def fresh_member(
    plan: Plan,
    backbone: nn.Module,
    order: tuple[str, ...],
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Draw one member's params, listed in the order of the names in ``order``."""
    params: dict[str, Tensor] = {}
    for source in _sources(plan, backbone, dtype):
        with own_defaults():
            drawn = source.draw(torch.Generator(), seed)
        found = {
            # A copy: a method may give one tensor twice, and every leaf is written on its own.
            key: source.checked(leaf, drawn).to(dtype=like, device=device or source.device, copy=True)
            for leaf, (key, _, like) in source.leaves.items()
        }
        params.update(still(found, source.constants))
    return {name: params[name] for name in order}


def fresh_stack(
    plan: Plan,
    backbone: nn.Module,
    order: tuple[str, ...],
    seeds: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Draw the params of several members, (n, ...): row i is :func:`fresh_member` with ``seeds[i]``.

    Leaves are drawn site by site straight into the stack, so memory holds them once. Where the first member's start
    uses no random number (singular vectors of the site's weight), it is the start of all members.
    """
    params: dict[str, Tensor] = {}
    rng = Noting()  # reseeded for every draw, because making one costs as much as a thousand numbers
    for source in _sources(plan, backbone, dtype):
        found = {
            key: torch.empty((len(seeds), *shape), dtype=like, device=device or source.device)
            for key, shape, like in source.leaves.values()
        }
        rng.begin()
        with own_defaults():
            first = source.draw(rng, seeds[0])
        if not rng.used:
            with torch.no_grad():
                for leaf, (key, _, _) in source.leaves.items():
                    found[key].copy_(source.checked(leaf, first))
            params.update(still(found, source.constants))
            continue
        step = source.at_once()
        for begin in range(0, len(seeds), step):
            known = [] if begin else [first]
            with own_defaults():
                drawn = known + [source.draw(rng, seed) for seed in seeds[begin + len(known) : begin + step]]
            for leaf, (key, _, _) in source.leaves.items():
                _fill(found[key][begin : begin + step], [source.checked(leaf, one) for one in drawn])
        params.update(still(found, source.constants))
    return {name: params[name] for name in order}


def _fill(room: Tensor, rows: list[Tensor]) -> None:
    """Stack ``rows`` into ``room``, which may have another dtype or device."""
    with torch.no_grad():
        if room.dtype == rows[0].dtype and room.device == rows[0].device:
            torch.stack(rows, out=room)
        else:
            room.copy_(torch.stack(rows))


@dataclass(frozen=True)
class _Source:
    """Leaves that are drawn together: a method's at one site, or one trained leaf of the backbone.

    Attributes:
        what: the function that draws, for messages.
        draw: returns the leaves for a seed; it seeds the generator itself.
        leaves: ``{name from draw: (key in params, shape, dtype)}``.
        device: the device that the leaves belong on.
        constants: keys of the leaves that never train.
    """

    what: str
    draw: Callable[[torch.Generator, int], Mapping[str, Tensor]]
    leaves: Mapping[str, tuple[str, tuple[int, ...], torch.dtype]]
    device: torch.device
    constants: tuple[str, ...] = ()

    def checked(self, leaf: str, drawn: Mapping[str, Tensor]) -> Tensor:
        """The drawn leaf; raises if its shape is not the one found when the delta was built."""
        shape = self.leaves[leaf][1]
        if leaf not in drawn or drawn[leaf].shape != shape:
            raise ConfigError(
                f"{self.what} returned other leaves than when the delta was built: expected {shape} for {leaf}. Shapes "
                f"may depend on the site only."
            )
        return drawn[leaf]

    def at_once(self) -> int:
        """How many members to draw before stacking their leaves, so that these stay in the processor's cache."""
        return max(1, CACHED // max([1, *(math.prod(shape) for _, shape, _ in self.leaves.values())]))


CACHED = 1 << 16
"""Entries of one leaf that fit into a processor's cache beside other leaves."""


def _sources(plan: Plan, backbone: nn.Module, dtype: torch.dtype | None) -> Iterator[_Source]:
    for group in plan.shared:
        make = partial(group.config.shared_leaves, group.sites, own_at(group.sites, backbone))
        yield _of_method(group, group.sites[0], group.name, make, dtype)
    for attachment in plan.all():
        site = attachment.site
        make = partial(attachment.config.leaves, site, Own(backbone.get_submodule(site.path), site.path))
        yield _of_method(attachment, site, f"{site.address}.{attachment.name}", make, dtype)
    parameters = dict(backbone.named_parameters())
    for name in plan.trained:
        tensor = parameters[name]
        draw = partial(_redrawn, backbone, name, tensor) if name in plan.fresh else partial(_copied, name, tensor)
        leaves = {name: (name, tuple(tensor.shape), dtype or trained_dtype(tensor))}
        yield _Source(name, draw, leaves, tensor.device)


def _of_method(
    part: Attachment | Shared,
    site: Site,
    name: str,
    make: Callable[[torch.Generator], Leaves],
    dtype: torch.dtype | None,
) -> _Source:
    """The leaves that a method draws from the seed at ``name``."""
    leaves = {
        leaf: (key, part.shapes[key], dtype if dtype and part.dtypes[key].is_floating_point else part.dtypes[key])
        for leaf, key in part.leaves.items()
        if key in part.shapes  # the others are shared between sites, or computed from shared leaves
    }

    def draw(rng: torch.Generator, seed: int) -> Mapping[str, Tensor]:
        given = as_leaves(make(rng.manual_seed(derive(seed, name))), what)
        # What all members have together is there once, and is not to be held until the last of them has been drawn.
        return {leaf: one.value for leaf, one in given.items() if one.of == "member"}

    what = f"{type(part.config).__name__}.init at {site.address}"
    return _Source(what, draw, leaves, site.device, part.constants)


def _copied(name: str, tensor: Tensor, rng: torch.Generator, seed: int) -> dict[str, Tensor]:
    return {name: tensor.detach().clone()}


def trained_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a trained backbone leaf, by the rule for all leaves: float64 stays, others become float32.

    >>> trained_dtype(torch.zeros(1, dtype=torch.bfloat16)), trained_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _redrawn(backbone: nn.Module, name: str, tensor: Tensor, rng: torch.Generator, seed: int) -> dict[str, Tensor]:
    """Draw a backbone leaf as its model initialises it: matrices at random, biases 0, norms 1.

    Transformers models draw from N(0, initializer_range²), others from U(±1/sqrt(fan in)), as torch's layers do.
    """
    if tensor.ndim < 2:
        norm = "norm" in type(backbone.get_submodule(name.rpartition(".")[0])).__name__.lower()
        return {name: torch.ones(tensor.shape) if norm and name.endswith("weight") else torch.zeros(tensor.shape)}
    rng.manual_seed(derive(seed, name))
    spread = getattr(getattr(backbone, "config", None), "initializer_range", None)
    if isinstance(spread, float):
        return {name: torch.randn(tensor.shape, generator=rng) * spread}
    bound = 1 / math.sqrt(math.prod(tensor.shape[1:]))
    return {name: torch.empty(tensor.shape).uniform_(-bound, bound, generator=rng)}


def random_members(
    plan: Plan, backbone: nn.Module, order: tuple[str, ...], n: int, present: frozenset[str]
) -> dict[str, Tensor]:
    """A stack of n members with noise on every leaf, for the probe: fresh LoRAs (B = 0) would hide mixed rows."""
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
