"""Files of other libraries: pickles read as plain tensors, configs as JSON objects, names for messages about them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

SHOWN = 5


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def module_paths(backbone: nn.Module) -> list[str]:
    """The paths of all modules, the backbone itself left out.

    >>> module_paths(nn.Sequential(nn.Linear(1, 1)))
    ['0']
    """
    return [path for path, _ in backbone.named_modules(remove_duplicate=False) if path]


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous copies on the CPU, as files hold them.

    >>> on_cpu({"a": torch.ones(2, 2).T})["a"].is_contiguous()
    True
    """
    return {
        key: tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }


def json_text(data: Mapping[str, Any]) -> str:
    """The fields as the text of a config file.

    >>> json_text({"b": 1, "a": 2}).split()
    ['{', '"a":', '2,', '"b":', '1', '}']
    """
    return json.dumps(dict(data), indent=2, sort_keys=True) + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a config file; raises `CheckpointError` where it is no JSON object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"'{file}': expected an object, found {type(data).__name__}.")
    return data


def read_pickle(file: Path, instead: str) -> dict[str, Tensor]:
    """The tensors of a pickle by their key, read as plain tensors only; ``instead`` is what to do where it has more."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message names what the pickle wanted to call, but also advises loading it without this protection.
        wanted = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise CheckpointError(
            f"'{file}' holds more than tensors, and reading that could run any code, so it is refused. {wanted} "
            f"In the program that made it, {instead}."
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
