"""What the names in a config select: the sites of a delta, and the backbone leaves that train with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import MatchError
from ..match import below, matches, near, within
from ..methods.config import BaseDeltaConfig
from ..structures import Names, Parts
from ..structures.modules.structure import is_quantised

HEAD = ("lm_head",)


def refuse_lazy(backbone: nn.Module) -> None:
    """Raise ``MatchError`` if a lazy module has not seen an input yet, so that its tensors have no shape.

    >>> refuse_lazy(nn.Sequential(nn.LazyLinear(4)))
    Traceback (most recent call last):
    ...
    funcdelta.errors.MatchError: 0.weight has no shape yet (LazyLinear). Run the model once, backbone(inputs), ...
    """
    for path, module in backbone.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                raise MatchError(
                    f"{path}.{name} has no shape yet ({type(module).__name__}). Run the model once, "
                    f"backbone(inputs), before you build a delta on it."
                )


def select(
    backbone: nn.Module,
    modules: dict[str, nn.Module],
    canonical: dict[int, str],
    config: BaseDeltaConfig,
    known: Names,
) -> dict[str, Parts]:
    """The sites that ``config`` names, in the backbone's order, each with the selected parts of a fused output.

    No parts mean the whole output. Raises ``MatchError`` for a name that matches nothing.
    """
    given = config.modified_modules
    # OpenDelta writes "root" for methods that find their own site.
    own = config.own_sites(backbone) if given in (None, ("root",)) and "root" not in modules else None
    if own is not None:
        if not own:
            raise MatchError(
                f"{config.delta_type} finds no site of its own in {type(backbone).__name__}: give "
                f"modified_modules=[...]."
            )
        kept = [path for path in own if not any(within(path, out) for out in config.exclude_modules or ())]
        if not kept:
            which = "the only site" if len(own) == 1 else "the last site"
            raise MatchError(f"exclude_modules leaves out {own[-1] or 'the model'!r}, {which} of its method.")
        return dict.fromkeys(sorted({canonical[id(modules[path])] for path in kept}, key=list(modules).index), ())
    common = config.common_structure
    if given is None:
        given, common = config.default_names(), None
        if not given:
            raise MatchError(f"{config.delta_type} has no default sites. Write modified_modules=[...].")
    if not given:
        raise MatchError("modified_modules=[] names no site. Leave it out for the method's default sites.")
    # The modules that compute a parametrised weight count only if they are named.
    inner = any("parametrizations" in target for target in given)
    names = [path for path in modules if path and (inner or ".parametrizations." not in path)]
    tensors = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    excluded = _excluded(backbone, modules, names, tensors if config.takes_tensors() else (), config, known)
    named: dict[str, Parts] = {}
    for target in given:
        hits = known.find(target, common, names)
        if not hits and config.takes_tensors():
            hits = {address: () for address in tensors if matches(address, target)}
        if not hits:
            raise MatchError(
                f"modified_modules: {target!r} matches no module of {type(backbone).__name__}."
                f"{known.nearest(target, common)}"
            )
        for path, parts in hits.items():
            # A site that one name selects as a whole stays whole.
            whole = not parts or (path in named and not named[path])
            named[path] = () if whole else tuple(dict.fromkeys((*named.get(path, ()), *parts)))
    found: dict[str, Parts] = {}
    for path in names:
        if path not in named or any(within(path, out) for out, parts in excluded.items() if not parts):
            continue
        for site in config.spread(path, modules[path]):
            if any(within(site, out) for out, parts in excluded.items() if not parts):
                continue
            parts = named[path] if site == path else ()
            out = excluded.get(site, ())
            if out:
                parts = tuple(part for part in parts or known.parts(site) if part not in out)
                if not parts:
                    continue
            found[canonical[id(modules[site])]] = _acceptable(config, site, parts, known)
    for address in tensors:
        if address in named and address not in modules and not any(within(address, out) for out in excluded):
            path, _, name = address.rpartition(".")
            found[below(canonical[id(modules[path])], name)] = ()
    if not found:
        raise MatchError(f"exclude_modules={list(excluded)} excludes all sites that {list(given)} select.")
    order = {path: position for position, path in enumerate([*modules, *tensors])}
    return {address: found[address] for address in sorted(found, key=order.__getitem__)}


def _excluded(
    backbone: nn.Module,
    modules: dict[str, nn.Module],
    names: list[str],
    tensors: Sequence[str],
    config: BaseDeltaConfig,
    known: Names,
) -> dict[str, Parts]:
    """The paths that ``exclude_modules`` excludes with all below them, or, with parts, only those of the output."""
    given = config.exclude_modules
    if given is None:
        # Default sites never include the language model's head; one that is named is meant.
        given = () if config.modified_modules is not None else HEAD
    if given == HEAD and HEAD[0] not in modules:
        given = ()  # OpenDelta writes it into the config of every model
    excluded: dict[str, Parts] = {}
    for target in given:
        if any(within(name, target) for name in names) or target in tensors:
            excluded[target] = ()
            continue
        found = known.find(target, config.common_structure, names) if "@" in target or config.common_structure else {}
        if not found:
            nearest = known.nearest(target, None) if "@" in target else near(target, names)
            raise MatchError(f"exclude_modules: {target!r} matches no module of {type(backbone).__name__}.{nearest}")
        for path, parts in found.items():
            whole = not parts or (path in excluded and not excluded[path])
            excluded[path] = () if whole else tuple(dict.fromkeys((*excluded.get(path, ()), *parts)))
    return excluded


def _acceptable(config: BaseDeltaConfig, path: str, parts: Parts, known: Names) -> Parts:
    """The parts in order; ``()`` if they are all parts and the method acts only on whole outputs, else it raises."""
    if not parts or config.takes_parts():
        return tuple(sorted(parts, key=lambda part: part.start))
    called, every = known.of(path), known.parts(path)
    if set(parts) == set(every):
        return ()
    meant = ", ".join(part.name for part in parts)
    raise MatchError(
        f"{config.delta_type} cannot act at {path}: {meant} is a part of its fused output "
        f"({', '.join(part.name for part in every)}), but {config.delta_type} acts only on whole outputs. Name the "
        f"whole layer, {called.name.rpartition('@.')[2]!r} or {path!r}."
    )


def trained(
    backbone: nn.Module, modules: dict[str, nn.Module], configs: Sequence[BaseDeltaConfig], known: Names
) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """The leaves that ``unfrozen_modules`` names, with all names of the tensors, and those that start fresh."""
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    names_of = names_of_tensors(backbone)
    found: dict[str, tuple[str, ...]] = {}
    fresh: set[str] = set()
    for config in configs:
        for target in (name for name in config.unfrozen_modules if name != "deltas"):
            owners = known.find(target, config.common_structure, (*modules, *parameters))
            for path, parts in owners.items():
                if parts:
                    raise MatchError(
                        f"unfrozen_modules: {target!r} is a part of {path}, whose weight is one tensor and can only be "
                        f"trained as a whole. Write {known.of(path).name.rpartition('@.')[2]!r}."
                    )
            hits = [name for name in parameters if name in owners or any(within(name, owner) for owner in owners)]
            if not hits:
                raise MatchError(
                    f"unfrozen_modules: {target!r} matches no parameter of {type(backbone).__name__}."
                    f"{known.nearest(target, config.common_structure, parameters)}"
                )
            for name in hits:
                ends = names_of[id(parameters[name])]
                if not parameters[name].is_floating_point():
                    raise MatchError(f"unfrozen_modules: {name} is {parameters[name].dtype} and cannot be trained.")
                if is_quantised(parameters[name]):
                    raise MatchError(
                        f"unfrozen_modules: {name} is quantised ({type(parameters[name]).__name__}) and cannot be "
                        f"trained. Leave it out, or do not quantise that module."
                    )
                if ends[0] not in found:
                    found[ends[0]] = tuple(ends)
                    if config.unfrozen_init == "fresh":
                        fresh.add(ends[0])
    order = {name: position for position, name in enumerate(parameters)}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}, frozenset(fresh)


def named_leaves(backbone: nn.Module, names: tuple[str, ...], common: bool | None) -> tuple[str, ...]:
    """The backbone leaves that ``names`` select as ``unfrozen_modules``, each by the first name of its tensor.

    >>> named_leaves(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ("deltas", "1", "bias"), None)
    ('0.bias', '1.weight', '1.bias')
    """
    config = BaseDeltaConfig(unfrozen_modules=("deltas", *names), common_structure=common)
    modules = dict(backbone.named_modules(remove_duplicate=False))
    return tuple(trained(backbone, modules, [config], Names(backbone))[0])


def names_of_tensors(backbone: nn.Module) -> dict[int, list[str]]:
    """The names of every tensor, by its id: one for each place that holds it.

    A module with two paths is one place. Swapping a tensor there under both names would restore the wrong one.
    """
    names: dict[int, list[str]] = {}
    for path, module in backbone.named_modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{own}" if path else own)
    return names
