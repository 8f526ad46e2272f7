"""Saves params together with the configs of their delta, and loads them strictly.

A saved delta is a folder of two files. ``config.json`` has OpenDelta's field names (several configs are
``{"delta_type": "union", "deltas": [...]}``), ``members`` (null for one member) and the backbone's fingerprint.
``delta.safetensors`` has one tensor per leaf under its name in params, of one member or of a whole stack. Its metadata
repeats the configs and has a checksum and a short description of the backbone, to detect files of different saves, a
damaged file and another backbone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ParamsError, shown
from ..trees.leaves import check_leaves
from .atomic import replace_folder
from .configfile import check_same_save, data_at, funcdelta_version, newer, read_config, write_config
from .fingerprint import differences, survey
from .hub import CONFIG, TENSORS, check_repository, locate, upload
from .resumable import SAYS_WHAT_IT_IS, write_resumable
from .tensorfile import read_tensors, write_tensors

__all__ = ["Facts", "Saved", "backbone_facts", "check_backbone", "fitted", "home", "load", "push", "save"]

_SHOWN = 5
FIXED = "fixed:"
"""Prefix, in the file of tensors, of the name of a tensor that all members share."""
KIND_OF_HASH = "fd1:"
_HASH_OF_OPENDELTA = re.compile(r"[0-9a-f]{32}")


class Facts(NamedTuple):
    """What is saved of a delta besides params.

    Attributes:
        configs: from :func:`funcdelta.files.configfile.storable`.
        backbone: the delta's backbone.
        shapes: the shape of every leaf of one member, in the order of params.
        fixed: tensors that all members share, by key; they are saved once.
    """

    configs: Sequence[Mapping[str, Any]]
    backbone: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, Tensor] = {}


class Saved(NamedTuple):
    """A saved delta as read: its folder, the data of ``config.json``, and its tensors by name.

    ``fixed`` has the tensors that all members share.
    """

    folder: Path
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    fixed: Mapping[str, Tensor] = {}


def save(
    facts: Facts,
    params: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    hash_backbone: bool = True,
    push_to_hub: bool | str = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    temp_dir: bool = False,
    resumable: bool = False,
) -> Path:
    """Write the configs and ``params`` (one member or a stack) to the folder ``path``, replacing it as a whole.

    Each leaf is stored with its own dtype and shape, detached and contiguous. Other files in the folder stay. If the
    process is killed, the old folder stays intact. With ``push_to_hub`` the two files are then uploaded to the
    repository of that name (``True``: the name of the folder). ``hash_backbone=False`` writes no fingerprint, for a
    backbone without readable bytes. ``temp_dir``, an option of OpenDelta's, has no effect. With ``resumable`` other
    programs may write into the folder as well, and Transformers' Trainer can resume from it (see
    :mod:`funcdelta.files.resumable`).

    Returns the folder. Raises `ParamsError` unless names and shapes are those of ``facts.shapes``, all with the same
    member axis or all without. One member's params may include buffers of the backbone (learned statistics).

    >>> import tempfile
    >>> facts = Facts([{"delta_type": "bitfit"}], nn.Sequential(nn.Linear(4, 2)), {"0.bitfit.bias": (2,)})
    >>> folder = save(facts, {"0.bitfit.bias": torch.zeros(3, 2)}, tempfile.mkdtemp() + "/run")
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'delta.safetensors']
    """
    configs, backbone = facts.configs, facts.backbone
    check_leaves(params, "save")
    shapes = with_buffers(facts.shapes, backbone, params)
    members = _check_params(shapes, params)
    backbone_hash, description = survey(backbone, shapes) if hash_backbone else (None, None)
    about = {
        **backbone_facts(backbone),
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
        fixed = {FIXED + name: tensor for name, tensor in facts.fixed.items()}
        write_tensors(folder / TENSORS, {name: params[name] for name in shapes} | fixed, metadata)
        write_config(folder / CONFIG, configs, about)

    if resumable:
        about |= SAYS_WHAT_IT_IS
    folder = write_resumable(path, write) if resumable else replace_folder(path, write, carry=True)
    if push_to_hub:
        repository = folder.name if push_to_hub is True else push_to_hub
        said = f"{folder} is saved, but "
        upload(folder, repository, so_far=said, private=private, token=token, commit_message=commit_message)
    return folder


def push(
    facts: Facts, params: Mapping[str, Tensor], repository: str, *, hash_backbone: bool = True, **creating: Any
) -> str:
    """Save to a temporary folder and upload it to the hub repository ``"user/name"``; returns its full name.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Raises `CheckpointError` as
    :func:`funcdelta.files.hub.upload` does; if the name is invalid, before anything is written.

    >>> push(Facts([], nn.Linear(4, 2), {}), {}, "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is not the name of a hub repository: write "user/name".
    """
    check_repository(repository)
    with tempfile.TemporaryDirectory() as kept:
        folder = save(facts, params, Path(kept) / "delta", hash_backbone=hash_backbone)
        return upload(folder, repository, so_far="Nothing is saved here, and ", **creating)


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    check_hash: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **fetching: Any,
) -> Saved:
    """Read what was saved at ``path``, a folder or a hub id; if ``state_dict`` is given, only the config is read.

    ``fetching`` goes to :func:`funcdelta.files.hub.locate`. Raises `CheckpointError` if anything is missing or damaged.
    Unless ``check_hash=False``, it is also raised, with the differences, if the fingerprint of ``backbone`` is not the
    saved one or cannot be compared with it.

    >>> import tempfile
    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(4, 2)), modified_modules=["0"])
    >>> folder = delta.save_finetuned(delta.init(0, n=3), tempfile.mkdtemp() + "/run")
    >>> saved = load(folder, delta.backbone)
    >>> saved.data["members"], saved.tensors["0.bitfit.bias"].shape
    (3, torch.Size([3, 2]))
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"path must be a folder or a hub id; found {type(path).__name__}.")
    if state_dict is None:
        folder = locate(path, **fetching)
        data = read_config(folder / CONFIG)
        tensors, metadata = read_tensors(folder / TENSORS)
        check_same_save(folder, data, metadata)
    else:
        check_leaves(state_dict, "state_dict")
        where, data = data_at(path, **fetching)
        folder, tensors, metadata = Path(where).parent, dict(state_dict), {}
        data.pop("members", None)
    if check_hash:
        check_backbone(f"'{path}'", data, metadata, backbone, tensors)
    fixed = {name.removeprefix(FIXED): t for name, t in tensors.items() if name.startswith(FIXED)}
    return Saved(folder, data, {name: t for name, t in tensors.items() if not name.startswith(FIXED)}, fixed)


