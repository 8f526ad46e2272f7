"""The plan: which delta acts where, under which leaf names; resolved once when a delta is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import BaseDeltaConfig
from .errors import ConfigError, MatchError
from .match import find_key, matches, near, within
from .sharing import Shared, share
from .site import Site, site_of
from .structures import resolve


@dataclass(frozen=True)
class Attachment:
    """One delta at one site.

    Attributes:
        name: the delta's name, between the site's path and the leaf in every key of params.
        leaves: ``{leaf: key}`` of all that the method's functions get here, shared and expanded leaves too.
        shapes, dtypes: of one member's own leaves here, by key in params.
        by_weights: whether the delta acts by rewriting the site's tensors instead of its hidden values.
        key: the key in params of the first leaf, own or shared, which stands for all.
    """

    name: str
    config: BaseDeltaConfig
    site: Site
    leaves: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    constants: tuple[str, ...]
    by_weights: bool
    key: str

    def among(self, params: Mapping[str, Any]) -> bool:
        """Whether ``params`` holds this delta's leaves."""
        return self.key in params

    def of(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This delta's leaves under their own names."""
        return {leaf: params[key] for leaf, key in self.leaves.items()}

    def at(self, training: bool) -> Site:
        """The site in training or evaluation mode."""
        return self.site if self.site.training == training else dataclasses.replace(self.site, training=training)


@dataclass
class Plan:
    """Everything static about a delta on its backbone.

    Attributes:
        attachments: by site path, in the order in which they act.
        trained: backbone leaves that are trained too: ``{name: every name of the same tensor}``.
        fresh: those of ``trained`` that start anew instead of as a copy.
        ends: every parameter and buffer of the backbone, ``{name: every name of the same tensor}``.
        uncalled: sites whose tensors are read by the module above, which never calls them.
        shared: the leaves that the sites of one delta share.
        names: one name a config, in their order.
        measured: shapes of the hidden output at sites whose weights do not tell its width.
    """

    attachments: dict[str, tuple[Attachment, ...]]
    trained: dict[str, tuple[str, ...]]
    fresh: frozenset[str]
    ends: dict[str, tuple[str, ...]]
    uncalled: set[str]
    shared: tuple[Shared, ...] = ()
    names: tuple[str, ...] = ()
    measured: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the deltas, shared ones first."""
        return {key: shape for part in (*self.shared, *self.all()) for key, shape in part.shapes.items()}

    @property
    def constants(self) -> tuple[str, ...]:
        """The keys of all leaves that never train."""
        return tuple(key for part in (*self.shared, *self.all()) for key in part.constants)

    def keys(self) -> dict[str, frozenset[str]]:
        """``{delta name: the keys of its leaves in params}``."""
        found = {a.name: frozenset[str]() for a in self.all()}
        for part in (*self.shared, *self.all()):
            found[part.name] |= frozenset(part.shapes)
        return found

    def runner(self, path: str) -> str:
        """The module that runs with the tensors of the one at ``path``: itself, or the first called one above."""
        while path in self.uncalled:
            path = path.rpartition(".")[0]
        return path

    def owners(self, params: Mapping[str, Any]) -> dict[str, list[str]]:
        """Modules whose own tensors differ by member, each with the keys of params that say how."""
        found: dict[str, list[str]] = {}
        for name, ends in self.trained.items():
            for end in ends if name in params else ():
                found.setdefault(end.rpartition(".")[0], []).append(name)
        for attachment in self.all():
            if attachment.by_weights and attachment.among(params):
                found.setdefault(attachment.site.path, []).extend(attachment.leaves.values())
        return found

    def present(self, params: Mapping[str, Any]) -> frozenset[str]:
        """Which deltas and which trained leaves ``params`` hold; the structure that a layout belongs to."""
        deltas = {a.name for a in self.all() if a.among(params)}
        return frozenset(deltas | {name for name in self.trained if name in params})

    def all(self) -> list[Attachment]:
        """Every attachment, site by site."""
        return [attachment for group in self.attachments.values() for attachment in group]


ShapeProbe = Callable[[list[str]], Mapping[str, tuple[int, ...]]]


def build_plan(backbone: nn.Module, configs: Sequence[BaseDeltaConfig], measure: ShapeProbe) -> Plan:
    """Match every config against ``backbone``; ``measure(paths)`` gives output shapes where weights tell no width."""
    modules = dict(backbone.named_modules(remove_duplicate=False))
    canonical = {id(module): path for path, module in backbone.named_modules()}
    for config in configs:
        if not any(config.gives(function) for function in ("before", "after", "weights")):
            raise ConfigError(f"{type(config).__name__} gives none of before, after and weights: it would do nothing.")
        if config.axis_order is not None and not (config.gives("before") or config.gives("after")):
            raise ConfigError(f"axis_order: {type(config).__name__} acts on no hidden value; leave it out.")
    names = _delta_names(configs)
    chosen = [_select(backbone, modules, canonical, config) for config in configs]

    sites = {path: site_of(path, modules[path]) for paths in chosen for path in paths}
    for config, paths in zip(configs, chosen, strict=True):
        for path in paths:
            refusal = config.check(sites[path])
            if refusal:
                inner = [inner for inner, _ in modules[path].named_modules() if inner]
                below = f" Below it are: {', '.join(inner[:8])}." if inner else ""
                raise MatchError(f"{config.delta_type} cannot act at {path}: {refusal}.{below}")
    unknown = [path for path, site in sites.items() if site.out_features is None]
    measured = measure(unknown) if unknown else {}

    attachments: dict[str, list[Attachment]] = {}
    shared: list[Shared] = []
    for config, name, paths in zip(configs, names, chosen, strict=True):
        seen = {path: _as_seen_by(config, sites[path], measured.get(path)) for path in paths}
        group = share(config, name, tuple(seen.values()))
        if group is not None:
            if name in modules or any(key in modules for key in group.shapes):
                raise MatchError(
                    f"The backbone already has a module {name!r}, where {config.delta_type} would keep its shared "
                    f"leaves: give the config another name, name={name + '_delta'!r}."
                )
            shared.append(group)
        for path in paths:
            if isinstance(getattr(modules[path], name, None), (nn.Module, Tensor)):
                raise MatchError(
                    f"{path} already has a child {name!r}: give the config another name, name={name + '_delta'!r}."
                )
            attachments.setdefault(path, []).append(_attach(config, name, seen[path], modules, group))
    trained, fresh = _trained(backbone, modules, configs)
    uncalled = {path for path in attachments if _read_by_parent(path, modules)}
    return Plan(
        {path: tuple(group) for path, group in attachments.items()},
        trained,
        fresh,
        _all_ends(backbone),
        uncalled,
        tuple(shared),
        tuple(names),
        measured,
    )


def _as_seen_by(config: BaseDeltaConfig, site: Site, measured: tuple[int, ...] | None) -> Site:
    """The site with the width of its hidden output, in the order of axes that ``config`` asks for."""
    order = config.axis_order
    if order is not None and site.kind != "other" and (site.channel_axis != -1 or order[-1] != len(order) - 1):
        # An axis moved at a layer that says itself where its features are would be the wrong one.
        raise MatchError(
            f"axis_order={order} moves the features of {site.path} ({site.module_type}), which stand on axis "
            f"{site.channel_axis} and are found there: give this site to a config without axis_order."
        )
    if site.out_features is not None or measured is None:
        return site
    last = order[-1] if order is not None and len(order) == len(measured) else -1
    return dataclasses.replace(site, out_features=measured[last])


def _read_by_parent(path: str, modules: dict[str, nn.Module]) -> bool:
    """torch's attention reads its output projection's tensors and never calls the module."""
    return isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)


def _all_ends(backbone: nn.Module) -> dict[str, tuple[str, ...]]:
    """``{name: every name of the same tensor}`` for parameters and buffers."""
    return {ends[0]: tuple(ends) for ends in _names_of_tensors(backbone).values()}


def _names_of_tensors(backbone: nn.Module) -> dict[int, list[str]]:
    """Every name of every tensor by its id, one name a slot: a module that stands under two paths has one slot.

    Swapping one slot under two names would put the wrong tensor back.
    """
    names: dict[int, list[str]] = {}
    for path, module in backbone.named_modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{own}" if path else own)
    return names


def _delta_names(configs: Sequence[BaseDeltaConfig]) -> list[str]:
    """One name a config: its own, or its method's with a number from the second on."""
    given = [config.name for config in configs if config.name]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"Two configs have the name {name!r}: give each its own name=.")
    names: list[str] = []
    for config in configs:
        name = base = config.name or config.default_name or config.delta_type or type(config).__name__.lower()
        number = 0
        while config.name is None and (name in names or name in given):
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names


