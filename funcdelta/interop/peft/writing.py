"""Writes LoRA as PEFT reads it, one member a folder, and refuses what it would read as something else."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...deltas import LoraConfig
from ...errors import CheckpointError, ParamsError
from ...model import DeltaModel
from ...packing.packed import Packed
from ...run.checked import checks_of
from ..files import module_paths
from .factors import Written, settled, written_at
from .folder import write_folder
from .keys import PREFIX
from .reading import COMPAT
from .saved import Saved, saved_leaves

FORMAT_VERSION = "0.21.2"
"""The version of PEFT whose files these are."""
ELSEWHERE = "Save it here: delta.save_finetuned(params, path)."


def save_peft(
    delta: DeltaModel, params: Mapping[str, Tensor], path: str | os.PathLike[str], *, compat: str | None = None
) -> Path:
    """The folder ``path`` with ``adapter_config.json`` and ``adapter_model.safetensors``, for one member of LoRA.

    ``PeftModel.from_pretrained(backbone, path)`` computes what the delta does. Sites are written as whole paths, so
    that no other module is meant and the order of patterns does not matter. Other files in the folder stay.

    Args:
        compat: ``"peft"`` writes output projections of ``torch.nn.MultiheadAttention``, whose change PEFT adds twice;
            :func:`load_peft` with the same ``compat`` reads them back.

    Raises `CheckpointError` for what PEFT cannot hold, saying what to write instead.

    >>> import tempfile
    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> folder = fd.save_peft(delta, delta.init(0), tempfile.mkdtemp() + "/run")
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    return write_folder(path, *to_peft(delta, params, compat=compat))


def to_peft(
    delta: DeltaModel, params: Mapping[str, Tensor], *, compat: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same in memory: the fields of ``adapter_config.json``, and the tensors by their key.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> config, state_dict = fd.interop.to_peft(delta, delta.init(0))
    >>> config["target_modules"], list(state_dict)
    (['0'], ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight'])
    """
    _check(delta, params, compat)
    sites: dict[str, Written] = {}
    for attachment in delta.plan.all():
        if attachment.site.address in sites:
            raise CheckpointError(
                f"{attachment.site.address} has two LoRAs, and PEFT has one a module: put them together first, with "
                f"fd.algebra, or save each by itself, fd.DeltaModel(backbone, config). {ELSEWHERE}"
            )
        made = written_at(delta.backbone, attachment, attachment.of(params), compat == COMPAT)
        sites[attachment.site.address] = made
    written = settled(delta.backbone, list(sites.values()))
    saved = saved_leaves(delta, params, [one.module for one in written if one.owns_rank])
    tensors = {key: tensor for one in written for key, tensor in one.tensors().items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.tensors.items()}
    return _fields(delta, written, saved), tensors


def _check(delta: DeltaModel, params: Mapping[str, Tensor], compat: str | None) -> None:
    """Raise for what is not one member of LoRA alone."""
    if compat not in (None, COMPAT):
        raise CheckpointError(f'compat={compat!r}: write compat="{COMPAT}", or leave it out.')
    if any(isinstance(config, Packed) for config in delta.configs):
        raise CheckpointError(
            "This delta holds unlike members in one stack, which PEFT cannot read: save the pairs that "
            "fd.unpack(delta, stack) gives, each in a folder of its own."
        )
    others = sorted({config.delta_type for config in delta.configs if type(config) is not LoraConfig})
    if others:
        raise CheckpointError(f"PEFT's files hold LoRA alone here, and this delta has {', '.join(others)}. {ELSEWHERE}")
    if checks_of(delta).is_stack(params):
        raise CheckpointError(
            "These params are a stack, and a folder of PEFT holds one member: save fd.take(stack, 0), or each of "
            "fd.unstack(stack) in a folder of its own."
        )
    lacking = [name for name in delta.names if name not in params]
    if lacking:
        raise ParamsError(f"save_peft: {len(lacking)} leaves are missing, first {lacking[0]}: give all of the delta.")


def _fields(delta: DeltaModel, written: Sequence[Written], saved: Saved) -> dict[str, Any]:
    """The fields of ``adapter_config.json``."""
    paths = module_paths(delta.backbone)
    modules = list(dict.fromkeys(one.module for one in written if not one.parameter))
    parameters = [one.name for one in written if one.parameter]
    turned = [one.name for one in written if one.turned]
    if turned and parameters:
        raise CheckpointError(
            f"PEFT takes no LoRA on Conv1D ({turned[0]}) beside parameters ({parameters[0]}) in one adapter: save them "
            f"apart, fd.DeltaModel(backbone, config). {ELSEWHERE}"
        )
    rslora = all(config.use_rslora for config in delta.configs if isinstance(config, LoraConfig))
    ranks = {one.pattern(paths): one.rank for one in written if one.owns_rank}
    alphas = {one.pattern(paths): one.alpha(rslora) for one in written if one.owns_rank}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "peft_version": FORMAT_VERSION,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(delta.backbone, "config", None), "_name_or_path", "") or None,
        "auto_mapping": None,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "use_rslora": rslora,
        "lora_dropout": _dropout(written),
        "target_modules": _targets(modules, paths),
        "target_parameters": parameters or None,
        "modules_to_save": list(saved.modules) or None,
        "bias": saved.bias,
        "fan_in_fan_out": len(turned) == len(written),
        "init_lora_weights": True,
    }


def _targets(modules: Sequence[str], paths: Sequence[str]) -> list[str] | str:
    """``target_modules`` that mean exactly these modules: whole paths, or where others end alike, one regex."""
    if all(path in modules or not path.endswith(f".{one}") for one in modules for path in paths):
        return list(modules)
    return "|".join(map(re.escape, modules))


def _dropout(written: Sequence[Written]) -> float:
    """The one ``lora_dropout`` of all sites."""
    found = sorted({one.dropout for one in written})
    if len(found) > 1:
        raise CheckpointError(
            f"PEFT has one lora_dropout for all modules, and this delta has {', '.join(map(str, found))}: it changes "
            f"training alone, so write the configs with one, config.replace(lora_dropout={found[0]})."
        )
    return found[0]
