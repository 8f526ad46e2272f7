"""The plan: which delta acts where, under which leaf names; resolved once when a delta is built."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..config import BaseDeltaConfig
from ..errors import ConfigError, MatchError
from ..match import within
from ..pytrees.drawing import own_defaults
from ..randomness import refuse_draws
from ..sites.site import AttentionShape, Shapes, Site, site_of
from ..sites.structure import is_quantised
from ..structures import Names, Parts
from .axes import check_axes, sized
from .forms import compare_forms
from .kinds import Kinds
from .naming import names_of_tensors, refuse_lazy, select, trained
from .sharing import Shared, share
from .spans import select_spans, site_between


@dataclass(frozen=True)
class Attachment:
    """One delta at one site.

    Attributes:
        name: the delta's name, between the site's path and the leaf in every key of params.
        leaves: ``{leaf: key}`` of all that the method's functions get here, shared and expanded leaves too.
        shapes, dtypes: of one member's own leaves here, by key in params.
        by_weights: whether the delta acts by rewriting the site's tensors instead of its hidden values: methods that
            give nothing else, and where a formula on hidden values would not hold (see ``acts_by_weights``).
        by_values: whether it acts on the hidden values that enter or leave the site.
        key: the key in params of the first leaf, own or shared, which stands for all.
        prompt_rows: how many positions it adds before the input.
        read_by_parent: whether the module above reads the site's tensors and never calls it.
        has_two_forms: whether it acts on hidden values, and could as well by rewriting the site's tensors.
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
    has_two_forms: bool = False
    read_by_parent: bool = False

    @property
    def adds_keys(self) -> bool:
        """Whether the delta adds keys and values to the site's attention."""
        return self.config.gives("attend")

    @property
    def ends(self) -> tuple[str, ...]:
        """The modules where it takes part in a call: its own, or those where its span begins and ends."""
        return (self.site.path,) if self.site.exit is None else (self.site.path, self.site.exit)

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
        attachments: by the path of the module where they act (a span: where it ends), in the order in which they act.
        trained: backbone leaves that are trained too: ``{name: every name of the same tensor}``.
        fresh: those of ``trained`` that start anew instead of as a copy.
        ends: every parameter and buffer of the backbone, ``{name: every name of the same tensor}``.
        shared: the leaves that the sites of one delta share.
        names: one name a config, in their order.
        measured: shapes of what enters and leaves modules whose weights do not tell their widths.
    """

    attachments: dict[str, tuple[Attachment, ...]]
    trained: dict[str, tuple[str, ...]]
    fresh: frozenset[str]
    ends: dict[str, tuple[str, ...]]
    shared: tuple[Shared, ...] = ()
    names: tuple[str, ...] = ()
    measured: Mapping[str, Shapes] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the deltas, shared ones first."""
        return {key: shape for part in (*self.shared, *self.all()) for key, shape in part.shapes.items()}

    @property
    def constants(self) -> tuple[str, ...]:
        """The keys of all leaves that never train."""
        return tuple(key for part in (*self.shared, *self.all()) for key in part.constants)

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Which dtypes the leaves may have."""
        dtypes = {key: dtype for part in (*self.shared, *self.all()) for key, dtype in part.dtypes.items()}
        constants = set(self.constants)
        floating = {key for key, dtype in dtypes.items() if dtype.is_floating_point}
        used = [a.leaves.values() for a in self.all()] + [group.leaves.values() for group in self.shared]
        together: dict[tuple[str, ...], None] = {}
        beside: dict[str, str] = {}
        for keys in used:
            trains = tuple(key for key in keys if key in floating and key not in constants)
            if trains:
                together[trains] = None
                beside |= {key: trains[0] for key in keys if key in floating and key in constants}
        return Kinds(dtypes | dict.fromkeys(self.trained, torch.float32), list(together), beside)

    def keys(self) -> dict[str, frozenset[str]]:
        """``{delta name: the keys of its leaves in params}``."""
        found: dict[str, frozenset[str]] = {a.name: frozenset() for a in self.all()}
        for part in (*self.shared, *self.all()):
            found[part.name] |= frozenset(part.shapes)
        return found

    @property
    def order(self) -> tuple[str, ...]:
        """The names of all leaves, in their one order."""
        return (*self.shapes, *self.trained)

    def __post_init__(self) -> None:
        found = {path: tuple(a for a in group if a.by_weights) for path, group in self.attachments.items()}
        self.rewriting = {path: group for path, group in found.items() if group}
        """The attachments that act by rewriting tensors, by the path of their site."""

    @property
    def uncalled(self) -> set[str]:
        """Sites whose tensors are read by the module above, which never calls them: they act by their weights."""
        return {path for path, group in self.attachments.items() if any(a.read_by_parent for a in group)}

    def owners(self, params: Mapping[str, Any]) -> dict[str, list[str]]:
        """Modules whose own tensors differ by member, each with the keys of params that say how."""
        found: dict[str, list[str]] = {}
        for name, ends in self.trained.items():
            for end in ends if name in params else ():
                found.setdefault(end.rpartition(".")[0], []).append(name)
        for attachment in self.all():
            if attachment.by_weights and attachment.among(params):
                path = attachment.site.path
                reader = path.rpartition(".")[0] if attachment.read_by_parent else path
                found.setdefault(reader, []).extend(attachment.leaves.values())
        return found

    def outermost(self, params: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The outermost modules that run with tensors of one member, each with the keys of params used in it."""
        found = self.owners(params)
        outermost = [path for path in found if not any(path != other and within(path, other) for other in found)]
        keys_of: dict[str, tuple[str, ...]] = {}
        for path in outermost:
            keys = [key for other, keys in found.items() if within(other, path) for key in keys]
            acting = [a for a in self.all() if any(within(end, path) for end in a.ends)]
            keys += [key for a in acting for key in a.leaves.values() if key in params]
            keys_of[path] = tuple(dict.fromkeys(keys))
        return keys_of

    def present(self, params: Mapping[str, Any]) -> frozenset[str]:
        """Which deltas and which trained leaves ``params`` hold; the structure that a layout belongs to."""
        deltas = {a.name for a in self.all() if a.among(params)}
        return frozenset(deltas | {name for name in self.trained if name in params})

    def all(self) -> list[Attachment]:
        """Every attachment, site by site."""
        return [attachment for group in self.attachments.values() for attachment in group]


