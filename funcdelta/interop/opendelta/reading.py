"""Reads a delta that OpenDelta saved; every key of the file and every leaf of the delta is accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, MatchError
from ...files.checkpoint import home
from ...match import exactly, explicit, near
from ...methods.config import BaseDeltaConfig
from ...model import DeltaModel
from ..files import module_paths, some
from .common_names import EXCLUDED
from .fields import COMPAT, config_of, spelling_of
from .folder import read_folder
from .keys import Group, moved, only_kind, repeats, sort_keys
from .places import Sites, flat, named, sites_at, sites_of
from .spelling import SPELLINGS, Spelling, attribute_name
from .trained import trained_leaves


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
    """``(delta, params)`` from a folder (or hub id) that any version of OpenDelta wrote.

    The keys of the file say where the delta acts, and ``config.json`` has to agree with them. Backbone tensors in the
    file that differ from the backbone's, or were unfrozen, become trained leaves of the params; BitFit's biases become
    offsets. Of a pickle, only plain tensors are read. OpenDelta's ``backbone_hash`` covers its own patched model and
    cannot be compared; it is kept in the config.

    Args:
        compat: ``"opendelta"`` reproduces the original's outputs even if they are wrong (T5's prefix loses the position
            bias of all layers but the first); by default they are right.
        others: configs of the other deltas in the file, ``{name there: config}``: OpenDelta saves the leaves of all
            deltas on a backbone with the config of only one.
        device: the device of the leaves; by default, that of their sites.
        fetching: arguments of ``huggingface_hub.snapshot_download`` for a hub id.
        changes: fields that override those of ``config.json``; ``modified_modules`` overrides its sites, too.

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
        raise CheckpointError(f'compat={compat!r}: write compat="{COMPAT}", or leave it out.')
    folder, data, tensors = read_folder(path, **(fetching or {}))
    tensors = {key: tensors[old] for old, key in moved(tensors, backbone_model).items()}
    if "delta_type" in changes:
        data = {**data, "delta_type": changes.pop("delta_type")}
    elif not data.get("delta_type"):
        data = {**data, "delta_type": only_kind(tensors, backbone_model)}
    spelling = spelling_of(data)[1]
    config = config_of(data, compat, changes)
    if "modified_modules" in changes:
        data = {key: value for key, value in data.items() if key not in ("modified_modules", "exclude_modules")}
    reader = _Reader(folder, backbone_model, data, tensors, spelling, {"example": example, "prepare": prepare})
    return reader.read(config, others or {}, device)


