"""Reads and writes an OpenDelta folder: ``config.json``, and ``pytorch_model.bin`` without running its pickle."""

from __future__ import annotations

import json
import os
import pickle
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

WEIGHTS = "pytorch_model.bin"


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
    data = _read_config(folder / CONFIG)
    return folder, data, _read_pickle(folder / WEIGHTS) if WEIGHTS in names else _read_safe(folder / safe[0])


def write_folder(path: str | os.PathLike[str], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files to the folder ``path``, replacing it as a whole; tensors become detached, contiguous, CPU ones.

    >>> import tempfile
    >>> folder = write_folder(tempfile.mkdtemp() + "/run", {"delta_type": "lora"}, {"a": torch.ones(2)})
    >>> read_folder(folder)[1:]
    ({'delta_type': 'lora'}, {'a': tensor([1., 1.])})
    """
    plain = OrderedDict(
        (key, tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format))
        for key, tensor in tensors.items()
    )

    def write(folder: Path) -> None:
        torch.save(plain, folder / WEIGHTS)
        text = json.dumps(dict(data), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")

    return replace_folder(path, write, carry=True)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"'{file}': expected an object, found {type(data).__name__}.")
    return data


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message names what the pickle wanted to call, but also advises loading it without this protection.
        wanted = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise CheckpointError(
            f"'{file}' holds more than tensors, and reading that could run arbitrary code, so it is refused. {wanted} "
            f"In the program that made it, save only the tensors: torch.save(model.state_dict(), '{WEIGHTS}')."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        size = file.stat().st_size
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"'{file}' is damaged or truncated ({size} bytes): {reason}.") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"'{file}': expected tensors by key, found a {type(found).__name__}.")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"'{file}': expected tensors by key, found a {type(value).__name__} as {key!r}.")
    return {str(key): tensor.detach() for key, tensor in found.items()}


def _read_safe(file: Path) -> dict[str, Tensor]:
    tensors, metadata = read_tensors(file)
    if "funcdelta_format" in metadata:
        raise CheckpointError(
            f"'{file}' was written by funcdelta: write fd.AutoDeltaModel.from_finetuned({str(file.parent)!r}, "
            f"backbone_model)."
        )
    return tensors
