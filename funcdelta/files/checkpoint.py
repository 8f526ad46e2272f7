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
"""Before the name of a tensor that all members have together, in the file of tensors."""
KIND_OF_HASH = "fd1:"
_HASH_OF_OPENDELTA = re.compile(r"[0-9a-f]{32}")


class Facts(NamedTuple):
    """What is saved of a delta beside params.

    Attributes:
        configs: as :func:`funcdelta.files.configfile.storable` gives them.
        backbone: what the delta is for.
        shapes: of every leaf of one member, in their order.
        fixed: what all members have together, by key; it is saved once.
    """

    configs: Sequence[Mapping[str, Any]]
    backbone: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, Tensor] = {}


class Saved(NamedTuple):
    """What was found in a saved delta: the folder, the data of its ``config.json``, and its tensors by name.

    ``fixed`` is what all members have together.
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
    """The folder ``path`` with the configs and ``params`` (one member or a stack), replaced as a whole.

    Each leaf is stored with its own dtype and shape, detached and contiguous. Other files in the folder stay.
    A kill leaves what was there before. With ``push_to_hub`` the two files are uploaded after that, to the
    repository of that name (``True``: the name of the folder). ``hash_backbone=False`` writes no fingerprint,
    for a backbone without readable bytes. ``temp_dir`` is OpenDelta's: an upload never needs a clone at ``path``, so
    that both values do the same. With ``resumable`` the folder may be one that others write into as well, and
    Transformers' Trainer can resume from it (see :mod:`funcdelta.files.resumable`).

    Returns the folder. Raises `ParamsError` unless names and shapes are those of ``facts.shapes``, all with the same
    member axis or all without. Buffers of the backbone may be among one member's (statistics that a view has learned).

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
    """Saves to a temporary folder and uploads it to the hub repository ``"user/name"``; returns its full name.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Raises `CheckpointError` like
    :func:`funcdelta.files.hub.upload`, before anything is written where the name is none.

    >>> push(Facts([], nn.Linear(4, 2), {}), {}, "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is no name of a hub repository: write "user/name".
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
    """What was saved at ``path``, a folder or a hub id; with ``state_dict`` its tensors, and a config is enough.

    ``fetching`` goes to :func:`funcdelta.files.hub.locate`. Raises `CheckpointError` when anything is missing or
    damaged or, unless ``check_hash=False``, when the fingerprint of ``backbone`` is not the saved one or cannot be
    compared with it; it names what differs.

    >>> import tempfile
    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(4, 2)), modified_modules=["0"])
    >>> folder = delta.save_finetuned(delta.init(0, n=3), tempfile.mkdtemp() + "/run")
    >>> saved = load(folder, delta.backbone)
    >>> saved.data["members"], saved.tensors["0.bitfit.bias"].shape
    (3, torch.Size([3, 2]))
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"A saved delta is a folder or a hub id; found {type(path).__name__}.")
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

    Leaves are put on ``device``, or where the tensors of ``backbone`` at their site are. Raises `CheckpointError` when
    anything is missing, left over or of another shape.

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
        problems = [f"members: {CONFIG} says {data['members']}, the leaves have {members}"]
    if problems:
        what = f"'{saved.folder}' does not fit the delta that its config describes:\n"
        raise CheckpointError(what + "\n".join(problems) + newer(data))
    return {name: saved.tensors[name].to(device or home(backbone, name)) for name in shapes}


def check_fixed(saved: Saved, fixed: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless what all members have together is, bit for bit, what it was when they were saved.

    It is drawn when a delta is built, from the config or from the backbone's weights, and the members were trained
    with it.

    >>> check_fixed(Saved(Path("run"), {}, {}, {"vera.a": torch.ones(2)}), {"vera.a": torch.ones(2)})
    """
    for name, tensor in saved.fixed.items():
        drawn = fixed.get(name)
        if drawn is None or drawn.shape != tensor.shape or not torch.equal(drawn.cpu(), tensor.to(drawn.dtype).cpu()):
            raise CheckpointError(
                f"'{saved.folder}' was trained with another {name} than this delta draws: its members would compute "
                f"something else. Load it with the config and on the backbone that it was saved with."
            )


# --- the leaves ------------------------------------------------------------------------------------


def with_buffers(
    shapes: Mapping[str, tuple[int, ...]], backbone: nn.Module, given: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """``shapes`` with those of the backbone's buffers that are ``given`` beside the delta's leaves.

    >>> with_buffers({"0.bitfit.bias": (2,)}, nn.BatchNorm1d(4), ["0.bitfit.bias", "running_mean", "other"])
    {'0.bitfit.bias': (2,), 'running_mean': (4,)}
    """
    buffers = dict(backbone.named_buffers())
    return {**shapes, **{name: tuple(buffers[name].shape) for name in given if name in buffers and name not in shapes}}


def _check_params(shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, Tensor]) -> int | None:
    members, problems = _account(shapes, {name: tuple(leaf.shape) for name, leaf in params.items()})
    if problems:
        raise ParamsError(
            "save: the params are not those of the delta:\n"
            + "\n".join(problems)
            + "\nSave the delta's own leaves only: {name: params[name] for name in delta.names}."
        )
    return members


def _account(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int | None, list[str]]:
    """How many members the shapes have (None: one, without an axis), and all that does not fit, in words."""
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
        problems.append(f"unlike numbers of members: {', '.join(each)}")
    return next(iter(counts), None), problems


def _short(name: str) -> str:
    return name if len(name) <= 200 else shown(name)


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


def check_backbone(
    what: str,
    data: Mapping[str, Any],
    metadata: Mapping[str, str],
    backbone: nn.Module,
    replaced: Iterable[str],
) -> None:
    """Raises `CheckpointError` if ``what``, with the fields ``data``, was saved with another backbone.

    ``metadata`` is that of the tensors, ``replaced`` names those of ``backbone`` that params replace. OpenDelta's
    hashes are of other things and are passed over; a hash of any other kind cannot be checked, and raises.

    >>> check_backbone("The config", {"backbone_hash": None}, {}, nn.Linear(4, 4), [])
    """
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
