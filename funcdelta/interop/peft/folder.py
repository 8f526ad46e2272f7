"""The two files of a PEFT folder: ``adapter_config.json`` and the tensors, as safetensors or as a pickle of tensors."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError
from ...files.atomic import replace_folder
from ...files.hub import fetch_folder
from ...files.tensorfile import read_tensors
from .formats import refuse_pointer

CONFIG = "adapter_config.json"
SAFE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_FETCHED = [CONFIG, SAFE, PICKLE, *(f"*/{name}" for name in (CONFIG, SAFE, PICKLE))]


def find_folder(path: str | os.PathLike[str], **fetching: Any) -> Path:
    """The folder of the adapter at ``path``: a folder, its ``adapter_config.json``, or a hub id.

    An adapter that is alone in a folder below, as PEFT saves all but those called ``default``, is found there.

    >>> find_folder("no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: There is no folder 'no/such/folder'.
    """
    given = Path(path)
    if given.name == CONFIG and given.is_file():
        return given.parent
    return _with_config(fetch_folder(path, _FETCHED, **fetching))


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of its ``adapter_config.json``.

    >>> import tempfile
    >>> read_config(write_folder(tempfile.mkdtemp() + "/run", {"peft_type": "LORA"}, {}))
    {'peft_type': 'LORA'}
    """
    file = folder / CONFIG
    refuse_pointer(file)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not JSON that can be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"'{file}': expected fields by name, found {type(data).__name__}.")
    return data


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Its tensors by their key, on the CPU. A pickle is read as plain tensors only.

    >>> import tempfile
    >>> read_weights(write_folder(tempfile.mkdtemp() + "/run", {}, {"a": torch.ones(2)}))
    {'a': tensor([1., 1.])}
    """
    if (folder / SAFE).is_file():
        refuse_pointer(folder / SAFE)
        return read_tensors(folder / SAFE)[0]
    if (folder / PICKLE).is_file():
        refuse_pointer(folder / PICKLE)
        return _read_pickle(folder / PICKLE)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
    raise CheckpointError(f"'{folder}' has no tensors: expected {SAFE} or {PICKLE} in it, found {found}.")


def write_folder(path: str | os.PathLike[str], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """The folder ``path`` with both files, which appear at once; others in it stay. Tensors are copied to the CPU.

    >>> import tempfile
    >>> folder = write_folder(tempfile.mkdtemp() + "/run", {"peft_type": "LORA"}, {"a": torch.ones(2)})
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    plain = {
        key: tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }

    def write(folder: Path) -> None:
        save_file(plain, folder / SAFE, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(dict(data), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    final = replace_folder(path, write, carry=True)
    (final / PICKLE).unlink(missing_ok=True)  # an older file of weights, which other readers might take
    return final


def _with_config(folder: Path) -> Path:
    """``folder``, or the one folder below it that holds an adapter."""
    if (folder / CONFIG).is_file():
        return folder
    below = sorted(entry.parent for entry in folder.glob(f"*/{CONFIG}"))
    if len(below) > 1:
        raise CheckpointError(
            f"'{folder}' holds several adapters ({', '.join(one.name for one in below[:5])}): write the folder of one, "
            f"fd.load_peft({str(below[0])!r}, backbone_model)."
        )
    if not below:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"'{folder}' is no folder of PEFT: expected {CONFIG} and {SAFE} (or {PICKLE}) in it, found {found}."
        )
    return below[0]


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{file}' holds more than tensors, and reading that could run any code, so it is refused. In the program "
            f"that made it, save it anew: peft_model.save_pretrained(path, safe_serialization=True)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"'{file}' is damaged or truncated ({file.stat().st_size} bytes): {reason}.") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"'{file}': expected tensors by key, found something else.")
    return {str(key): tensor.detach() for key, tensor in found.items()}
