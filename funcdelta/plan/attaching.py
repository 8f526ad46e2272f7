"""How a config comes to act at a site: its leaves there, what they are checked for, and the way in which it acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ConfigError, MatchError
from ..match import below, near
from ..methods.acts import OWN, Acts
from ..methods.config import BaseDeltaConfig, packed_weight
from ..methods.leaf import Leaf, declared, members_and_all, values_of
from ..methods.own import Own, owner_of
from ..methods.site import Site, site_of
from ..randomness import refuse_draws
from ..structures.modules.structure import is_quantised
from ..trees.drawing import own_defaults
from ..trees.seeding import derive
from .attachment import Attachment
from .forms import compare_forms
from .rewriting import try_weights
from .sharing import Shared


def attach(
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
        leaves, own_fixed = members_and_all(declared(config.leaves(site, Own(module, site.path), rng), who))
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
    read = _read(config, acts, site, module)
    fixed |= {f"{OWN}{own}": tensor.detach() for own, tensor in read.items()}
    uncalled = [path for path in (site.path, site.exit) if path is not None and read_by_parent(path, modules)]
    if uncalled and acts.weights is None:
        raise MatchError(
            f"{uncalled[0]} is read by the module above and never called, and {config.delta_type} has no weights "
            f"form: name {uncalled[0].rpartition('.')[0]} instead."
        )
    by_weights = bool(uncalled) or acts_by_weights(config, site)
    constants = {leaf for leaf, one in leaves.items() if not one.trains}
    still = constants | ({leaf for leaf, key in common.items() if key in group.constants} if group else set())
    as_config = dataclasses.replace(site, path="")
    if acts.weights is not None and (config, as_config) not in compared:
        compared.add((config, as_config))
        p = {**fixed, **_leaves_at(config, site, leaves, group)}
        try_weights(acts, module, p, f"{type(config).__name__}.weights", site.path)
        if not by_weights and acts.by_values:
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
        reads=tuple((f"{OWN}{own}", _first_name(modules[""], tensor)) for own, tensor in read.items()),
        in_attention=acts.in_attention,
        by_weights=by_weights,
        by_values=not by_weights and acts.by_values,
        prompt_rows=_prompt_rows(config, acts, site, leaves, group) if acts.prompt is not None else 0,
        read_by_parent=bool(uncalled),
        has_two_forms=not by_weights and acts.by_values and _has_weights_form(acts, site, module),
    )


def check_acts(config: BaseDeltaConfig, acts: Acts) -> None:
    """Refuse a config that would do nothing, or that says something of hidden values and acts on none."""
    if not acts.anything:
        raise ConfigError(
            f"{type(config).__name__} gives none of before, after, weights, attend, around and prompt: it would do "
            f"nothing."
        )
    if config.axis_order is not None and not acts.by_values:
        raise ConfigError(f"axis_order: {type(config).__name__} acts on no hidden value; leave it out.")
    if acts.conditions and not acts.by_values:
        raise ConfigError(
            f"{type(config).__name__} wants conditions of the call ({', '.join(acts.conditions)}), which before and "
            f"after get, and gives neither: act on hidden values, or leave conditions out."
        )


def check_reads(
    attachments: Sequence[Attachment], trains: Mapping[str, tuple[str, ...]], modules: Mapping[str, nn.Module]
) -> None:
    """Refuse a method that reads what no site has, or what differs by member: it is given the backbone's own."""
    for config in dict.fromkeys(a.config for a in attachments):
        _check_names_read(config, [modules[a.site.path] for a in attachments if a.config is config])
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


def _check_names_read(config: BaseDeltaConfig, modules: Sequence[nn.Module]) -> None:
    if isinstance(config.reads, str):
        raise ConfigError(
            f"{type(config).__name__}.reads is a text: write a tuple of names, reads = ({config.reads!r},)."
        )
    there = dict.fromkeys(name for module in modules for name, _ in module.named_parameters())
    unknown = next((name for name in config.reads if name not in (*there, "weight", "bias")), None)
    if unknown is not None:
        raise MatchError(
            f"{config.delta_type or type(config).__name__} reads {unknown!r}, and none of its sites has a parameter of "
            f"that name.{near(unknown, list(there))}"
        )


def acts_by_weights(config: BaseDeltaConfig, site: Site) -> bool:
    """Whether a method acts at ``site`` by rewriting tensors: it gives nothing else, or its formula does not hold.

    Raises `MatchError` where the formula does not hold and the weights form is not exact either.

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


def read_by_parent(path: str, modules: dict[str, nn.Module]) -> bool:
    """torch's attention reads its output projection's tensors and never calls the module."""
    return isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)


def _read(config: BaseDeltaConfig, acts: Acts, site: Site, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters at the site that the method reads, by their names there; one that it lacks is not among them."""
    found: dict[str, nn.Parameter] = {}
    for name in acts.reads:
        owner, own = owner_of(module, name)
        if owner is None:
            continue
        where = name.rpartition(".")[0]
        read, why = site_of(below(site.path, where), owner) if where else site, None
        if own == "weight" and read.packed:
            why = f"it reads {name}, and {packed_weight(read)}"
        elif is_parametrized(owner, own):
            why = f"it reads {name}, which is parametrised, so that each call computes it anew"
        elif own in owner._buffers:
            why = f"it reads {name}, a buffer, which calls may write or replace"
        if why is not None:
            raise MatchError(
                f"{config.delta_type} cannot act at {site.path}: {why}. Leave it out: exclude_modules=[{site.path!r}]."
            )
        tensor = owner._parameters.get(own)
        if tensor is not None:
            found[name] = tensor
    return found


def _first_name(backbone: nn.Module, parameter: nn.Parameter) -> str:
    """The name under which params may hold another tensor for this one."""
    return next(name for name, own in backbone.named_parameters() if own is parameter)


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