def _select(
    backbone: nn.Module, modules: dict[str, nn.Module], canonical: dict[int, str], config: BaseDeltaConfig
) -> list[str]:
    """The sites that ``config`` names, in the backbone's order; every name given has to mean something."""
    given = config.modified_modules
    if given is None:
        given = config.default_modified_modules
        if not given:
            raise MatchError(f"{config.delta_type} has no default sites: give modified_modules=[...].")
    if not given:
        raise MatchError("modified_modules=[] names no site: leave it out for the method's own sites.")
    targets = resolve(backbone, given)
    # A parametrised weight is computed by modules of its own, which are meant only when they are named.
    inner = any("parametrizations" in target for target in targets)
    names = [path for path in modules if path and (inner or ".parametrizations." not in path)]
    excluded = config.exclude_modules
    if excluded is None:
        # A method's own sites never include the language model's head; a head that is named is meant.
        excluded = () if config.modified_modules is not None else tuple(p for p in ("lm_head",) if p in modules)
    for path in excluded:
        if not any(within(name, path) for name in names):
            raise MatchError(f"exclude_modules: {path!r} is no module of {type(backbone).__name__}.{near(path, names)}")
    found: dict[str, None] = {}
    for target in targets:
        hits = [path for path in names if matches(path, target)]
        if not hits:
            raise MatchError(
                f"modified_modules: {target!r} matches no module of {type(backbone).__name__}.{near(target, names)}"
            )
    for path in names:
        if find_key(path, targets) and not any(within(path, left_out) for left_out in excluded):
            for site in config.spread(path, modules[path]):
                if not any(within(site, left_out) for left_out in excluded):
                    found[canonical[id(modules[site])]] = None
    if not found:
        raise MatchError(f"exclude_modules={list(excluded)} leaves none of the sites that {list(given)} name.")
    order = {path: position for position, path in enumerate(modules)}
    return sorted(found, key=order.__getitem__)


