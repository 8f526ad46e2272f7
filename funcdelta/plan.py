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
from .naming import names_of_tensors, select, trained
from .sharing import Shared, share
from .site import AttentionShape, Site, site_of
from .structures import Names, Parts


@dataclass(frozen=True)
class Attachment:
    """One delta at one site.

    Attributes:
        name: the delta's name, between the site's path and the leaf in every key of params.
        leaves: ``{leaf: key}`` of all that the method's functions get here, shared and expanded leaves too.
        shapes, dtypes: of one member's own leaves here, by key in params.
        by_weights: whether the delta acts by rewriting the site's tensors instead of its hidden values.
        by_values: whether it acts on the hidden values that enter or leave the site.
        key: the key in params of the first leaf, own or shared, which stands for all.
        prompt_rows: how many positions it adds before the input.
    """

    name: str
    config: BaseDeltaConfig
    site: Site
    leaves: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    constants: tuple[str, ...]
    by_weights: bool
    by_values: bool
    key: str
    prompt_rows: int = 0

    @property
    def adds_keys(self) -> bool:
        """Whether the delta adds keys and values to the site's attention."""
        return self.config.gives("attend")

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
AttentionProbe = Callable[[list[str]], dict[str, AttentionShape]]


def build_plan(
    backbone: nn.Module, configs: Sequence[BaseDeltaConfig], measure: ShapeProbe, attention: AttentionProbe
) -> Plan:
    """Match every config against ``backbone``.

    ``measure(paths)`` gives shapes of hidden outputs where no weight tells the width, ``attention(paths)`` the keys of
    attention sites.
    """
    modules = dict(backbone.named_modules(remove_duplicate=False))
    canonical = {id(module): path for path, module in backbone.named_modules()}
    for config in configs:
        if not any(config.gives(function) for function in ("before", "after", "weights", "attend", "prompt")):
            raise ConfigError(
                f"{type(config).__name__} gives none of before, after, weights, attend and prompt: it would do nothing."
            )
    names = _delta_names(configs)
    known = Names(backbone)
    chosen = [select(backbone, modules, canonical, config, known) for config in configs]

    plain = {
        path: dataclasses.replace(site_of(path, modules[path]), fused=known.parts(path))
        for paths in chosen
        for path in paths
    }
    # A site is one config's view of a module: what of it is meant, and what the method needs to know.
    sites = [
        {path: config.describe(_meant(plain[path], parts), modules[path]) for path, parts in paths.items()}
        for config, paths in zip(configs, chosen, strict=True)
    ]
    _check(configs, sites, modules)
    _measure_attention(configs, sites, attention)
    unknown = {
        path: None
        for config, own in zip(configs, sites, strict=True)
        for path, site in own.items()
        if site.out_features is None and (_by_values(config) or not config.gives("attend"))
    }
    measured = measure(list(unknown)) if unknown else {}
    if unknown:
        for config, own in zip(configs, sites, strict=True):
            for path, site in own.items():
                if site.out_features is None and path in measured:
                    width = measured[path][_features_axis(config, len(measured[path]))]
                    own[path] = dataclasses.replace(site, out_features=width)
        _check(configs, sites, modules)

    attachments: dict[str, list[Attachment]] = {}
    shared: list[Shared] = []
    for config, name, own in zip(configs, names, sites, strict=True):
        group = share(config, name, tuple(own.values()))
        if group is not None:
            if name in modules or any(key in modules for key in group.shapes):
                raise MatchError(
                    f"The backbone already has a module {name!r}, where {config.delta_type} would keep its shared "
                    f"leaves: give the config another name, name={name + '_delta'!r}."
                )
            shared.append(group)
        for path, site in own.items():
            if isinstance(getattr(modules[path], name, None), (nn.Module, Tensor)):
                raise MatchError(
                    f"{path} already has a child {name!r}: give the config another name, name={name + '_delta'!r}."
                )
            attachments.setdefault(path, []).append(_attach(config, name, site, modules, group))
    trains, fresh = trained(backbone, modules, configs, known)
    uncalled = {path for path in attachments if _read_by_parent(path, modules)}
    return Plan(
        {path: tuple(group) for path, group in attachments.items()},
        trains,
        fresh,
        _all_ends(backbone),
        uncalled,
        tuple(shared),
        tuple(names),
        measured,
    )


