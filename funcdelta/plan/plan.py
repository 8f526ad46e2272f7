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

from ..errors import ConfigError, MatchError
from ..match import below, within
from ..methods.acts import OWN, Acts, with_fixed
from ..methods.config import BaseDeltaConfig, packed_weight
from ..methods.leaf import Leaf, as_leaves, members_and_all, values_of
from ..methods.own import Own
from ..methods.site import AttentionShape, Shapes, Site, site_of, site_of_tensor
from ..randomness import refuse_draws
from ..structures import Names, Parts
from ..structures.modules.structure import is_quantised
from ..trees.drawing import own_defaults
from ..trees.seeding import derive
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
        leading: the leaf whose precision the method computes in, the first that trains.
        fixed: what all members have together, beside their leaves: ``{leaf: tensor}``.
        in_attention: whether the delta adds keys and values to the site's attention, or wraps it.
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
    leading: str
    fixed: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    in_attention: bool = False
    prompt_rows: int = 0
    has_two_forms: bool = False
    read_by_parent: bool = False
    _acts: tuple[Acts, Acts] = field(init=False, repr=False, compare=False)

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

    def __post_init__(self) -> None:
        # In both modes, once: a call of what rewrites weights asks for it at every site.
        both = tuple(with_fixed(self.config.acts(self.at(mode)), self.fixed, self.leading) for mode in (False, True))
        object.__setattr__(self, "_acts", both)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_acts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def acts(self, training: bool = False) -> Acts:
        """What the delta does here, in training or evaluation mode."""
        return self._acts[training]

    @property
    def axes(self) -> dict[str, str]:
        """What the axes of its own leaves are called, ``{leaf: names}``."""
        return dict(self.site.axes)

    @property
    def own(self) -> dict[str, tuple[int, ...]]:
        """``{leaf: shape}`` of the leaves that no other site has."""
        return {leaf: self.shapes[key] for leaf, key in self.leaves.items() if key in self.shapes}


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
        fixed: what all members have together, ``{key: tensor}``, once.
        measured: shapes of what enters and leaves modules whose weights do not tell their widths.
    """

    attachments: dict[str, tuple[Attachment, ...]]
    trained: dict[str, tuple[str, ...]]
    fresh: frozenset[str]
    ends: dict[str, tuple[str, ...]]
    shared: tuple[Shared, ...] = ()
    names: tuple[str, ...] = ()
    measured: Mapping[str, Shapes] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

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
        group, fixed = share(config, name, own)
        of_all |= {f"{name}.{leaf}": tensor for leaf, tensor in fixed.items()}
        if group is not None:
            if name in modules or any(key in modules for key in group.shapes):
                raise MatchError(
                    f"The backbone already has a module {name!r}, where {config.delta_type} would keep its shared "
                    f"leaves: give the config another name, name={name + '_delta'!r}."
                )
            shared.append(group)
        for site in own:
            path = site.path
            _check_acts(config, config.acts(site))
            if isinstance(getattr(modules[path], name, None), (nn.Module, Tensor)):
                raise MatchError(
                    f"{path} already has a child {name!r}: give the config another name, name={name + '_delta'!r}."
                )
            attachment = _attach(config, name, site, modules, group, fixed, compared)
            alone = sorted(leaf for leaf in attachment.fixed if leaf not in fixed and not leaf.startswith(OWN))
            of_all |= {f"{site.address}.{name}.{leaf}": attachment.fixed[leaf] for leaf in alone}
            attachments.setdefault(site.exit or path, []).append(attachment)
    trains, fresh = trained(backbone, modules, configs, known)
    _check_reads([a for acting in attachments.values() for a in acting], trains)
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


def _facts(address: str, modules: dict[str, nn.Module], known: Names) -> Site:
    """What is known of the module or the parameter there; where it is never called, no formula on activations holds."""
    path = address
    if address not in modules:
        path, _, name = address.rpartition(".")
        return site_of_tensor(path, modules[path], name)
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
    fixed: Mapping[str, Tensor],
    compared: set[tuple[BaseDeltaConfig, Site]],
) -> Attachment:
    """The delta of ``config`` at ``site``; ``compared`` are the sites but for their paths whose forms agree."""
    module, who = modules[site.path], f"{type(config).__name__}.init"
    rng = torch.Generator().manual_seed(derive(0, f"{site.address}.{config.seed_name(name)}"))
    with refuse_draws(who), own_defaults():
        leaves, own_fixed = members_and_all(as_leaves(config.leaves(site, Own(module), rng), who))
    fixed = {leaf: site.placed(tensor) for leaf, tensor in own_fixed.items()} | dict(fixed)
    common = group.leaves if group is not None else {}
    if not (leaves or common):
        raise ConfigError(f"{who} gave no leaves at {site.path}.")
    # A module cannot have a child that is called as its parameter is, and the leaves are such children of views.
    above = below(site.path, f"{name}.{site.tensor}" if site.tensor else name)
    keys = {leaf: f"{above}.{leaf}" for leaf in leaves}
    given = group.expanded[site.address] if group is not None and group.expanded else common
    twice = sorted(given.keys() & keys.keys())
    if twice:
        raise ConfigError(f"{type(config).__name__} gives {twice[0]!r} at {site.path} and as a shared leaf.")
    if site.dtype.is_complex and not any(leaf.value.is_complex() for leaf in leaves.values()):
        raise MatchError(
            f"{config.delta_type} cannot act at {site.path}: {site.module_type} computes in {site.dtype}, and the "
            f"leaves of {config.delta_type} are real. Leave it out: exclude_modules=[{site.path!r}]."
        )
    site = dataclasses.replace(site, axes=tuple((leaf, one.axes) for leaf, one in leaves.items() if one.axes))
    acts = config.acts(site)
    fixed |= _read(config, acts, site, Own(module))
    uncalled = [path for path in (site.path, site.exit) if path is not None and _read_by_parent(path, modules)]
    if uncalled and acts.weights is None:
        raise MatchError(
            f"{uncalled[0]} is read by the module above and never called, and {config.delta_type} has no weights "
            f"form: name {uncalled[0].rpartition('.')[0]} instead."
        )
    by_weights = bool(uncalled) or acts_by_weights(config, site)
    constants = {leaf for leaf, one in leaves.items() if not one.trains}
    still = constants | ({leaf for leaf, key in common.items() if key in group.constants} if group else set())
    if not by_weights and acts.weights is not None and acts.by_values:
        as_config = dataclasses.replace(site, path="")
        if (config, as_config) not in compared:
            compared.add((config, as_config))
            p = {**fixed, **_leaves_at(config, site, leaves, group)}
            compare_forms(config, site, module, p, frozenset(still | fixed.keys()))
    all_keys = keys | given
    return Attachment(
        name=name,
        config=config,
        site=site,
        leaves=all_keys,
        shapes={keys[leaf]: tuple(one.value.shape) for leaf, one in leaves.items()},
        dtypes={keys[leaf]: site.dtype_of(one.value) for leaf, one in leaves.items()},
        constants=tuple(keys[leaf] for leaf in leaves if leaf in constants),
        key=next(iter((keys or common).values())),
        leading=next((leaf for leaf in all_keys if leaf not in still), next(iter(all_keys))),
        fixed=fixed,
        in_attention=acts.in_attention,
        by_weights=by_weights,
        by_values=not by_weights and acts.by_values,
        prompt_rows=_prompt_rows(config, acts, site, leaves, group) if acts.prompt is not None else 0,
        read_by_parent=bool(uncalled),
        has_two_forms=not by_weights and acts.by_values and _has_weights_form(acts, site, module),
    )


def _check_acts(config: BaseDeltaConfig, acts: Acts) -> None:
    """Refuse a config that would do nothing, or that says something of hidden values and acts on none."""
    if not acts.anything:
        raise ConfigError(
            f"{type(config).__name__} gives none of before, after, weights, attend, around and prompt: it would do "
            f"nothing."
        )
    if config.axis_order is not None and not acts.by_values:
        raise ConfigError(f"axis_order: {type(config).__name__} acts on no hidden value; leave it out.")


def _read(config: BaseDeltaConfig, acts: Acts, site: Site, own: Own) -> dict[str, Tensor]:
    """The site's own tensors that the method reads, as leaves; one that the module lacks is not among them."""
    modules = dict(own.module.named_modules())
    for name in acts.reads:
        owner, _, last = name.rpartition(".")
        if last == "weight" and owner in modules:
            read = site_of(below(site.path, owner), modules[owner]) if owner else site
            if read.packed:
                raise MatchError(
                    f"{config.delta_type} cannot act at {site.path}: it reads {name}, and {packed_weight(read)}. Leave "
                    f"it out: exclude_modules=[{site.path!r}]."
                )
    return {f"{OWN}{name}": own[name] for name in acts.reads if name in own}