def _attach(
    config: BaseDeltaConfig, name: str, site: Site, modules: dict[str, nn.Module], group: Shared | None
) -> Attachment:
    before = torch.get_rng_state()
    leaves = config.init(site, torch.Generator().manual_seed(0))
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise ConfigError(
            f"{type(config).__name__}.init drew from torch's global generator, so members could not be reproduced: "
            f"pass generator=rng to every random call."
        )
    common = group.leaves if group is not None else {}
    constants = config.constants(site)
    if not (leaves or common) or set(constants) - leaves.keys() - common.keys():
        raise ConfigError(f"{type(config).__name__}.init gave {sorted(leaves)}; constants are {sorted(constants)}.")
    keys = {leaf: f"{site.path}.{name}.{leaf}" for leaf in leaves}
    given = group.expanded[site.path] if group is not None and group.expanded else common
    twice = sorted(given.keys() & keys.keys())
    if twice:
        raise ConfigError(f"{type(config).__name__} gives {twice[0]!r} at {site.path} and as a shared leaf.")
    read_by_parent = _read_by_parent(site.path, modules)
    if read_by_parent and not config.gives("weights"):
        raise MatchError(
            f"{site.path} is read by the module above and never called, and {config.delta_type} has no weights "
            f"form: name "
            f"{site.path.rpartition('.')[0]} instead."
        )
    return Attachment(
        name=name,
        config=config,
        site=site,
        leaves=keys | given,
        shapes={keys[leaf]: tuple(tensor.shape) for leaf, tensor in leaves.items()},
        dtypes={keys[leaf]: site.leaf_dtype if t.is_floating_point() else t.dtype for leaf, t in leaves.items()},
        constants=tuple(keys[leaf] for leaf in constants if leaf in keys),
        key=next(iter((keys or common).values())),
        by_weights=read_by_parent or not (config.gives("before") or config.gives("after")),
    )


def _trained(
    backbone: nn.Module, modules: dict[str, nn.Module], configs: Sequence[BaseDeltaConfig]
) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """The backbone leaves that ``unfrozen_modules`` name, each with every name of its tensor."""
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    names_of = _names_of_tensors(backbone)
    trained: dict[str, tuple[str, ...]] = {}
    fresh: set[str] = set()
    for config in configs:
        for target in resolve(backbone, tuple(name for name in config.unfrozen_modules if name != "deltas")):
            owners = [path for path in modules if path and matches(path, target)]
            hits = [
                name for name in parameters if matches(name, target) or any(within(name, owner) for owner in owners)
            ]
            if not hits:
                known = [path for path in (*modules, *parameters) if path]
                raise MatchError(
                    f"unfrozen_modules: {target!r} means no parameter of "
                    f"{type(backbone).__name__}.{near(target, known)}"
                )
            for name in hits:
                ends = names_of[id(parameters[name])]
                if not parameters[name].is_floating_point():
                    raise MatchError(f"unfrozen_modules: {name} is {parameters[name].dtype} and cannot be trained.")
                if ends[0] not in trained:
                    trained[ends[0]] = tuple(ends)
                    if config.unfrozen_init == "fresh":
                        fresh.add(ends[0])
    order = {name: position for position, name in enumerate(parameters)}
    return {name: trained[name] for name in sorted(trained, key=order.__getitem__)}, frozenset(fresh)
