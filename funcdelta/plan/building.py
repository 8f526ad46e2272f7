"""Builds the plan: matches every config against a backbone, and finds out what each site is."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..errors import ConfigError, MatchError
from ..methods.acts import OWN
from ..methods.config import BaseDeltaConfig
from ..methods.site import AttentionShape, Shapes, Site, site_of, site_of_tensor
from ..structures import Names, Parts
from .attaching import attach, check_acts, check_reads, read_by_parent
from .attachment import Attachment
from .axes import check_axes, sized
from .naming import names_of_tensors, refuse_lazy, select, trained
from .plan import Plan
from .sharing import Shared, share
from .spans import select_spans, site_between

ShapeProbe = Callable[[list[str]], Mapping[str, Shapes]]
AttentionProbe = Callable[[list[str]], dict[str, AttentionShape]]


def build_plan(
    backbone: nn.Module, configs: Sequence[BaseDeltaConfig], measure: ShapeProbe, attention: AttentionProbe
) -> Plan:
    """Match every config against ``backbone``.

    ``measure(paths)`` gives shapes of hidden values where no weight tells the width, ``attention(paths)`` the keys of
    attention sites.
    """
    refuse_lazy(backbone)
    modules = dict(backbone.named_modules(remove_duplicate=False))
    canonical = {id(module): path for path, module in backbone.named_modules()}
    for config in configs:
        if config.gives("spans") and not config.gives("after"):
            raise ConfigError(f"{type(config).__name__} gives spans, which only after can act on, and no after.")
    names = _delta_names(configs)
    known = Names(backbone)
    chosen = [_chosen(backbone, modules, canonical, config, known) for config in configs]

    ends = dict.fromkeys(end for spans, _ in chosen for span in spans.items() for end in span)
    facts = {address: _facts(address, modules, known) for address in ends}
    sites = _sites(configs, chosen, facts, modules)
    unknown = list(
        dict.fromkeys(end for config, own in zip(configs, sites, strict=True) for end in _unknown(config, own))
    )
    unknown = [path for path in unknown if facts[path].out_features is None]
    measured = measure(unknown) if unknown else {}
    if unknown:
        sites = _sites(configs, chosen, facts, modules, measured)
    sites = _with_attention(configs, sites, attention)

    attachments: dict[str, list[Attachment]] = {}
    shared: list[Shared] = []
    of_all: dict[str, Tensor] = {}
    compared: set[tuple[BaseDeltaConfig, Site]] = set()
    for config, name, own in zip(configs, names, sites, strict=True):
        group, fixed = share(config, name, own, backbone)
        of_all |= {f"{name}.{leaf}": tensor for leaf, tensor in fixed.items()}
        if group is not None:
            _refuse_taken(backbone, "", name)
            shared.append(group)
        for site in own:
            path = site.path
            check_acts(config, config.acts(site))
            _refuse_taken(modules[path], path, name)
            attachment = attach(config, name, site, modules, group, fixed, compared)
            alone = sorted(leaf for leaf in attachment.fixed if leaf not in fixed and not leaf.startswith(OWN))
            of_all |= {f"{site.address}.{name}.{leaf}": attachment.fixed[leaf] for leaf in alone}
            attachments.setdefault(site.exit or path, []).append(attachment)
    trains, fresh = trained(backbone, modules, configs, known)
    check_reads([a for acting in attachments.values() for a in acting], trains, modules)
    return Plan(
        {path: tuple(group) for path, group in attachments.items()},
        trains,
        fresh,
        _all_ends(backbone),
        tuple(shared),
        tuple(names),
        measured,
        of_all,
    )


def _chosen(
    backbone: nn.Module, modules: dict[str, nn.Module], canonical: dict[int, str], config: BaseDeltaConfig, known: Names
) -> tuple[dict[str, str], dict[str, Parts]]:
    """Where ``config`` takes hidden values, each with where it gives them, and which parts of an output it means.

    At a single site hidden values are taken and given at the same path.
    """

    def selected(config: BaseDeltaConfig) -> dict[str, Parts]:
        return select(backbone, modules, canonical, config, known)

    if config.gives("spans"):
        return select_spans(config, selected), {}
    parts = selected(config)
    return {path: path for path in parts}, parts


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


def _sites(
    configs: Sequence[BaseDeltaConfig],
    chosen: Sequence[tuple[Mapping[str, str], Mapping[str, Parts]]],
    facts: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    measured: Mapping[str, Shapes] = types.MappingProxyType({}),
) -> list[tuple[Site, ...]]:
    """The sites of every config as it sees them, after it has been asked whether it can act there."""
    found: list[tuple[Site, ...]] = []
    for config, (spans, parts) in zip(configs, chosen, strict=True):
        ends = {path: sized(config, facts[path], measured) for span in spans.items() for path in span}
        own = (site_between(_meant(ends[entry], parts.get(entry, ())), ends[end]) for entry, end in spans.items())
        found.append(tuple(config.describe(site, modules[site.path]) for site in own))
        for site in ends.values():
            check_axes(config, site)
        for site in found[-1]:
            refusal = config.check(site)
            if refusal:
                named = modules[site.path].named_modules() if not site.tensor else ()
                inner = [inner for inner, _ in named if inner]
                others = f" Below it are: {', '.join(inner[:8])}." if inner else ""
                raise MatchError(f"{config.delta_type} cannot act at {site.address}: {refusal}.{others}")
    return found


def _facts(address: str, modules: dict[str, nn.Module], known: Names) -> Site:
    """What is known of the module or the parameter there; where it is never called, no formula on activations holds."""
    path = address
    if address not in modules:
        path, _, name = address.rpartition(".")
        return site_of_tensor(path, modules[path], name)
    site = dataclasses.replace(site_of(path, modules[path], _above(path, modules)), fused=known.parts(path))
    return dataclasses.replace(site, own_forward=True) if read_by_parent(path, modules) else site


def _above(path: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules that hold the one at ``path``, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield modules[path]


def _refuse_taken(module: nn.Module, path: str, name: str) -> None:
    """Refuse a delta's name where it would hide what the module that is to hold its leaves in views already has."""
    if hasattr(module, name):
        held = isinstance(getattr(module, name), (nn.Module, Tensor))
        what = "an attribute" if not held else "a child" if path else "a module"
        raise MatchError(
            f"{path or 'The backbone'} already has {what} {name!r}: give the config another name, "
            f"name={name + '_delta'!r}."
        )


