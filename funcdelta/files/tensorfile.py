"""Writes and reads named tensors as a safetensors file with a checksum, whatever their dtype, layout and sharing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ParamsError
from .fingerprint import digest, unreadable

__all__ = ["read_tensors", "write_tensors"]

_FORMAT = 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and the strings of ``metadata`` to the safetensors file ``path``.

    Each tensor is stored detached and contiguous, with its own dtype and shape; expanded tensors are stored in full,
    and tensors that share memory separately. Raises `ParamsError` naming a tensor whose bytes cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_tensors(path, {"a": torch.ones(1).expand(3)}, {"kind": "test"})
    >>> tensors, metadata = read_tensors(path)
    >>> tensors["a"], metadata["kind"]
    (tensor([1., 1., 1.]), 'test')
    """
    for name, tensor in tensors.items():
        reason = unreadable(tensor)
        if reason is not None:
            raise ParamsError(f"The leaf {name!r} {reason}, so it cannot be saved.")
    # safetensors has no complex128, so the two float64 parts are stored.
    complex128 = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    own = {
        "format": "pt",
        "funcdelta_format": str(_FORMAT),
        "sha256": digest(plain),
        "complex128": json.dumps(complex128),
    }
    save_file(plain, path, own | dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU, in their own memory) and the metadata of a file written by `write_tensors`.

    Raises `CheckpointError` if the file is truncated or damaged, differs from its checksum, or has a newer format.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> _ = path.write_bytes(b"cut")
    >>> read_tensors(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: '...a.safetensors' is damaged or truncated (3 bytes): ...
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # The file is memory-mapped; copies do not change if the file does.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(f"'{path}' is damaged or truncated ({size} bytes): {error}.") from error
    format_number = metadata.get("funcdelta_format", str(_FORMAT))
    if format_number != str(_FORMAT):
        raise CheckpointError(
            f"'{path}' has format {format_number} of a newer funcdelta; this one reads format {_FORMAT}: "
            f"pip install --upgrade funcdelta."
        )
    if "sha256" in metadata and metadata["sha256"] != digest(tensors):
        raise CheckpointError(
            f"'{path}' is damaged: its tensors differ from the checksum written with them. Save or fetch it again."
        )
    for name in json.loads(metadata.get("complex128", "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    return tensors, metadata


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor."""
    own = tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
    own = own.resolve_conj().resolve_neg()
    return torch.view_as_real(own) if own.dtype == torch.complex128 else own
