"""Reads a LoRA that PEFT saved: every tensor of the file finds its place, and the keys say where the delta acts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...deltas import LoraConfig
from ...errors import CheckpointError
from ...files.checkpoint import home
from ...match import exactly, explicit, near
from ...model import DeltaModel
from ..files import module_paths, some
from . import experts
from .folder import CONFIG, find_folder, read_config, read_weights
from .keys import Key, split_all
from .pieces import Piece, Places
from .renamed import KeyMap, here, mapped
from .settings import Settings, settings_of
from .values import trained_leaves

COMPAT = "peft"


def load_peft(
    path: str | os.PathLike[str],
    backbone_model: nn.Module,
    *,
    compat: str | None = None,
    key_map: KeyMap | None = None,
    device: torch.device | str | None = None,
    fetching: Mapping[str, Any] | None = None,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """``(delta, params)`` of a folder (or hub id) with a LoRA that PEFT wrote, of any version.

    The keys of the file say where the delta acts and its tensors have the ranks; of ``adapter_config.json`` the scales
    are read. Sites of one rank and alpha share a config. Tensors of the backbone that were trained with it
    (``modules_to_save``, ``bias``) are trained leaves. Names that Transformers has changed since are found.

    Args:
        compat: ``"peft"`` gives PEFT's own number where that is a mistake (it adds the change of the output projection
            of ``torch.nn.MultiheadAttention`` twice); by default the delta is computed right.
        key_map: what modules of the file are called in your backbone: ``{regular expression: replacement}``, or a
            function of the name.
        device: where the leaves go; by default, where the backbone's tensors at their site are.
        fetching: arguments of ``huggingface_hub.snapshot_download`` for a hub id.

    Raises `CheckpointError` for tensors that find no place, and by name for what is no plain LoRA.

    >>> import tempfile
    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> params = fd.tree.randn_like(delta.init(0), seed=1) | {"0.lora.scale": torch.tensor(8.0)}
    >>> again, loaded = fd.load_peft(fd.save_peft(delta, params, tempfile.mkdtemp() + "/run"), backbone)
    >>> again.sites, all(torch.equal(loaded[name], params[name]) for name in delta.names)
    (('0',), True)
    """
    folder = find_folder(path, **(fetching or {}))
    data = read_config(folder)
    settings = settings_of(str(folder / CONFIG), data)  # which refuses what has no tensors of a LoRA
    return _read(settings, read_weights(folder), backbone_model, compat, key_map, device)


def from_peft(
    config: Any,
    state_dict: Mapping[str, Tensor],
    backbone_model: nn.Module,
    *,
    compat: str | None = None,
    key_map: KeyMap | None = None,
    device: torch.device | str | None = None,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """The same from what is in memory: a config (PEFT's, or a dict of its fields) and ``get_peft_model_state_dict``.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> factors = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(8, 2)}
    >>> delta, params = fd.interop.from_peft({"peft_type": "LORA", "lora_alpha": 4}, factors, backbone)
    >>> params["0.lora.scale"]
    tensor(2.)
    """
    data = config if isinstance(config, Mapping) else config.to_dict()
    cpu = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    return _read(settings_of("the config", data), cpu, backbone_model, compat, key_map, device)


def _read(
    settings: Settings,
    tensors: Mapping[str, Tensor],
    backbone: nn.Module,
    compat: str | None,
    key_map: KeyMap | None,
    device: torch.device | str | None,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    if compat not in (None, COMPAT):
        raise CheckpointError(f'compat={compat!r}: write compat="{COMPAT}", or leave it out.')
    where = settings.where
    found = _Located(backbone, split_all(tensors), key_map)
    places = Places(backbone, tensors, settings, compat == COMPAT)
    problems = [("that find no place in the backbone", [key.raw for key in found.lost], found.hint())]
    if found.lost:
        _stop(where, backbone, problems)
    pieces = [piece for at, by_depth in found.factors.items() for piece in places.at(*at, by_depth)]
    pieces += [piece for at, each in found.experts.items() for piece in places.of_experts(*at, each)]
    trained, more = trained_leaves(backbone, found.values, tensors, settings.saved, settings.tied)
    if more:
        _stop(where, backbone, more)
    if not pieces:
        raise CheckpointError(f"'{where}' stands beside no factor of a LoRA (lora_A, lora_B): nothing to read.")
    settings.warn_of_overlaps([piece.name for piece in pieces])
    return _built(backbone, pieces, trained, settings, device)


class _Located:
    """The keys of a file, each at its place in the backbone.

    Attributes:
        factors: ``{(module, its name in the file): {depth: {factor: key}}}``.
        experts: ``{(module, its name in the file): {(expert, layer): {factor: key}}}`` of former modules.
        values: ``{name of a backbone tensor: key}``.
        lost: keys without a place.
    """

    def __init__(self, backbone: nn.Module, keys: Sequence[Key], key_map: KeyMap | None) -> None:
        self.modules = dict(backbone.named_modules(remove_duplicate=False))
        self.tensors = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
        self.tensors |= {name for name, _ in backbone.named_buffers(remove_duplicate=False)}
        self.factors: dict[tuple[str, str], dict[int, dict[str, Key]]] = {}
        self.experts: dict[tuple[str, str], dict[tuple[int, str], dict[str, Key]]] = {}
        self.values: dict[str, Key] = {}
        self.lost: list[Key] = []
        self.called: dict[str, str] = {}
        twice: list[str] = []
        for key in keys:
            name = mapped(key.path, key_map)
            place = here(name, self._takes_factors if key.factor else self.tensors.__contains__)
            if place is None:
                self.lost.append(key)
            elif key.factor:
                group = self._group(place, key)
                twice += [key.raw] if key.factor in group else []
                group[key.factor] = key
            elif place in self.values and not self.values[place].copied:
                twice += [] if key.copied else [key.raw]  # original_module beside what was trained
            else:
                self.values[place] = key
        if twice:
            raise CheckpointError(f"{len(twice)} tensors mean what another of the file means, too: {some(twice)}.")

    def hint(self) -> str:
        """What the first key without a place may have meant."""
        if not self.lost:
            return ""
        key = self.lost[0]
        known = [path for path in self.modules if path] if key.factor else sorted(self.tensors)
        return (
            f"{near(key.path, known)} If your backbone calls its modules otherwise, say how: "
            f'key_map={{r"^their\\.beginning": "your.beginning"}}.'
        )

    def _group(self, place: str, key: Key) -> dict[str, Key]:
        if self.called.setdefault(place, key.path) != key.path:
            raise CheckpointError(
                f"{place}: the file has a LoRA for {self.called[place]} and one for {key.path}, which both mean it."
            )
        if place in self.modules:
            return self.factors.setdefault((place, key.path), {}).setdefault(key.depth, {})
        match = experts.SEPARATE.match(place)
        assert match is not None
        name = key.path.rsplit(".", 2)[0]
        group = self.experts.setdefault((match["holder"], name), {})
        return group.setdefault((int(match["expert"]), match["own"]), {})

    def _takes_factors(self, name: str) -> bool:
        """Whether there is a module called so, or one that holds as parameters what was such a module."""
        if name in self.modules:
            return bool(name)
        match = experts.SEPARATE.match(name)
        return match is not None and f"{match['holder']}.{experts.FUSED[match['own']]}" in self.tensors


def _built(
    backbone: nn.Module,
    pieces: Sequence[Piece],
    trained: Mapping[str, Tensor],
    settings: Settings,
    device: torch.device | str | None,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """The delta with a config for each rank, alpha and dropout, and its params."""
    known = module_paths(backbone)
    known += [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    groups: dict[tuple[int, float, float], list[str]] = {}
    order = {name: position for position, name in enumerate(known)}
    for piece in sorted(pieces, key=lambda piece: order[piece.address]):
        groups.setdefault((piece.rank, piece.alpha, piece.dropout), []).append(piece.address)
    configs = [
        LoraConfig(
            lora_r=rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=dropout,
            use_rslora=settings.use_rslora,
            modified_modules=explicit(addresses, known),
        )
        for (rank, alpha, dropout), addresses in groups.items()
    ]
    if trained:
        configs[0] = configs[0].replace(unfrozen_modules=("deltas", *map(exactly, trained)))
    delta = DeltaModel(backbone, *configs)
    fresh = delta.init(0)
    modules = dict(backbone.named_modules(remove_duplicate=False))
    by_address = {_canonical(modules, backbone, piece.address): piece for piece in pieces}
    params: dict[str, Tensor] = dict(trained)
    for attachment in delta.plan.all():
        piece = by_address[attachment.site.address]
        own = {"lora_A": piece.a, "lora_B": piece.b}
        params |= {key: own.get(leaf, fresh[key]) for leaf, key in attachment.leaves.items()}

    def settled(name: str) -> Tensor:
        leaf = params[name].to(device or home(backbone, name), fresh[name].dtype)
        return leaf.clone(memory_format=torch.contiguous_format)

    return delta, {name: settled(name) for name in delta.names}


def _canonical(modules: Mapping[str, nn.Module], backbone: nn.Module, address: str) -> str:
    """The address under the first path of its module, where the backbone has one under several."""
    first = {id(module): path for path, module in backbone.named_modules()}
    if address in modules:
        return first[id(modules[address])]
    path, _, own = address.rpartition(".")
    return f"{first[id(modules[path])]}.{own}"


def _stop(where: str, backbone: nn.Module, problems: Sequence[tuple[str, list[str], str]]) -> None:
    lines = [f"{len(names)} {what}: {some(names)}.{hint}" for what, names, hint in problems if names]
    raise CheckpointError(f"The tensors beside '{where}' do not fit {type(backbone).__name__}:\n" + "\n".join(lines))