def _meant(site: Site, parts: Parts) -> Site:
    """The site as one config means it: all of its output, or parts."""
    return dataclasses.replace(site, parts=parts) if parts else site


def _unknown(config: BaseDeltaConfig, sites: Sequence[Site]) -> Iterator[str]:
    """The modules whose numbers of features ``config`` may need and has not told; within attention none is needed."""
    if _in_attention(config) and not (config.gives("before") or config.gives("after")):
        return
    for site in sites:
        if site.exit is not None:
            yield from (site.path, site.exit)
        elif site.out_features is None:
            yield site.path


def _with_attention(
    configs: Sequence[BaseDeltaConfig], sites: Sequence[tuple[Site, ...]], attention: AttentionProbe
) -> list[tuple[Site, ...]]:
    """The sites, with the shapes of keys and values at those of methods that act within attention."""
    acting = [
        _in_attention(config) or any(config.acts(site).in_attention for site in own)
        for config, own in zip(configs, sites, strict=True)
    ]
    paths = list(dict.fromkeys(site.path for own, acts in zip(sites, acting, strict=True) for site in own if acts))
    shapes = attention(paths) if paths else {}
    return [
        tuple(dataclasses.replace(site, shape_of_attention=shapes[site.path]) if acts else site for site in own)
        for own, acts in zip(sites, acting, strict=True)
    ]


def _in_attention(config: BaseDeltaConfig) -> bool:
    return config.gives("attend") or config.gives("around")


def _all_ends(backbone: nn.Module) -> dict[str, tuple[str, ...]]:
    """``{name: every name of the same tensor}`` for parameters and buffers."""
    return {ends[0]: tuple(ends) for ends in names_of_tensors(backbone).values()}