class Planned(Protocol):
    """What has a backbone and a plan: a delta, or its program."""

    @property
    def backbone(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan: ...


def shapes_of(planned: Planned) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of one member, in their one order: the deltas' own, then the backbone's trained ones.

    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(4, 2)), modified_modules=["0"])
    >>> shapes_of(delta.program)
    {'0.bitfit.bias': (2,)}
    """
    plan, parameters = planned.plan, dict(planned.backbone.named_parameters())
    return plan.shapes | {name: tuple(parameters[name].shape) for name in plan.trained}


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
        if not any(config.gives(function) for function in ("before", "after", "weights", "attend", "prompt")):
            raise ConfigError(
                f"{type(config).__name__} gives none of before, after, weights, attend and prompt: it would do nothing."
            )
        if config.axis_order is not None and not _by_values(config):
            raise ConfigError(f"axis_order: {type(config).__name__} acts on no hidden value; leave it out.")
        if config.gives("spans") and not config.gives("after"):
            raise ConfigError(f"{type(config).__name__} gives spans, which only after can act on, and no after.")
    names = _delta_names(configs)
    known = Names(backbone)
    chosen = [_chosen(backbone, modules, canonical, config, known) for config in configs]

    ends = dict.fromkeys(end for spans, _ in chosen for span in spans.items() for end in span)
    facts = {path: _facts(path, modules, known) for path in ends}
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
    compared: set[tuple[BaseDeltaConfig, Site]] = set()
    for config, name, own in zip(configs, names, sites, strict=True):
        group = share(config, name, own)
        if group is not None:
            if name in modules or any(key in modules for key in group.shapes):
                raise MatchError(
                    f"The backbone already has a module {name!r}, where {config.delta_type} would keep its shared "
                    f"leaves: give the config another name, name={name + '_delta'!r}."
                )
            shared.append(group)
        for site in own:
            path = site.path
            if isinstance(getattr(modules[path], name, None), (nn.Module, Tensor)):
                raise MatchError(
                    f"{path} already has a child {name!r}: give the config another name, name={name + '_delta'!r}."
                )
            attachments.setdefault(site.exit or path, []).append(_attach(config, name, site, modules, group, compared))
    trains, fresh = trained(backbone, modules, configs, known)
    return Plan(
        {path: tuple(group) for path, group in attachments.items()},
        trains,
        fresh,
        _all_ends(backbone),
        tuple(shared),
        tuple(names),
        measured,
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
                inner = [inner for inner, _ in modules[site.path].named_modules() if inner]
                below = f" Below it are: {', '.join(inner[:8])}." if inner else ""
                raise MatchError(f"{config.delta_type} cannot act at {site.path}: {refusal}.{below}")
    return found


def _unknown(config: BaseDeltaConfig, sites: Sequence[Site]) -> Iterator[str]:
    """The modules whose numbers of features ``config`` may need and has not told; keys and values need none."""
    if config.gives("attend") and not _by_values(config):
        return
    for site in sites:
        if site.exit is not None:
            yield from (site.path, site.exit)
        elif site.out_features is None:
            yield site.path


def _with_attention(
    configs: Sequence[BaseDeltaConfig], sites: Sequence[tuple[Site, ...]], attention: AttentionProbe
) -> list[tuple[Site, ...]]:
    """The sites, with the shapes of keys and values at those of methods that add some."""
    adding = [config.gives("attend") for config in configs]
    paths = list(dict.fromkeys(site.path for own, adds in zip(sites, adding, strict=True) for site in own if adds))
    shapes = attention(paths) if paths else {}
    return [
        tuple(dataclasses.replace(site, shape_of_attention=shapes[site.path]) if adds else site for site in own)
        for own, adds in zip(sites, adding, strict=True)
    ]


def _facts(path: str, modules: dict[str, nn.Module], known: Names) -> Site:
    """What is known of the module at ``path``; where it is never called, no formula on activations holds."""
    site = dataclasses.replace(site_of(path, modules[path], _above(path, modules)), fused=known.parts(path))
    return dataclasses.replace(site, own_forward=True) if _read_by_parent(path, modules) else site


def _above(path: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules that hold the one at ``path``, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield modules[path]


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
    config: BaseDeltaConfig,
    name: str,
    site: Site,
    modules: dict[str, nn.Module],
    group: Shared | None,
    compared: set[tuple[BaseDeltaConfig, Site]],
) -> Attachment:
    """The delta of ``config`` at ``site``; ``compared`` are the sites but for their paths whose forms agree."""
    with refuse_draws(f"{type(config).__name__}.init"), own_defaults():
        leaves = config.init(site, torch.Generator().manual_seed(0))
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
    if site.dtype.is_complex and not any(leaf.is_complex() for leaf in leaves.values()):
        raise MatchError(
            f"{config.delta_type} cannot act at {site.path}: {site.module_type} computes in {site.dtype}, and the "
            f"leaves of {config.delta_type} are real. Leave it out: exclude_modules=[{site.path!r}]."
        )
    uncalled = [path for path in (site.path, site.exit) if path is not None and _read_by_parent(path, modules)]
    if uncalled and not config.gives("weights"):
        raise MatchError(
            f"{uncalled[0]} is read by the module above and never called, and {config.delta_type} has no weights "
            f"form: name {uncalled[0].rpartition('.')[0]} instead."
        )
    by_weights = bool(uncalled) or acts_by_weights(config, site)
    if not by_weights and config.gives("weights") and _by_values(config):
        as_config = dataclasses.replace(site, path="")
        if (config, as_config) not in compared:
            compared.add((config, as_config))
            p = _leaves_at(config, site, leaves, group)
            compare_forms(config, site, modules[site.path], p, frozenset(constants))
    by_values = not by_weights and _by_values(config)
    return Attachment(
        name=name,
        config=config,
        site=site,
        leaves=keys | given,
        shapes={keys[leaf]: tuple(tensor.shape) for leaf, tensor in leaves.items()},
        dtypes={keys[leaf]: site.leaf_dtype if t.is_floating_point() else t.dtype for leaf, t in leaves.items()},
        constants=tuple(keys[leaf] for leaf in constants if leaf in keys),
        key=next(iter((keys or common).values())),
        by_weights=by_weights,
        by_values=by_values,
        prompt_rows=_prompt_rows(config, site, leaves, group) if config.gives("prompt") else 0,
        read_by_parent=bool(uncalled),
        has_two_forms=by_values and _has_weights_form(config, site, modules[site.path]),
    )


def acts_by_weights(config: BaseDeltaConfig, site: Site) -> bool:
    """Whether a method acts at ``site`` by rewriting tensors: it gives nothing else, or its formula does not hold.

    Raises `MatchError` where the formula does not hold and the weights form is not exact either.

    >>> from funcdelta.sites.site import site_of
    >>> class Doubled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> [acts_by_weights(fd.LoraConfig(), site_of("0", layer(2, 2))) for layer in (nn.Linear, Doubled)]
    [False, True]
    """
    if not _by_values(config):
        return not (config.gives("attend") or config.gives("prompt"))
    if not config.gives("weights") or config.holds_on_values(site):
        return False
    refusal = config.unmergeable(site)
    if refusal is not None:
        raise MatchError(
            f"{config.delta_type} cannot act at {site.path}: what the forward of {site.module_type} makes of the "
            f"layer's input is its own, so that only its weights can be changed, and {refusal}. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )
    return True


def _has_weights_form(config: BaseDeltaConfig, site: Site, module: nn.Module) -> bool:
    """Whether the method could as well rewrite the tensors of the module at the site, as they are there."""
    if not config.gives("weights") or config.gives("before") or site.exit is not None or config.unmergeable(site):
        return False
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    return not is_parametrized(module) and not any(map(is_quantised, own))


def _by_values(config: BaseDeltaConfig) -> bool:
    """Whether the method acts on hidden values."""
    return config.gives("before") or config.gives("after")


def _leaves_at(
    config: BaseDeltaConfig, site: Site, leaves: Mapping[str, Tensor], group: Shared | None
) -> dict[str, Tensor]:
    """All leaves that the method's functions get at ``site``, at their start."""
    if group is None:
        return dict(leaves)
    drawn = config.shared(group.sites, torch.Generator().manual_seed(0))
    return dict(leaves) | (config.expand(group.sites, drawn)[site.path] if group.expanded else drawn)


def _prompt_rows(config: BaseDeltaConfig, site: Site, leaves: dict[str, Tensor], group: Shared | None) -> int:
    """How many rows the method's prompt has, as its leaves at their start tell."""
    with own_defaults():
        rows = config.prompt(site, _leaves_at(config, site, leaves, group))
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"{type(config).__name__}.prompt gave {found} at {site.path}; expected rows (P, d).")
    return rows.shape[0]