class _Reader:
    """Reads one folder and collects what does not fit."""

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
        self, config: BaseDeltaConfig, others: Mapping[str, BaseDeltaConfig], device: torch.device | str | None
    ) -> tuple[DeltaModel, dict[str, Tensor]]:
        """The delta and its params; or one error that lists everything that does not fit."""
        meant = named(self.backbone, config, self.spelling, self.data)
        self._take_own(config, meant)
        self._drop_repeats(config, meant)
        groups = self._groups(config, others)
        self._note("not known to the delta or the backbone", self.keys.unknown, self._hint())
        kept = tuple(self.data.get("unfrozen_modules") or ())
        trained, problems = trained_leaves(self.backbone, self.keys, self.tensors, kept)
        for problem in problems:
            self._note(*problem)
        self._stop()

        configs = [self._placed(one, group, None, {}) for one, group in groups[1:]]
        configs.insert(0, self._placed(*groups[0], meant, self.data))
        configs[0] = self._unfrozen(configs, trained, kept)
        delta = DeltaModel(self.backbone, *configs, **self.options)
        fresh = delta.init(0)
        params = self._leaves(delta, [group for _, group in groups], fresh) | trained
        self._check(delta, params)

        def settled(name: str) -> Tensor:
            # As in OpenDelta, leaves keep their own dtype whatever the file's is.
            leaf = params[name].to(device or home(self.backbone, name), fresh[name].dtype)
            return leaf.clone(memory_format=torch.contiguous_format)

        return delta, {name: settled(name) for name in delta.names}

    # -- which keys ------------------------------------------------------------------------------------------------

    def _take_own(self, config: BaseDeltaConfig, meant: Sites | None) -> None:
        """Move those of the backbone's tensors that are leaves of the delta (BitFit's) into its group."""
        if not self.spelling.own:
            self.keys.unknown += [key for at in self.keys.fresh.values() for key in at.values()]
            return
        found = {path: dict(at) for path, at in self.keys.fresh.items()}
        for key in list(self.keys.backbone):
            path, _, own = key.rpartition(".")
            if own in self.spelling.own and (meant is None or path in meant):
                found.setdefault(path, {})[own] = key
                self.keys.backbone.remove(key)
        if found:
            group = self.keys.deltas.setdefault((config.delta_type, 0), Group())
            for path, at in found.items():
                group.own.setdefault(path, {}).update(at)

    def _drop_repeats(self, config: BaseDeltaConfig, meant: Sites | None) -> None:
        """Remove the second names of a span's leaves, which a file has if the whole model was saved."""
        group = self.keys.deltas.get((config.delta_type, 0))
        if not config.gives("spans") or group is None or meant is None:
            return
        first = {path: at for path, at in group.own.items() if path in meant}
        second = self.keys.deltas.get((config.delta_type, 1), Group())
        if repeats(self.tensors, second, first):
            self.keys.deltas.pop((config.delta_type, 1), None)
        rest = Group({path: at for path, at in group.own.items() if path not in meant and path in meant.values()})
        if repeats(self.tensors, rest, first):
            group.own = {path: at for path, at in group.own.items() if path not in rest.own}

    def _groups(
        self, config: BaseDeltaConfig, others: Mapping[str, BaseDeltaConfig]
    ) -> list[tuple[BaseDeltaConfig, Group]]:
        """The deltas of the file, each a config and its keys: first that of ``config.json``, then ``others``."""
        names = self.keys.names()
        for name in others:
            if name not in names:
                raise CheckpointError(f"others: '{self.folder}' has no delta called {name!r}.{near(name, list(names))}")
        left = [name for name in names if name not in others]
        mine = [name for name in left if names[name][0] == config.delta_type]
        if not mine:
            found = f"the tensors of {', '.join(names)}" if names else "no tensor of a delta"
            wanted = attribute_name(config.delta_type, 0)
            raise CheckpointError(
                f"'{self.folder}' has {found}, but config.json describes {config.delta_type} ({wanted!r} in keys). Not "
                f"known to {type(self.backbone).__name__}: {some(self.keys.unknown) or 'nothing'}.{self._hint()}"
            )
        if len(left) > 1:
            example = next(name for name in left if name != mine[0])
            raise CheckpointError(
                f"'{self.folder}' has the tensors of several deltas ({', '.join(names)}), but the config of one. Give "
                f"the others' configs, in the order in which they act after it: load_opendelta(path, backbone_model, "
                f"others={{{example!r}: fd.AutoDeltaConfig.from_dict({{'delta_type': {names[example][0]!r}, ...}})}})."
            )
        chosen = {mine[0]: config, **others}
        return [(one, self.keys.deltas[names[name]]) for name, one in chosen.items()]

    # -- where -----------------------------------------------------------------------------------------------------

    def _placed(
        self, config: BaseDeltaConfig, group: Group, meant: Sites | None, data: Mapping[str, Any]
    ) -> BaseDeltaConfig:
        """``config`` with names of exactly the sites that have keys; the names of the file, if they match these."""
        spelling = SPELLINGS[config.delta_type]
        paths = sites_at(self.backbone, config, spelling, group.own)
        if group.shared:
            # Shared leaves are saved under the first site only; the config has to name the other sites.
            first = sites_at(self.backbone, config, spelling, group.shared)
            paths = list(meant) if meant is not None and first[:1] == list(meant)[:1] else paths or first
        if meant is not None:
            modules = dict(self.backbone.named_modules())
            missing = [path for path in meant if path not in paths and not spelling.unsaved(modules[path])]
            extra = [path for path in paths if path not in meant and not spelling.own]
            hint = " To name the sites yourself, pass modified_modules=[...] with the backbone's own names."
            self._note("named by config.json but not in the file", missing, hint)
            self._note("in the file but not named by config.json", extra, hint)
            self._stop()
        names = (config.modified_modules or data.get("modified_modules")) if spelling.sites else None
        excluded = config.exclude_modules or tuple(data.get("exclude_modules") or ())
        tries = [(names, None if set(excluded) <= set(EXCLUDED) else excluded)]
        spans = config.gives("spans")
        if paths and spelling.sites and (not spans or meant is not None):
            sites = {path: (meant or {}).get(path, path) for path in paths}
            tries.append((explicit(flat(sites, spans), module_paths(self.backbone)), None))
        found: Sites = {}
        for number, (names, left_out) in enumerate(tries):
            placed = config.replace(modified_modules=names, exclude_modules=left_out)
            try:
                delta = DeltaModel(self.backbone, placed, **self.options)
            except MatchError:
                # OpenDelta's names match nothing here, or something that does not fit: try the sites themselves next.
                if number == len(tries) - 1:
                    raise
                continue
            found = sites_of(delta)
            if set(found) == set(paths) and (not spans or meant is None or all(found[p] == meant[p] for p in paths)):
                return placed
        raise CheckpointError(
            f"'{self.folder}': {config.delta_type} would act at {some(list(found))}, but the file has leaves at "
            f"{some(paths)}. Pass modified_modules=[...] with the backbone's own names."
        )

    def _unfrozen(
        self, configs: Sequence[BaseDeltaConfig], trained: Mapping[str, Tensor], kept: Sequence[str]
    ) -> BaseDeltaConfig:
        """The first config, unfreezing exactly the trained leaves, by the names of ``config.json`` if they match."""
        if not trained:
            return configs[0]
        tries: list[Iterable[str]] = [kept, dict.fromkeys(name.rpartition(".")[0] for name in trained)]
        for names in (*tries, map(exactly, trained)):
            unfrozen = ("deltas", *(name for name in names if name and name != "deltas"))
            config = configs[0].replace(unfrozen_modules=unfrozen)
            try:
                delta = DeltaModel(self.backbone, config, *configs[1:], **self.options)
            except MatchError:
                continue  # a name that had no effect in OpenDelta
            if delta.plan.trained.keys() == trained.keys():
                return config
        raise CheckpointError(f"'{self.folder}': tensors {some(list(trained))} of the backbone cannot be trained.")

    # -- what ------------------------------------------------------------------------------------------------------

    def _leaves(self, delta: DeltaModel, groups: Sequence[Group], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves by their names in params: from the file, or from the config if that determines them."""
        by_name = dict(zip(delta.plan.names, zip(delta.configs, groups, strict=True), strict=True))
        params: dict[str, Tensor] = {}
        used: set[str] = set()
        parts = [(part, None) for part in delta.plan.shared] + [(part, part.site.path) for part in delta.plan.all()]
        for part, site in parts:
            config, group = by_name[part.name]
            spelling = SPELLINGS[config.delta_type]
            here: dict[str, str] = {}
            for path, keys in (group.shared if site is None else group.own).items():
                if site is None or site in sites_at(self.backbone, config, spelling, [path]):
                    here |= keys
            for leaf, name in part.leaves.items():
                if name not in part.shapes:
                    continue
                if leaf in spelling.derived:
                    params[name] = fresh[name]
                elif leaf in here:
                    used.add(here[leaf])
                    own = leaf in spelling.own
                    params[name] = self._offset(here[leaf]) if own else self.tensors[here[leaf]]
        for group in groups:
            every = [key for at in (*group.own.values(), *group.shared.values()) for key in at.values()]
            self._note("not a leaf of the delta", [key for key in every if key not in used])
        return params

    def _offset(self, key: str) -> Tensor:
        """The tensor of ``key`` minus the backbone's, if it has one."""
        value, before = self.tensors[key], self.parameters.get(key)
        if before is None or before.shape != value.shape:
            return value
        return value.double() - before.detach().cpu().double()

    # -- errors ----------------------------------------------------------------------------------------------------

    def _check(self, delta: DeltaModel, params: Mapping[str, Tensor]) -> None:
        missing = [name for name in delta.names if name not in params]
        wrong = [
            f"{name} (expected {delta.shapes[name]}, found {tuple(params[name].shape)})"
            for name in delta.names
            if name in params and tuple(params[name].shape) != delta.shapes[name]
        ]
        lost = " OpenDelta does not save constants, so their values are lost."
        self._note("missing", missing, lost if any(name in delta.constants for name in missing) else "")
        self._note(
            "of another shape than config.json says",
            wrong,
            " You can override fields of the config: load_opendelta(path, backbone_model, field=value).",
        )
        self._stop()

    def _note(self, what: str, names: Sequence[str], hint: str = "") -> None:
        if names:
            self.problems.append(f"{len(names)} {what}: {some(names)}.{hint}")

    def _stop(self) -> None:
        if self.problems:
            raise CheckpointError(
                f"'{self.folder}' does not fit {type(self.backbone).__name__}:\n" + "\n".join(self.problems)
            )

    def _hint(self) -> str:
        """A guess at what the first unknown key means."""
        if not self.keys.unknown:
            return ""
        known = [path for path, _ in self.backbone.named_modules() if path] + list(self.parameters)
        made_on = self.data.get("backbone_class")
        other = f" It was made on a {made_on}." if made_on and made_on != type(self.backbone).__name__ else ""
        tokens = self.keys.unknown[0].split(".")
        # Up to the first token that is not in the backbone.
        end = next((i for i in range(1, len(tokens)) if ".".join(tokens[:i]) not in known), len(tokens))
        return other + near(".".join(tokens[:end]), known)
