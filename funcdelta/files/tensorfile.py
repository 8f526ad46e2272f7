"""One safetensors file of named tensors with a checksum: any dtype, layout and sharing, the same values."""

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
    """The safetensors file ``path`` with ``tensors`` and the texts of ``metadata``.

    Each tensor is stored detached and contiguous, with its own dtype and shape; expanded tensors are stored
    in full and tensors that share memory each for itself. Raises `ParamsError` naming a tensor that has no
    readable bytes.

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
            raise ParamsError(f"the leaf {name!r} {reason}, so it cannot be saved.")
    # safetensors has no complex128: its two float64 parts stand in for it.
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
    """The tensors (on the CPU, with memory of their own) and the metadata of a file of `write_tensors`.

    Raises `CheckpointError` when the file is cut off or damaged, differs from its checksum, or is of a newer
    format.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> _ = path.write_bytes(b"cut")
    >>> read_tensors(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: '...a.safetensors' is damaged or cut off (3 bytes): ...
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # The file is mapped into memory; copies do not change when it does.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(f"'{path}' is damaged or cut off ({size} bytes): {error}.") from error
    format_number = metadata.get("funcdelta_format", str(_FORMAT))
    if format_number != str(_FORMAT):
        raise CheckpointError(
            f"'{path}' has format {format_number} of a newer funcdelta, this one reads format {_FORMAT}: "
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