def _features_axis(config: BaseDeltaConfig, axes: int) -> int:
    """The axis that the method sees last: of values with as many axes as its ``axis_order`` names, the last there."""
    order = config.axis_order
    return order[-1] if order is not None and len(order) == axes else -1


def _check(
    configs: Sequence[BaseDeltaConfig], sites: Sequence[Mapping[str, Site]], modules: Mapping[str, nn.Module]
) -> None:
    """Ask every method whether it can act at its sites."""
    for config, own in zip(configs, sites, strict=True):
        if config.axis_order is not None and not _by_values(config):
            raise ConfigError(f"axis_order: {type(config).__name__} acts on no hidden value; leave it out.")
        for path, site in own.items():
            order = config.axis_order
            if order is not None and site.kind != "other" and (site.channel_axis != -1 or order[-1] != len(order) - 1):
                # An axis moved at a layer that says itself where its features are would be the wrong one.
                raise MatchError(
                    f"axis_order={order} moves the features of {path} ({site.module_type}), which stand on axis "
                    f"{site.channel_axis} and are found there: give this site to a config without axis_order."
                )
            refusal = config.check(site)
            if refusal:
                inner = [inner for inner, _ in modules[path].named_modules() if inner]
                below = f" Below it are: {', '.join(inner[:8])}." if inner else ""
                raise MatchError(f"{config.delta_type} cannot act at {path}: {refusal}.{below}")


def _measure_attention(
    configs: Sequence[BaseDeltaConfig], sites: Sequence[dict[str, Site]], attention: AttentionProbe
) -> None:
    """Write the shapes of keys and values into the sites of methods that add some."""
    adding = [own for config, own in zip(configs, sites, strict=True) if config.gives("attend")]
    paths = list(dict.fromkeys(path for own in adding for path in own))
    for path, shape in attention(paths).items() if paths else ():
        for own in adding:
            if path in own:
                own[path] = dataclasses.replace(own[path], shape_of_attention=shape)


def _read_by_parent(path: str, modules: dict[str, nn.Module]) -> bool:
    """torch's attention reads its output projection's tensors and never calls the module."""
    return isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)


def _all_ends(backbone: nn.Module) -> dict[str, tuple[str, ...]]:
    """``{name: every name of the same tensor}`` for parameters and buffers."""
    return {ends[0]: tuple(ends) for ends in names_of_tensors(backbone).values()}


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


def _meant(site: Site, parts: Parts) -> Site:
    """The site as one config means it: all of its output, or parts."""
    return dataclasses.replace(site, parts=parts) if parts else site


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
    above = f"{site.path}.{name}" if site.path else name
    keys = {leaf: f"{above}.{leaf}" for leaf in leaves}
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
        by_weights=read_by_parent or not (_by_values(config) or config.gives("attend") or config.gives("prompt")),
        by_values=not read_by_parent and _by_values(config),
        prompt_rows=_prompt_rows(config, site, leaves, group) if config.gives("prompt") else 0,
    )


def _by_values(config: BaseDeltaConfig) -> bool:
    """Whether the method acts on hidden values."""
    return config.gives("before") or config.gives("after")


def _prompt_rows(config: BaseDeltaConfig, site: Site, leaves: dict[str, Tensor], group: Shared | None) -> int:
    """How many rows the method's prompt has, as its leaves at their start tell."""
    p = dict(leaves)
    if group is not None:
        drawn = config.shared(group.sites, torch.Generator().manual_seed(0))
        p |= config.expand(group.sites, drawn)[site.path] if group.expanded else drawn
    rows = config.prompt(site, p)
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"{type(config).__name__}.prompt gave {found} at {site.path}; expected rows (P, d).")
    return rows.shape[0]
