"""Reads and writes an OpenDelta folder: ``config.json``, and ``pytorch_model.bin`` without running its pickle."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files.atomic import replace_folder
from ...files.hub import CONFIG, fetch_folder
from ...files.tensorfile import read_tensors
from ..files import json_text, on_cpu, read_json, read_pickle

WEIGHTS = "pytorch_model.bin"
TENSORS_ALONE = f"save only the tensors: torch.save(model.state_dict(), '{WEIGHTS}')"


def read_folder(path: str | os.PathLike[str], **fetching: Any) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The folder, the data of its ``config.json``, and its tensors by key, on the CPU.

    ``path`` is a folder, its ``config.json``, or a hub id. Of a pickle, only plain tensors are read.

    >>> read_folder("no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: There is no folder 'no/such/folder'.
    """
    given = Path(path)
    folder = given.parent if given.name == CONFIG and given.is_file() else fetch_folder(path, [WEIGHTS], **fetching)
    names = sorted(entry.name for entry in folder.iterdir())
    safe = [name for name in names if name.endswith(".safetensors")]
    if CONFIG not in names or not (WEIGHTS in names or safe):
        raise CheckpointError(
            f"'{path}' is not a folder of OpenDelta: expected {CONFIG} and {WEIGHTS}, found "
            f"{', '.join(names[:5]) or 'nothing'}."
        )
    if WEIGHTS not in names and len(safe) > 1:
        raise CheckpointError(f"'{path}' has {', '.join(safe)}: keep only the one that holds the delta.")
    data = read_json(folder / CONFIG)
    return (
        folder,
        data,
        read_pickle(folder / WEIGHTS, TENSORS_ALONE) if WEIGHTS in names else _read_safe(folder / safe[0]),
    )


def write_folder(path: str | os.PathLike[str], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files to the folder ``path``, replacing it as a whole; tensors become detached, contiguous, CPU ones.

    >>> import tempfile
    >>> folder = write_folder(tempfile.mkdtemp() + "/run", {"delta_type": "lora"}, {"a": torch.ones(2)})
    >>> read_folder(folder)[1:]
    ({'delta_type': 'lora'}, {'a': tensor([1., 1.])})
    """
    plain = OrderedDict(on_cpu(tensors))

    def write(folder: Path) -> None:
        torch.save(plain, folder / WEIGHTS)
        (folder / CONFIG).write_text(json_text(data), encoding="utf-8")

    return replace_folder(path, write, carry=True)


def _read_safe(file: Path) -> dict[str, Tensor]:
    tensors, metadata = read_tensors(file)
    if "funcdelta_format" in metadata:
        raise CheckpointError(
            f"'{file}' was written by funcdelta: write fd.AutoDeltaModel.from_finetuned({str(file.parent)!r}, "
            f"backbone_model)."
        )
    return tensors