def fitted(
    saved: Saved,
    backbone: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The tensors as params of a delta whose leaves have these ``shapes``: one member or a stack, bit for bit.

    Leaves are put on ``device``, or on the device of their sites in ``backbone``. Raises `CheckpointError` if anything
    is missing, left over or of another shape.

    >>> saved = Saved(Path("run"), {"delta_type": "bitfit", "members": 3}, {"bitfit.bias": torch.zeros(3, 2)})
    >>> fitted(saved, nn.Linear(4, 2), {"bitfit.bias": (2,)})["bitfit.bias"].shape
    torch.Size([3, 2])
    >>> fitted(saved, nn.Linear(4, 5), {"bitfit.bias": (5,)})
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'run' does not fit the delta that its config describes:
    1 of another shape: bitfit.bias (expected (5,) or (n, 5), found (3, 2))
    """
    data, shapes = saved.data, with_buffers(shapes, backbone, saved.tensors)
    members, problems = _account(shapes, {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()})
    if not problems and members != data.get("members", members):
        problems = [f"members: {CONFIG} says {data['members']}, but the leaves have {members}"]
    if problems:
        what = f"'{saved.folder}' does not fit the delta that its config describes:\n"
        raise CheckpointError(what + "\n".join(problems) + (newer(data) and f".{newer(data)}"))
    return {name: saved.tensors[name].to(device or home(backbone, name)) for name in shapes}


def check_fixed(saved: Saved, fixed: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the tensors that all members share are bit for bit the saved ones.

    They are drawn when a delta is built, from the config or from the backbone's weights, and members only fit those
    that they were trained with.
    """
    for name, tensor in saved.fixed.items():
        drawn = fixed.get(name)
        if drawn is None or drawn.shape != tensor.shape or not torch.equal(drawn.cpu(), tensor.to(drawn.dtype).cpu()):
            raise CheckpointError(
                f"'{saved.folder}' was trained with another {name} than this delta draws, so its members would compute "
                f"something else. Load it with the config and the backbone that it was saved with."
            )


# --- the leaves ------------------------------------------------------------------------------------


def with_buffers(
    shapes: Mapping[str, tuple[int, ...]], backbone: nn.Module, given: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """``shapes``, and the shapes of those buffers of the backbone that are among ``given``.

    >>> with_buffers({"0.bitfit.bias": (2,)}, nn.BatchNorm1d(4), ["0.bitfit.bias", "running_mean", "other"])
    {'0.bitfit.bias': (2,), 'running_mean': (4,)}
    """
    buffers = dict(backbone.named_buffers())
    return {**shapes, **{name: tuple(buffers[name].shape) for name in given if name in buffers and name not in shapes}}


def _check_params(shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, Tensor]) -> int | None:
    members, problems = _account(shapes, {name: tuple(leaf.shape) for name, leaf in params.items()})
    if problems:
        raise ParamsError(
            "save: the params do not fit the delta:\n"
            + "\n".join(problems)
            + "\nSave only the delta's leaves: {name: params[name] for name in delta.names}."
        )
    return members


def _account(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int | None, list[str]]:
    """The number of members (None: one, without an axis), and everything that does not fit, in words."""
    missing = [name for name in expected if name not in shapes]
    unexpected = sorted(set(shapes) - set(expected))
    wrong, counts = [], {}
    for name, shape in expected.items():
        found = shapes.get(name)
        if found == shape:
            counts.setdefault(None, name)
        elif found is not None and found[1:] == shape and len(found) == len(shape) + 1:
            counts.setdefault(found[0], name)
        elif found is not None:
            stacked = ", ".join(map(str, ("n", *shape)))
            wrong.append(f"{name} (expected {shape} or ({stacked}), found {found})")
    problems = []
    found = {"missing": missing, "not known to the delta": unexpected, "of another shape": wrong}
    for kind, names in found.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} {kind}: {', '.join(_short(name) for name in names[:_SHOWN])}{more}")
    if len(counts) > 1:
        each = (f"{name} has {'no member axis' if n is None else f'{n} members'}" for n, name in counts.items())
        problems.append(f"different numbers of members: {', '.join(each)}")
    return next(iter(counts), None), problems


