"""The two files of a PEFT folder: ``adapter_config.json`` and the tensors, as safetensors or as a pickle of tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError
from ...files.atomic import replace_folder
from ...files.hub import fetch_folder
from ...files.tensorfile import read_tensors
from ..files import json_text, on_cpu, read_json, read_pickle
from .formats import refuse_pointer

CONFIG = "adapter_config.json"
SAFE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
SAFE_INSTEAD = "save it anew: peft_model.save_pretrained(path, safe_serialization=True)"
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
    return read_json(file)


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
        return read_pickle(folder / PICKLE, SAFE_INSTEAD)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
    raise CheckpointError(f"'{folder}' has no tensors: expected {SAFE} or {PICKLE} in it, found {found}.")


def write_folder(path: str | os.PathLike[str], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """The folder ``path`` with both files, which appear at once; others in it stay. Tensors are copied to the CPU.

    >>> import tempfile
    >>> folder = write_folder(tempfile.mkdtemp() + "/run", {"peft_type": "LORA"}, {"a": torch.ones(2)})
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    plain = on_cpu(tensors)

    def write(folder: Path) -> None:
        save_file(plain, folder / SAFE, {"format": "pt"})
        (folder / CONFIG).write_text(json_text(data), encoding="utf-8")

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
