"""Loads a saved delta: its params, and the DeltaModel that its configs describe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .files import checkpoint
from .files.configfile import warn_if_newer
from .files.hub import CONFIG
from .methods.config import BaseDeltaConfig, configs_of
from .model import DeltaModel


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

    ``overrides`` change fields of the saved config, and ``delta_config`` replaces it; constants that depend on a
    changed field (LoRA's scale on ``lora_alpha``) get their new values. The tensors of ``state_dict``, if given, are
    used instead of the saved ones; ``path`` then needs only a config. Leaves are put on ``device``, or on the device
    of their sites. ``example`` and ``prepare`` go to `DeltaModel`.

    Raises `CheckpointError` if anything is missing, left over, damaged or of another shape. Unless
    ``check_hash=False``, it is also raised if the backbone's fingerprint differs from the saved one or cannot be
    compared with it. Warns if a newer funcdelta than the installed one wrote the files.

    >>> import tempfile
    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 4)), lora_r=2, modified_modules=["0"])
    >>> folder = delta.save_finetuned(delta.init(0, n=3), tempfile.mkdtemp() + "/run")
    >>> loaded, stack = load(folder, delta.backbone)
    >>> loaded.configs == delta.configs, fd.members(stack)
    (True, 3)
    """
    fetching: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
    fetching |= {"local_files_only": local_files_only, "token": token}
    found = checkpoint.load(path, backbone, check_hash=check_hash, state_dict=state_dict, **fetching)
    saved = configs_of(str(found.folder / CONFIG), found.data, provenance=False)
    configs = changed(found.folder, saved, delta_config, overrides)
    delta = DeltaModel(backbone, *configs, example=example, prepare=prepare)
    checkpoint.check_fixed(found, delta.plan.fixed)
    params = checkpoint.fitted(found, backbone, delta.shapes, device)
    if configs != saved:
        _renew_constants(DeltaModel(backbone, *saved, example=example, prepare=prepare), delta, params)
    warn_if_newer(str(path), found.data)
    return delta, params


def changed(
    folder: Path,
    saved: tuple[BaseDeltaConfig, ...],
    config: BaseDeltaConfig | Sequence[BaseDeltaConfig] | None,
    overrides: Mapping[str, Any],
) -> tuple[BaseDeltaConfig, ...]:
    """The configs to load with: ``config`` if given, else the saved ones, with the fields of ``overrides``.

    >>> changed(Path("run"), (BaseDeltaConfig(),), None, {"batch_dim": 1})[0].batch_dim
    1
    """
    configs = saved if config is None else (config,) if isinstance(config, BaseDeltaConfig) else tuple(config)
    if not overrides:
        return configs
    if len(configs) != 1:
        raise CheckpointError(
            f"'{folder}' has {len(configs)} configs, so it is unclear which of them should get the new "
            f"{', '.join(overrides)}: pass delta_config=[...] with all of them."
        )
    return (configs[0].replace(**overrides),)


def _renew_constants(before: DeltaModel, after: DeltaModel, params: dict[str, Tensor]) -> None:
    """Update, in every member, the constants whose initial values differ under the changed configs."""
    old, new = before.init(0), after.init(0)
    for name in after.constants:
        if name not in old or not torch.equal(old[name], new[name]):
            params[name] = new[name].to(params[name]).expand_as(params[name]).clone()