def _check_reads(attachments: Sequence[Attachment], trains: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a method that reads a tensor which differs by member: what it is given is the backbone's own."""
    trained_names = {end for ends in trains.values() for end in ends}
    rewriting = [a for a in attachments if a.by_weights]
    for a in attachments:
        read = [below(a.site.path, name) for name in a.acts().reads]
        again = next((name for name in read if name in trained_names), None)
        if again is not None:
            raise MatchError(
                f"{a.name} at {a.site.path} reads {again}, which unfrozen_modules trains, so it differs by member: "
                f"leave one of the two out."
            )
        owners = {name.rpartition(".")[0] for name in read}
        here = [other for other in rewriting if other.site.path in owners and other is not a]
        # Where no member need have both, none has: each came with one of them.
        other = next((b for b in here if b.acts().present is None or a.acts().present is None), None)
        if other is not None:
            what = next(name for name in read if name.rpartition(".")[0] == other.site.path)
            raise MatchError(
                f"{a.name} at {a.site.path} reads {what}, which {other.name} rewrites: give them sites of their own."
            )


def acts_by_weights(config: BaseDeltaConfig, site: Site) -> bool:
    """Whether a method acts at ``site`` by rewriting tensors: it gives nothing else, or its formula does not hold.

    Raises `MatchError` where the formula does not hold and the weights form is not exact either.

    >>> from funcdelta.methods.site import site_of
    >>> class Doubled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> [acts_by_weights(fd.LoraConfig(), site_of("0", layer(2, 2))) for layer in (nn.Linear, Doubled)]
    [False, True]
    """
    acts = config.acts(site)
    if not acts.by_values:
        return acts.weights is not None
    if acts.weights is None or acts.exact:
        return False
    refusal = acts.unmergeable
    if refusal is not None:
        raise MatchError(
            f"{config.delta_type} cannot act at {site.path}: what the forward of {site.module_type} makes of the "
            f"layer's input is its own, so that only its weights can be changed, and {refusal}. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )
    return True


def _has_weights_form(acts: Acts, site: Site, module: nn.Module) -> bool:
    """Whether the method could as well rewrite the tensors of the module at the site, as they are there."""
    if acts.weights is None or acts.before is not None or site.exit is not None or acts.unmergeable:
        return False
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    return not is_parametrized(module) and not any(map(is_quantised, own))


def _leaves_at(
    config: BaseDeltaConfig, site: Site, leaves: Mapping[str, Leaf], group: Shared | None
) -> dict[str, Tensor]:
    """All leaves that the method's functions get at ``site``, at their start."""
    own = values_of(leaves)
    if group is None:
        return own
    drawn = {**group.fixed, **values_of(group.start)}
    return own | (config.expand(group.sites, drawn)[site.address] if group.expanded else drawn)


def _prompt_rows(
    config: BaseDeltaConfig, acts: Acts, site: Site, leaves: Mapping[str, Leaf], group: Shared | None
) -> int:
    """How many rows the method's prompt has, as its leaves at their start tell."""
    assert acts.prompt is not None
    with own_defaults():
        rows = acts.prompt(_leaves_at(config, site, leaves, group))
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"{type(config).__name__}.prompt gave {found} at {site.path}; expected rows (P, d).")
    return rows.shape[0]
