"""Reads a delta that OpenDelta saved: every key of the file accounted for, every leaf of the delta found in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import home
from ...config import BaseDeltaConfig
from ...errors import CheckpointError, MatchError
from ...match import matches, near, within
from ...model import DeltaModel
from .common_names import EXCLUDED, named_sites
from .fields import COMPAT, config_of, spelling_of
from .folder import read_folder
from .keys import Group, moved, sort_keys
from .spelling import SPELLINGS, Spelling, attribute_name

_SHOWN = 5


def load_opendelta(
    path: str | os.PathLike[str],
    backbone_model: nn.Module,
    *,
    compat: str | None = None,
    others: Mapping[str, BaseDeltaConfig] | None = None,
    device: torch.device | str | None = None,
    example: Any = None,
    prepare: Any = None,
    fetching: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """``(delta, params)`` of a folder (or hub id) that OpenDelta wrote, of any version.

    The keys of the file say where the delta acts; ``config.json`` has to agree with them. Backbone tensors in the
    file that differ from the backbone's, or were unfrozen, are trained leaves of the params; BitFit's biases become
    offsets. Pickles are read as plain tensors only. OpenDelta's ``backbone_hash`` covers its own patched model and
    cannot be compared; it is kept in the config.

    Args:
        compat: ``"opendelta"`` gives the original's number where that is a mistake (T5's prefix loses the position
            bias of all layers but the first); by default the delta is computed right.
        others: configs of the other deltas in the file, ``{name there: config}``: OpenDelta saves the leaves of all
            deltas on a backbone beside the config of one.
        device: where the leaves go; by default, where the backbone's tensors at their site are.
        fetching: arguments of ``huggingface_hub.snapshot_download`` for a hub id.
        changes: fields that override those of ``config.json``; ``modified_modules`` overrides its sites too.

    Raises `CheckpointError` listing what is missing, left over or of another shape.

    >>> import tempfile
    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> params = fd.tree.randn_like(delta.init(0), seed=1) | {"0.lora.scale": torch.tensor(8.0)}
    >>> folder = fd.save_opendelta(delta, params, tempfile.mkdtemp() + "/run")
    >>> again, loaded = fd.load_opendelta(folder, backbone)
    >>> again.sites, all(torch.equal(loaded[name], params[name]) for name in delta.names)
    (('0',), True)
    """
    if compat not in (None, COMPAT):
        raise CheckpointError(
            f'compat={compat!r}: write compat="{COMPAT}" for the original\'s numbers, or leave it out.'
        )
    folder, data, tensors = read_folder(path, **(fetching or {}))
    if "delta_type" in changes:
        data = {**data, "delta_type": changes.pop("delta_type")}
    _, spelling = spelling_of(data)
    tensors = {key: tensors[old] for old, key in moved(tensors, backbone_model).items()}
    reader = _Reader(folder, backbone_model, data, tensors, spelling, {"example": example, "prepare": prepare})
    return reader.read(config_of(data, compat, changes), "modified_modules" in changes, others or {}, device)


class _Reader:
    """One reading of one folder."""

    def __init__(
        self,
        folder: Path,
        backbone: nn.Module,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        spelling: Spelling,
        options: Mapping[str, Any],
    ) -> None:
        self.folder, self.backbone, self.data, self.tensors = folder, backbone, data, tensors
        self.spelling, self.options = spelling, options
        self.keys = sort_keys(tensors, backbone)
        self.parameters = dict(backbone.named_parameters())
        self.problems: list[str] = []

    def read(
        self, config: BaseDeltaConfig, resited: bool, others: Mapping[str, BaseDeltaConfig], device: Any
    ) -> tuple[DeltaModel, dict[str, Tensor]]:
        """The delta and its params, or one error with all that does not fit."""
        named = None if resited else self._named_sites(config)
        groups = self._groups(config, others, named)
        self._note("not known to the delta or the backbone", self.keys.unknown, self._hint())
        trained = self._trained()
        self._stop()

        configs: list[BaseDeltaConfig] = []
        for one, group in groups:
            described = one is config
            configs.append(self._placed(one, group, named if described else None, described and not resited))
        configs[0] = self._unfrozen(configs, trained)
        delta = DeltaModel(self.backbone, *configs, **self.options)
        params = self._leaves(delta, [group for _, group in groups]) | trained
        self._check(delta, params)
        return delta, {
            name: params[name].to(device or home(self.backbone, name)).clone(memory_format=torch.contiguous_format)
            for name in delta.names
        }

    # -- where -----------------------------------------------------------------------------------------------------

    def _named_sites(self, config: BaseDeltaConfig) -> tuple[str, ...] | None:
        """The sites that ``config.json`` names, by OpenDelta's rules; ``None`` where they cannot be told."""
        names = self.data.get("modified_modules")
        if names is None or not self.spelling.sites:
            return None
        excluded = self.data.get("exclude_modules") if self.spelling.heeds_exclusion else None
        common = bool(self.data.get("common_structure"))
        found = named_sites(self.backbone, names, EXCLUDED if excluded is None else excluded, common)
        return None if found is None else self._sites(config, found)

    def _sites(self, config: BaseDeltaConfig, paths: Iterable[str]) -> tuple[str, ...]:
        """The sites here that modules of OpenDelta stand for, in the backbone's order."""
        modules = dict(self.backbone.named_modules(remove_duplicate=False))
        own = () if self.spelling.sites else config.own_sites(self.backbone)
        found: dict[str, None] = {}
        for path in paths:
            below = [site for site in own if within(site, path)] if own else config.spread(path, modules[path])
            found |= dict.fromkeys(below)
        return tuple(path for path in modules if path in found)

    def _groups(
        self, config: BaseDeltaConfig, others: Mapping[str, BaseDeltaConfig], named: tuple[str, ...] | None
    ) -> list[tuple[BaseDeltaConfig, Group]]:
        """The deltas of the file, each a config and its keys: the one of ``config.json``, then ``others``."""
        self._take_own(config, named)
        names = self.keys.names()
        for name in others:
            if name not in names:
                raise CheckpointError(
                    f"others: no delta in '{self.folder}' is called {name!r}.{near(name, list(names))}"
                )
        left = [name for name in names if name not in others]
        mine = [name for name in left if names[name][0] == config.delta_type]
        if not mine and len(others) == len(names) and names:
            return [(other, self.keys.deltas[names[name]]) for name, other in others.items()]
        if not mine:
            found = f"the tensors of {', '.join(names)}" if names else "no tensor of a delta"
            wanted = attribute_name(config.delta_type, 0)
            raise CheckpointError(
                f"'{self.folder}' has {found}, and config.json describes {config.delta_type} ({wanted!r} in keys)."
                f"{self._hint()}"
            )
        if len(left) > 1:
            example = next((name for name in left if name != mine[0]))
            kind = f"{names[example][0]!r}"
            raise CheckpointError(
                f"'{self.folder}' has the tensors of several deltas ({', '.join(names)}) and the config of one. Say what "
                f"the others are, in the order in which they act after it: load_opendelta(path, backbone_model, "
                f"others={{{example!r}: fd.AutoDeltaConfig.from_dict({{'delta_type': {kind}, ...}})}})."
            )
        chosen = [(config, self.keys.deltas[names[mine[0]]])]
        return chosen + [(other, self.keys.deltas[names[name]]) for name, other in others.items()]

    def _take_own(self, config: BaseDeltaConfig, named: tuple[str, ...] | None) -> None:
        """Put the backbone's own tensors that are leaves of the delta into its group."""
        if not self.spelling.own:
            self.keys.unknown += [key for at in self.keys.fresh.values() for key in at.values()]
            return
        found = {path: dict(at) for path, at in self.keys.fresh.items()}
        for key in list(self.keys.backbone):
            path, _, own = key.rpartition(".")
            if own in self.spelling.own and (named is None or path in named):
                found.setdefault(path, {})[own] = key
                self.keys.backbone.remove(key)
        if found:
            group = self.keys.deltas.setdefault((config.delta_type, 0), Group())
            for path, at in found.items():
                group.own.setdefault(path, {}).update(at)

    def _placed(
        self, config: BaseDeltaConfig, group: Group, named: tuple[str, ...] | None, described: bool
    ) -> BaseDeltaConfig:
        """``config`` with names of exactly the sites that the keys show, ``config.json``'s own if they mean these."""
        sites = self._sites(config, group.own)
        if group.shared:
            first = self._sites(config, group.shared)
            if named is None or not first or first[0] not in named:
                sites = sites or ()
            else:
                sites = named
        if named is not None:
            modules = dict(self.backbone.named_modules())
            missing = [s for s in named if s not in sites and not self.spelling.unsaved(modules[s])]
            self._note("named by config.json and not in the file", missing, self._site_hint())
            if not self.spelling.own:
                extra = [site for site in sites if site not in named]
                self._note("in the file and not named by config.json", extra, self._site_hint())
            self._stop()
        if not described:
            names, kept = config.modified_modules, config.exclude_modules
        else:
            names, kept = self.data.get("modified_modules"), self.data.get("exclude_modules")
        excluded = tuple(kept or ())
        tries = (
            [(names, None if set(excluded) <= set(EXCLUDED) else excluded)] if self.spelling.sites else [(None, None)]
        )
        if sites:
            tries.append((explicit(self.backbone, sites), None))
        for number, (modified, left_out) in enumerate(tries):
            placed = config.replace(modified_modules=modified, exclude_modules=left_out)
            try:
                delta = DeltaModel(self.backbone, placed, **self.options)
            except MatchError:
                # Names of OpenDelta's that mean nothing here, or another thing: the sites themselves come next.
                if number == len(tries) - 1:
                    raise
                continue
            if not sites or set(delta.sites) == set(sites):
                return placed
        raise CheckpointError(
            f"'{self.folder}': {config.delta_type} acts at {_some(delta.sites)}, and the file has {_some(sites)}."
        )

    # -- what ------------------------------------------------------------------------------------------------------

    def _leaves(self, delta: DeltaModel, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The leaves in the file by their name here; those that the config determines, from the config."""
        by_name = dict(zip(delta.plan.names, zip(delta.configs, groups, strict=True), strict=True))
        fresh = delta.init(0)
        params: dict[str, Tensor] = {}
        used: set[str] = set()
        for part in (*delta.plan.shared, *delta.plan.all()):
            config, group = by_name[part.name]
            spelling = SPELLINGS[config.delta_type]
            at_site = hasattr(part, "site")
            here: dict[str, str] = {}
            for path, keys in (group.own if at_site else group.shared).items():
                if not at_site or part.site.path in self._sites(config, [path]):
                    here |= keys
            for leaf, name in part.leaves.items():
                if name not in part.shapes:
                    continue
                if leaf in spelling.derived:
                    params[name] = fresh[name]
                elif leaf in here:
                    key = here[leaf]
                    used.add(key)
                    params[name] = self._offset(key) if leaf in spelling.own else self.tensors[key]
        for group in groups:
            every = [key for at in (*group.own.values(), *group.shared.values()) for key in at.values()]
            self._note("not a leaf of the delta", [key for key in every if key not in used])
        return params

    def _offset(self, key: str) -> Tensor:
        """The tensor of ``key`` less that of the backbone, which counts as zero where there is none."""
        value, before = self.tensors[key], self.parameters.get(key)
        if before is None or before.shape != value.shape:
            return value
        return (value.double() - before.detach().cpu().double()).to(value.dtype)

    def _trained(self) -> dict[str, Tensor]:
        """The backbone's tensors in the file that are trained leaves of the delta."""
        names: dict[int, str] = {}
        tensors = dict(self.backbone.named_parameters(remove_duplicate=False))
        tensors |= dict(self.backbone.named_buffers(remove_duplicate=False))
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), name)
        first = {name: names[id(tensor)] for name, tensor in tensors.items()}
        # A model that was never frozen is saved whole; what nobody trained is dropped then.
        whole = {first[key] for key in self.keys.backbone} | {
            key for group in self.keys.deltas.values() for at in group.own.values() for key in at.values()
        } >= self.parameters.keys()
        kept = tuple(self.data.get("unfrozen_modules") or ())
        found: dict[str, Tensor] = {}
        buffers, shapes, ends = [], [], []
        for key in self.keys.backbone:
            value, here = self.tensors[key], tensors[key].detach().cpu()
            if value.shape != here.shape:
                shapes.append(f"{key} (expected {tuple(here.shape)}, found {tuple(value.shape)})")
            elif key not in self.parameters and first[key] not in self.parameters:
                buffers += [] if value.to(here.dtype).equal(here) else [key]
            elif first[key] in found:
                ends += [] if found[first[key]].equal(value) else [key]
            elif not (whole and value.to(here.dtype).equal(here) and not _within_any(first[key], kept)):
                found[first[key]] = value
        self._note("of another shape than the backbone's", shapes)
        self._note("ends of one tied tensor with unlike values", ends)
        self._note(
            "buffers that differ from the backbone's",
            buffers,
            " Put them into the backbone first: backbone_model.load_state_dict(those, strict=False).",
        )
        return {name: found[name] for name in self.parameters if name in found}

    def _unfrozen(self, configs: Sequence[BaseDeltaConfig], trained: Mapping[str, Tensor]) -> BaseDeltaConfig:
        """The first config with names of exactly the trained leaves, those of ``config.json`` if they mean these."""
        first, tries = configs[0], [("deltas",)]
        if trained:
            given = tuple(self.data.get("unfrozen_modules") or ())
            tries = [("deltas", *[name for name in given if name != "deltas"])] if len(given) > 1 else []
            whole = dict.fromkeys(name.rpartition(".")[0] or name for name in trained)
            tries += [("deltas", *whole), ("deltas", *explicit_names(trained))]
        for unfrozen in tries:
            config = first.replace(unfrozen_modules=unfrozen)
            try:
                delta = DeltaModel(self.backbone, config, *configs[1:], **self.options)
            except MatchError:
                continue  # a name that did nothing in OpenDelta
            if delta.plan.trained.keys() == trained.keys():
                return config
        raise CheckpointError(
            f"'{self.folder}': the backbone's tensors {_some(list(trained))} cannot be trained leaves."
        )

    # -- errors ----------------------------------------------------------------------------------------------------

    def _check(self, delta: DeltaModel, params: Mapping[str, Tensor]) -> None:
        missing = [name for name in delta.names if name not in params]
        wrong = [
            f"{name} (expected {delta.shapes[name]}, found {tuple(params[name].shape)})"
            for name in delta.names
            if name in params and tuple(params[name].shape) != delta.shapes[name]
        ]
        lost = " OpenDelta does not save leaves that do not train, so their values are lost."
        constant = any(name in delta.constants for name in missing)
        self._note("missing", missing, lost if constant else "")
        self._note(
            "of another shape than config.json says",
            wrong,
            " Fields of the config can be given: load_opendelta(path, backbone_model, field=value).",
        )
        self._stop()

    def _note(self, what: str, names: Sequence[str], hint: str = "") -> None:
        if names:
            self.problems.append(f"{len(names)} {what}: {_some(names)}.{hint}")

    def _stop(self) -> None:
        if self.problems:
            raise CheckpointError(
                f"'{self.folder}' does not fit {type(self.backbone).__name__}:\n" + "\n".join(self.problems)
            )

    def _hint(self) -> str:
        """What the first key that nobody knows may have meant."""
        unknown = self.keys.unknown
        if not unknown:
            return ""
        known = [path for path, _ in self.backbone.named_modules() if path] + list(self.parameters)
        made_on = self.data.get("backbone_class")
        other = f" It was made on a {made_on}." if made_on and made_on != type(self.backbone).__name__ else ""
        tokens = unknown[0].split(".")
        # Up to the first token at which the path leaves the backbone.
        end = next((i for i in range(1, len(tokens)) if ".".join(tokens[:i]) not in known), len(tokens))
        return other + near(".".join(tokens[:end]), known)

    def _site_hint(self) -> str:
        return " To say which sites are meant, pass modified_modules=[...] with the backbone's own names."


def explicit(backbone: nn.Module, sites: Iterable[str]) -> tuple[str, ...]:
    """Names that mean exactly these modules: their paths, with both ends fixed where another path ends like one.

    >>> explicit(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ModuleDict({"a": nn.Linear(1, 1)})}), ["a", "b.a"])
    ('[r]^a$', 'b.a')
    """
    paths = [path for path, _ in backbone.named_modules(remove_duplicate=False) if path]
    return tuple(s if sum(matches(path, s) for path in paths) == 1 else f"[r]^{re.escape(s)}$" for s in sites)


def explicit_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names that mean exactly these parameters.

    >>> explicit_names(["classifier.weight"])
    ('[r]^classifier\\\\.weight$',)
    """
    return tuple(f"[r]^{re.escape(name)}$" for name in names)


def _within_any(name: str, owners: Iterable[str]) -> bool:
    """Whether one of ``owners`` means ``name`` or a module that holds it."""
    tokens = name.split(".")
    paths = [".".join(tokens[:end]) for end in range(1, len(tokens) + 1)]
    return any(matches(path, owner) for owner in owners for path in paths)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