def _short(name: str) -> str:
    return name if len(name) <= 200 else shown(name)


def home(backbone: nn.Module, leaf: str) -> torch.device:
    """The device of the backbone's tensors at the leaf's site, or of the closest module that contains it.

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
    """What a saved config says about the backbone: its class, its origin, and the version of Transformers.

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
    # A local path means nothing on another machine; a hub id does.
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def _transformers_version() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_backbone(
    what: str,
    data: Mapping[str, Any],
    metadata: Mapping[str, str],
    backbone: nn.Module,
    replaced: Iterable[str],
) -> None:
    """Raises `CheckpointError` if ``what``, with the fields ``data``, was saved with another backbone.

    ``metadata`` is that of the file of tensors; ``replaced`` names the backbone's tensors that params replace.
    OpenDelta's hashes cover other things and are ignored; any other kind of hash cannot be checked, and raises.
    """
    saved = data.get("backbone_hash")
    if saved is None or _HASH_OF_OPENDELTA.fullmatch(saved):  # saved with hash_backbone=False, or by OpenDelta
        return
    if not saved.startswith(KIND_OF_HASH):
        raise CheckpointError(
            f"{what} has backbone_hash={saved!r}, which cannot be checked: expected a hash that begins with "
            f"{KIND_OF_HASH!r}. Save or fetch it again, or pass check_hash=False if you know that this is its backbone."
            f"{newer(data)}"
        )
    found, description = survey(backbone, replaced)
    if found == saved:
        return
    lines = [f"expected {saved}", f"found    {found}"]
    names = data.get("backbone_class"), type(backbone).__name__
    if names[0] != names[1]:
        lines.append(f"its class was {names[0]}, but this one is a {names[1]}")
    stored = json.loads(metadata.get("backbone", "null"))
    if stored is not None:
        lines += differences(stored, description).splitlines()
    origin = f" ({data['backbone_checkpoint_name']})" if data.get("backbone_checkpoint_name") else ""
    raise CheckpointError(
        f"{what} was saved for another backbone{origin}:\n"
        + "\n".join(lines)
        + "\nUse that backbone, or pass check_hash=False if you know that the difference does not matter."
    )
