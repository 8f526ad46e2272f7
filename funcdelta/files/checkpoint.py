"""Saves params beside the configs of their delta, and loads them strictly.

A saved delta is a folder of two files. ``config.json`` has OpenDelta's field names (several configs stand as
``{"delta_type": "union", "deltas": [...]}``), ``members`` (null for one member) and the backbone's
fingerprint. ``delta.safetensors`` has one tensor a leaf under its name in params, of one member or of a whole
stack; its metadata has the configs again, a checksum and a short description of the backbone, so that files
of two saves, a damaged file and another backbone are told apart.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import BaseDeltaConfig, funcdelta_version
from ..errors import CheckpointError, ParamsError
from .atomic import replace_folder
from .configfile import (
    PROVENANCE,
    changed,
    check_same_save,
    configs_of,
    newer,
    parse_config,
    read_config,
    storable,
    warn_if_newer,
    write_config,
)
from .fingerprint import differences, survey
from .hub import CONFIG, TENSORS, check_repository, config_text_at, locate, upload
from .tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from ..model import DeltaModel

__all__ = ["backbone_facts", "check_origin", "home", "load", "push", "save"]

_SHOWN = 5
KIND_OF_HASH = "fd1:"
_HASH_OF_OPENDELTA = re.compile(r"[0-9a-f]{32}")


def save(
    delta: DeltaModel,
    params: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    hash_backbone: bool = True,
    push_to_hub: bool | str = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    temp_dir: bool = False,
) -> Path:
    """The folder ``path`` with ``delta`` and ``params`` (one member or a stack), replaced as a whole.

    Each leaf is stored with its own dtype and shape, detached and contiguous. Other files in the folder stay.
    A kill leaves what was there before. With ``push_to_hub`` the two files are uploaded after that, to the
    repository of that name (``True``: the name of the folder). ``hash_backbone=False`` writes no fingerprint,
    for a backbone without readable bytes. ``temp_dir`` is OpenDelta's: an upload never needs a clone at ``path``, so
    that both values do the same.

    Returns the folder. Raises `ParamsError` unless the names are those of ``delta.names`` and the shapes
    those of ``delta.shapes``, all with the same member axis or all without.

    >>> import tempfile
    >>> import funcdelta as fd
    >>> backbone = nn.Sequential(nn.Linear(4, 4))
    >>> delta = fd.DeltaModel(backbone, fd.LoraConfig(lora_r=2, modified_modules=["0"]))
    >>> folder = save(delta, delta.init(0, n=3), tempfile.mkdtemp() + "/run")
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'delta.safetensors']
    """
    members = _check_params(delta, params)
    backbone_hash, description = survey(delta.backbone, delta.names) if hash_backbone else (None, None)
    configs = [storable(config) for config in delta.configs]
    about = {
        **backbone_facts(delta.backbone),
        "backbone_hash": backbone_hash,
        "members": members,
        "funcdelta_version": funcdelta_version(),
    }
    metadata = {
        "members": json.dumps(members),
        "configs": json.dumps(configs),
        "backbone": json.dumps(description),
    }

    def write(folder: Path) -> None:
        write_tensors(folder / TENSORS, {name: params[name] for name in delta.names}, metadata)
        write_config(folder / CONFIG, configs, about)

    folder = replace_folder(path, write, carry=True)
    if push_to_hub:
        repository = folder.name if push_to_hub is True else push_to_hub
        said = f"{folder} is saved, but "
        upload(folder, repository, so_far=said, private=private, token=token, commit_message=commit_message)
    return folder


def push(
    delta: DeltaModel, params: Mapping[str, Tensor], repository: str, *, hash_backbone: bool = True, **creating: Any
) -> str:
    """Saves to a temporary folder and uploads it to the hub repository ``"user/name"``; returns its full name.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Raises `CheckpointError` like
    :func:`funcdelta.files.hub.upload`, before anything is written where the name is none.

    >>> push(None, {}, "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is no name of a hub repository: write "user/name".
    """
    check_repository(repository)
    with tempfile.TemporaryDirectory() as kept:
        folder = save(delta, params, Path(kept) / "delta", hash_backbone=hash_backbone)
        return upload(folder, repository, so_far="Nothing is saved here, and ", **creating)


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    check_hash: bool = True,
    delta_config: BaseDeltaConfig | Sequence[BaseDeltaConfig] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    example: Any = None,
    prepare: Any = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **overrides: Any,
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """``(delta, params)`` as saved at ``path``, a folder or a hub id: one member or a stack, bit for bit.

    ``overrides`` change fields of the saved config, and ``delta_config`` takes its place; constants that depend on
    a changed field (LoRA's scale on ``lora_alpha``) get their new value. With ``state_dict`` its tensors are taken
    instead of the saved ones, and ``path`` needs no more than a config. Leaves are put on ``device``, or
    where the backbone's tensors at their site are. ``example`` and ``prepare`` go to `DeltaModel`.

    Raises `CheckpointError` when anything is missing, left over, damaged or of another shape, or, unless
    ``check_hash=False``, when the backbone's fingerprint is not the saved one or cannot be compared with it; it names
    what differs. Warns where a newer funcdelta than the installed one wrote the files.

    >>> import tempfile
    >>> import funcdelta as fd
    >>> backbone = nn.Sequential(nn.Linear(4, 4))
    >>> delta = fd.DeltaModel(backbone, fd.LoraConfig(lora_r=2, modified_modules=["0"]))
    >>> folder = save(delta, delta.init(0, n=3), tempfile.mkdtemp() + "/run")
    >>> loaded, stack = load(folder, backbone)
    >>> loaded.configs == delta.configs, fd.members(stack)
    (True, 3)
    """
    from ..model import DeltaModel

    fetching: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
    fetching |= {"local_files_only": local_files_only, "token": token}
    if state_dict is None:
        folder = locate(path, **fetching)
        data = read_config(folder / CONFIG)
        tensors, metadata = read_tensors(folder / TENSORS)
        check_same_save(folder, data, metadata)
    else:
        where, text = config_text_at(path, **fetching)
        folder, data, tensors, metadata = Path(where).parent, parse_config(where, text), dict(state_dict), {}
        data.pop("members", None)
    if check_hash:
        _check_backbone(f"'{path}'", data, metadata, backbone, tensors)
    saved = configs_of(str(folder / CONFIG), data, provenance=False)
    configs = changed(folder, saved, delta_config, overrides)
    delta = DeltaModel(backbone, *configs, example=example, prepare=prepare)
    members, problems = _account(delta, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if not problems and members != data.get("members", members):
        problems = [f"members: {CONFIG} says {data['members']}, the leaves have {members}"]
    if problems:
        what = f"'{folder}' does not fit the delta that its config describes:\n"
        raise CheckpointError(what + "\n".join(problems) + newer(data))
    params = {name: tensors[name].to(device or home(backbone, name)) for name in delta.names}
    if configs != saved:
        before = DeltaModel(backbone, *saved, example=example, prepare=prepare)
        _renew_constants(before, delta, params)
    warn_if_newer(str(path), data)
    return delta, params


def _renew_constants(before: DeltaModel, after: DeltaModel, params: dict[str, Tensor]) -> None:
    """Gives constants whose initial value the changed config changes that value, in every member."""
    old, new = before.init(0), after.init(0)
    for name in after.constants:
        if name not in old or not torch.equal(old[name], new[name]):
            params[name] = new[name].to(params[name]).expand_as(params[name]).clone()


# --- the leaves ------------------------------------------------------------------------------------


def _check_params(delta: DeltaModel, params: Mapping[str, Tensor]) -> int | None:
    if not isinstance(params, Mapping) or not all(isinstance(leaf, Tensor) for leaf in params.values()):
        raise ParamsError(
            "save: expected params, a dict of tensors by name as delta.init gives it: "
            "write delta.save_finetuned(params, path)."
        )
    members, problems = _account(delta, {name: tuple(leaf.shape) for name, leaf in params.items()})
    if problems:
        raise ParamsError(
            "save: the params are not those of the delta:\n"
            + "\n".join(problems)
            + "\nSave the delta's own leaves only: {name: params[name] for name in delta.names}."
        )
    return members


def _account(delta: DeltaModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, list[str]]:
    """How many members the shapes have (None: one, without an axis), and all that does not fit, in words."""
    missing = [name for name in delta.names if name not in shapes]
    unexpected = sorted(set(shapes) - set(delta.names))
    wrong, counts = [], {}
    for name in delta.names:
        expected, found = tuple(delta.shapes[name]), shapes.get(name)
        if found == expected:
            counts.setdefault(None, name)
        elif found is not None and found[1:] == expected and len(found) == len(expected) + 1:
            counts.setdefault(found[0], name)
        elif found is not None:
            stacked = ", ".join(map(str, ("n", *expected)))
            wrong.append(f"{name} (expected {expected} or ({stacked}), found {found})")
    problems = []
    found = {"missing": missing, "not known to the delta": unexpected, "of another shape": wrong}
    for kind, names in found.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
    if len(counts) > 1:
        each = (f"{name} has {'no member axis' if n is None else f'{n} members'}" for n, name in counts.items())
        problems.append(f"unlike numbers of members: {', '.join(each)}")
    return next(iter(counts), None), problems


def home(backbone: nn.Module, leaf: str) -> torch.device:
    """The device of the backbone's tensors at the leaf's site, or of the nearest module around it.

    >>> home(nn.Linear(2, 2), "lora.lora_A")
    device(type='cpu')
    """
    path = leaf
    while True:
        path, _, name = path.rpartition(".")
        try:
            module = backbone.get_submodule(path)
        except AttributeError:
            continue
        own = getattr(module, name, None)
        tensors = [own] if isinstance(own, Tensor) else module.parameters()
        for tensor in tensors:
            return torch.device("cpu") if tensor.is_meta else tensor.device
        if not path:
            return torch.device("cpu")


# --- the backbone ----------------------------------------------------------------------------------


def backbone_facts(backbone: nn.Module) -> dict[str, Any]:
    """What a saved config says of the backbone: its class, where it came from, and the version that ran it.

    >>> backbone_facts(nn.Linear(2, 2))["backbone_class"]
    'Linear'
    """
    return {
        "backbone_class": type(backbone).__name__,
        "backbone_checkpoint_name": _checkpoint_name(backbone),
        "transformers_version": _transformers_version(),
    }


def _checkpoint_name(backbone: nn.Module) -> str:
    name = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "")
    # A folder's place says nothing on another machine; a hub id does.
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def _transformers_version() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_origin(config: BaseDeltaConfig, delta: DeltaModel) -> None:
    """Raises `CheckpointError` if ``config`` was saved with another backbone than that of ``delta``.

    OpenDelta's hashes are of other things and are passed over; a hash of any other kind cannot be checked, and raises.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 4)), modified_modules=["0"])
    >>> check_origin(delta.configs[0], delta)
    """
    data = {key: getattr(config, key) for key in PROVENANCE}
    _check_backbone("The config", data, {}, delta.backbone, delta.shapes)


def _check_backbone(
    what: str,
    data: Mapping[str, Any],
    metadata: Mapping[str, str],
    backbone: nn.Module,
    replaced: Iterable[str],
) -> None:
    saved = data.get("backbone_hash")
    if saved is None or _HASH_OF_OPENDELTA.fullmatch(saved):  # saved with hash_backbone=False, or by OpenDelta
        return
    if not saved.startswith(KIND_OF_HASH):
        raise CheckpointError(
            f"{what} has backbone_hash={saved!r}, which cannot be compared: expected a hash that begins with "
            f"{KIND_OF_HASH!r}. Save or fetch it again, or pass check_hash=False if you know that this is its backbone."
            f"{newer(data)}"
        )
    found, description = survey(backbone, replaced)
    if found == saved:
        return
    lines = [f"expected {saved}", f"found    {found}"]
    names = data.get("backbone_class"), type(backbone).__name__
    if names[0] != names[1]:
        lines.append(f"its class was {names[0]}, this one is a {names[1]}")
    stored = json.loads(metadata.get("backbone", "null"))
    if stored is not None:
        lines += differences(stored, description).splitlines()
    origin = f" ({data['backbone_checkpoint_name']})" if data.get("backbone_checkpoint_name") else ""
    raise CheckpointError(
        f"{what} was saved for another backbone{origin}:\n"
        + "\n".join(lines)
        + "\nLoad that backbone, or pass check_hash=False if you know that the difference does not matter."
    )
