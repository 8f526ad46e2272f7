"""Writes a delta as a folder that OpenDelta can read, and refuses what it would misread."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError, MatchError, ParamsError
from ...files.checkpoint import backbone_facts
from ...match import below, explicit, within
from ...model import DeltaModel
from ...packing.packed import Packed
from ...plan.attachment import Attachment
from ...run.checked import checks_of
from ..files import module_paths
from .common_names import EXCLUDED, named_sites
from .fields import COMPAT, data_of, refuse_fields
from .folder import write_folder
from .places import Sites, flat, named, sites_of
from .spelling import FORMAT_VERSION, SPELLINGS, Leaves, Spelling

ELSEWHERE = "Save it in funcdelta's format: delta.save_finetuned(params, path)."


def save_opendelta(
    delta: DeltaModel, params: Mapping[str, Tensor], path: str | os.PathLike[str], *, compat: str | None = None
) -> Path:
    """Write one member to the folder ``path`` as OpenDelta does: ``config.json`` and ``pytorch_model.bin``.

    The names of sites are those of the config if OpenDelta matches them to the same modules; otherwise all sites are
    listed. Scales that OpenDelta has no field for are multiplied into the leaves. BitFit's offsets become biases,
    rounded to the backbone's precision. The delta's name is not kept.

    Args:
        compat: ``"opendelta"`` also writes what OpenDelta computes differently from this delta (T5's prefix).

    Raises `CheckpointError` for what OpenDelta cannot hold, saying what to write instead.

    >>> import json, tempfile
    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> folder = fd.save_opendelta(delta, delta.init(0), tempfile.mkdtemp() + "/run")
    >>> list(torch.load(folder / "pytorch_model.bin", weights_only=True))
    ['0.lora.lora_A', '0.lora.lora_B']
    >>> json.loads((folder / "config.json").read_text())["modified_modules"]
    ['0']
    """
    if any(isinstance(config, Packed) for config in delta.configs):
        raise CheckpointError(
            "This delta packs different members into one stack, which OpenDelta cannot read: save each pair of "
            "fd.unpack(delta, stack) in a separate folder."
        )
    if len(delta.configs) != 1:
        kinds = ", ".join(config.delta_type for config in delta.configs)
        raise CheckpointError(
            f"OpenDelta has one config per folder, but this delta has {len(delta.configs)} ({kinds}): save each in a "
            f"separate folder, fd.save_opendelta(fd.DeltaModel(backbone, config), its_params, path)."
        )
    checks_of(delta).member(params)
    lacking = [name for name in delta.names if name not in params]
    if lacking:
        raise ParamsError(f"save_opendelta: params lack {len(lacking)} leaves of the delta, first {lacking[0]}.")
    config = delta.configs[0]
    spelling = SPELLINGS.get(config.delta_type)
    if spelling is None:
        raise CheckpointError(f"OpenDelta has no {config.delta_type!r}, only {', '.join(SPELLINGS)}. {ELSEWHERE}")
    _refuse(delta, spelling, compat)
    changed, leaves = spelling.settle(config, {a.site.path: a.of(params) for a in _owning(delta)})
    places = {site: _place(delta.backbone, spelling, site) for site in delta.sites}
    where = _names(delta, spelling, places)
    data = data_of(config, spelling, {**changed, **where, **_provenance(delta)})
    return write_folder(path, data, _tensors(delta, params, spelling, leaves, places, where))


def _owning(delta: DeltaModel) -> list[Attachment]:
    """The attachments that have their own leaves."""
    return [a for a in delta.plan.all() if a.shapes]


def _refuse(delta: DeltaModel, spelling: Spelling, compat: str | None) -> None:
    """Raise if OpenDelta lacks a field or a module for this delta, or uses another formula."""
    config = delta.configs[0]
    reason = refuse_fields(config, spelling)
    if reason is not None:
        raise CheckpointError(f"OpenDelta cannot hold this {config.delta_type}: {reason}. {ELSEWHERE}")
    modules = dict(delta.backbone.named_modules())
    for attachment in delta.plan.all():
        site = attachment.site
        reason = spelling.refuse(config, site)
        if reason is not None:
            raise CheckpointError(f"OpenDelta cannot hold {config.delta_type} at {site.path}: {reason}. {ELSEWHERE}")
        other = spelling.inexact
        if other is None or compat == COMPAT or getattr(config, other.field) == other.value:
            continue
        if type(modules[site.path]).__name__ in other.classes:
            raise CheckpointError(
                f"OpenDelta has {other.what}, so its outputs would differ from this delta's, which has "
                f'{other.field}={getattr(config, other.field)!r}. To write it anyway, pass compat="{COMPAT}".'
            )


def _place(backbone: nn.Module, spelling: Spelling, site: str) -> str:
    """The module that carries the leaves of ``site`` in OpenDelta: the site, or a module that contains it."""
    if spelling.sites and not spelling.hosts:
        return site
    if not spelling.sites:
        return _entrance(backbone, spelling, site)
    path = site
    while type(backbone.get_submodule(path)).__name__ not in spelling.hosts:
        if not path:
            raise CheckpointError(
                f"OpenDelta has no {spelling.attribute} for {site}: neither it nor a module that contains it is one of "
                f"{', '.join(spelling.hosts)}. {ELSEWHERE}"
            )
        path = path.rpartition(".")[0]
    return path


def _entrance(backbone: nn.Module, spelling: Spelling, site: str) -> str:
    """Where OpenDelta puts a delta without sites: the encoder of an encoder-decoder, else the backbone as a whole."""
    config: Any = getattr(backbone, "config", None)
    if config is None or not hasattr(backbone, "get_input_embeddings"):
        raise CheckpointError(
            f"OpenDelta's {spelling.attribute} needs the model itself, but {type(backbone).__name__} is a wrapper "
            f"around it: make the delta on the model inside. {ELSEWHERE}"
        )
    place = ""
    if getattr(config, "is_encoder_decoder", False):
        encoder = getattr(backbone, "get_encoder")()  # noqa: B009  (typed as a tensor or a module)
        place = next(path for path, module in backbone.named_modules() if module is encoder)
    if not within(site, place):
        raise CheckpointError(f"OpenDelta puts {spelling.attribute} at {place}, not at {site}. {ELSEWHERE}")
    return place


def _names(delta: DeltaModel, spelling: Spelling, places: Mapping[str, str]) -> dict[str, Any]:
    """The fields ``modified_modules``, ``common_structure`` and so on with which OpenDelta finds the sites."""
    if not spelling.sites:
        return {"modified_modules": ["root"]}
    config, backbone = delta.configs[0], delta.backbone
    modules = dict(backbone.named_modules(remove_duplicate=False))

    def saved(sites: Sites) -> Sites:
        return {site: end for site, end in sites.items() if not spelling.unsaved(modules[site])}

    given = config.modified_modules or config.default_names()
    excluded = list(config.exclude_modules or EXCLUDED)
    # Prefer common names, if they match the same modules, to a list of paths.
    for names in sorted((given, spelling.sites), key=lambda names: not any("@" in name for name in names)):
        where = {"modified_modules": list(names), "common_structure": any("@" in name for name in names)}
        try:
            found = named(backbone, config, spelling, {**where, "exclude_modules": excluded})
        except MatchError:  # an end of a span without a partner
            continue
        if found is not None and saved(found) == saved(sites_of(delta)):
            return where
    spans = config.gives("spans")
    paths = flat({places[site]: end if spans else places[site] for site, end in sites_of(delta).items()}, spans)
    order = {path: position for position, path in enumerate(modules)}
    if [order[path] for path in paths] != sorted(order[path] for path in paths):
        raise CheckpointError(
            f"OpenDelta pairs the ends of {config.delta_type} in the order of the modules, but these are in another "
            f"order: {', '.join(paths[:4])}. {ELSEWHERE}"
        )
    listed = list(explicit(paths, module_paths(backbone)))
    return {"modified_modules": listed, "common_structure": False, "exclude_modules": []}


def _provenance(delta: DeltaModel) -> dict[str, Any]:
    facts = backbone_facts(delta.backbone)
    return facts | {"backbone_hash": delta.configs[0].backbone_hash, "opendelta_version": FORMAT_VERSION}


def _tensors(
    delta: DeltaModel,
    params: Mapping[str, Tensor],
    spelling: Spelling,
    leaves: Leaves,
    places: Mapping[str, str],
    where: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors under OpenDelta's keys, in the order of the modules, as in its state dicts."""
    modules = dict(delta.backbone.named_modules())
    parameters = dict(delta.backbone.named_parameters())
    found: dict[str, Tensor] = {name: params[name] for name in delta.plan.trained}
    for site, p in leaves.items():
        for leaf, tensor in p.items():
            if leaf in spelling.derived:
                continue
            if leaf not in spelling.own:
                found[below(places[site], f"{spelling.attribute}.{spelling.inner}{leaf}")] = tensor
            elif not spelling.unsaved(modules[site]):
                key = f"{places[site]}.{leaf}"
                found[key] = _absolute(tensor, found.get(key, parameters.get(key)))
            elif tensor.count_nonzero():
                raise CheckpointError(
                    f"OpenDelta cannot hold {site}.{leaf}: {type(modules[site]).__name__} has none, and OpenDelta does "
                    f"not load what it adds there. Leave the site out: exclude_modules=[{site!r}]."
                )
    for group in delta.plan.shared:
        first = named_sites(delta.backbone, where["modified_modules"], EXCLUDED, where["common_structure"]) or ()
        site = group.sites[0].path
        place = next((path for path in first if within(site, path)), places[site])
        for leaf, key in group.leaves.items():
            found[f"{place}.{spelling.shared}.{leaf}"] = params[key]
    order = {path: position for position, path in enumerate(modules)}
    return {key: found[key] for key in sorted(found, key=lambda key: _position(key, order))}


def _absolute(offset: Tensor, before: Tensor | None) -> Tensor:
    if before is None:
        return offset
    return (before.detach().double().cpu() + offset.detach().double().cpu()).to(before.dtype)


def _position(key: str, order: Mapping[str, int]) -> int:
    """The position in the backbone of the module that ``key`` belongs to."""
    path = key
    while path and path not in order:
        path = path.rpartition(".")[0]
    return order.get(path, -1)
