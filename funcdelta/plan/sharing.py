"""Leaves that the sites of one delta share, and the sites' leaves that are computed from them before a call.

A method may have leaves ``<delta name>.<leaf>`` that all its sites use as they are (one rule for all compacters), or
from which it computes each site's leaves once per call (one network that computes every prefix).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods.config import BaseDeltaConfig
from ..methods.leaf import Leaf, declared, members_and_all, values_of
from ..methods.own import Own
from ..methods.site import Site
from ..randomness import refuse_draws
from ..transforms import inside_backward
from ..trees.drawing import own_defaults
from ..trees.seeding import derive


@dataclass(frozen=True)
class Shared:
    """The shared leaves of one delta.

    Attributes:
        name: the delta's name, the first token of every key.
        leaves: ``{leaf: key in params}``.
        shapes, dtypes: those of one member's leaves, by key.
        constants: the keys of leaves that never train.
        start: one member's initial leaves.
        fixed: the tensors that all members have in common.
        expanded: ``{site path: {leaf: key}}`` of the leaves that the method computes from these for each site.
    """

    name: str
    config: BaseDeltaConfig
    sites: tuple[Site, ...]
    leaves: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    constants: tuple[str, ...]
    expanded: dict[str, dict[str, str]]
    start: dict[str, Leaf]
    fixed: dict[str, Tensor]

    def among(self, params: Mapping[str, Any]) -> bool:
        """Whether ``params`` holds these leaves."""
        return next(iter(self.leaves.values())) in params

    def expand(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One member's leaves at every site, by key, computed from the shared ones."""
        p = {**self.fixed, **{leaf: params[key] for leaf, key in self.leaves.items()}}
        found = self.config.expand(self.sites, p)
        return {key: found[path][leaf] for path, keys in self.expanded.items() for leaf, key in keys.items()}


def own_at(sites: Sequence[Site], backbone: nn.Module) -> dict[str, Own]:
    """The backbone's tensors at ``sites``, by the site's address.

    >>> from funcdelta.methods.site import site_of
    >>> backbone = nn.Sequential(nn.Linear(2, 3))
    >>> list(own_at([site_of("0", backbone[0])], backbone)["0"])
    ['weight', 'bias']
    """
    return {site.address: Own(backbone.get_submodule(site.path), site.path) for site in sites}


def share(
    config: BaseDeltaConfig, name: str, sites: tuple[Site, ...], backbone: nn.Module
) -> tuple[Shared | None, dict[str, Tensor]]:
    """The leaves of a member that ``config`` has for all its sites, ``None`` if it has none; and what all members have.

    The latter are also shared by all sites.
    """
    own = own_at(sites, backbone)
    rng, who = torch.Generator().manual_seed(derive(0, config.seed_name(name))), f"{type(config).__name__}.shared"
    with refuse_draws(who), own_defaults():
        given, of_all = members_and_all(declared(config.shared_leaves(sites, own, rng), who))
    first = sites[0]
    fixed = {leaf: first.placed(tensor) for leaf, tensor in of_all.items()}
    if not given:
        return None, fixed
    leaves = values_of(given)
    keys = {leaf: f"{name}.{leaf}" for leaf in leaves}
    expanded: dict[str, dict[str, str]] = {}
    if config.gives("expand"):
        found = config.expand(sites, {**fixed, **leaves})
        if set(found) != {site.address for site in sites}:
            raise ConfigError(
                f"{type(config).__name__}.expand returned leaves for {sorted(found)}; expected "
                f"{sorted(site.address for site in sites)}."
            )
        expanded = {path: {leaf: f"{path}.{name}.{leaf}" for leaf in found[path]} for path in found}
    return Shared(
        name=name,
        config=config,
        sites=sites,
        leaves=keys,
        shapes={keys[leaf]: tuple(tensor.shape) for leaf, tensor in leaves.items()},
        dtypes={keys[leaf]: first.dtype_of(tensor) for leaf, tensor in leaves.items()},
        constants=tuple(key for leaf, key in keys.items() if not given[leaf].trains),
        expanded=expanded,
        start=given,
        fixed=fixed,
    ), fixed


def expand_member(shared: Sequence[Shared], params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``params`` of one member with the leaves that are computed for each site; the same dict if there are none."""
    found: dict[str, Tensor] = {}
    for group in shared:
        if group.expanded and group.among(params):
            found |= group.expand(params)
    return {**params, **found} if found else params


def expand_stack(shared: Sequence[Shared], stack: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """:func:`expand_member` for a stack, mapped over its members."""
    found: dict[str, Tensor] = {}
    for group in shared:
        if group.expanded and group.among(stack):
            leaves = {key: stack[key] for key in group.leaves.values()}
            found |= torch.vmap(group.expand, randomness="different")(leaves)
    return {**stack, **found} if found else stack


class Expanding(Mapping[str, Tensor]):
    """The leaves of a view, with those computed from shared ones: once when a call begins, otherwise on demand.

    A module of the view that is called by itself computes them anew. A checkpointed module that is recomputed in a
    backward pass must save the same tensors as in its first run, so it gets those of the call; but if the first run
    kept no graph (``use_reentrant=True``), each module needs its own graph.
    """

    def __init__(self, shared: Sequence[Shared], leaves: Mapping[str, Tensor]) -> None:
        self._leaves = leaves
        self._expanding = [group for group in shared if group.expanded and group.among(leaves)]
        self._groups = {
            key: group for group in self._expanding for keys in group.expanded.values() for key in keys.values()
        }
        self._found: dict[str, Tensor] | None = None
        self._before: dict[str, Tensor] = {}
        self._graph = self._lost_graph = False

    def begin(self, *_: Any) -> None:
        """Compute the leaves as a call of the whole view begins, outside of any checkpoint, for all of the call."""
        self._found, self._graph, self._lost_graph = {}, torch.is_grad_enabled(), False
        for group in self._expanding:
            self._found |= group.expand(self._leaves)

    def end(self, *_: Any) -> None:
        """Keep the call's leaves as it ends, for recomputations."""
        self._found, self._before = None, self._found or {}

    def __getitem__(self, name: str) -> Tensor:
        group = self._groups.get(name)
        if group is None:
            return self._leaves[name]
        if self._found is not None:
            self._lost_graph |= self._graph and not torch.is_grad_enabled()
            return self._found[name]
        if inside_backward() and not self._lost_graph and name in self._before:
            return self._before[name]
        return group.expand(self._leaves)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._groups or name in self._leaves

    def __iter__(self) -> Iterator[str]:
        yield from self._leaves
        yield from self._groups

    def __len__(self) -> int:
        return len(self._leaves) + len(self._groups)
