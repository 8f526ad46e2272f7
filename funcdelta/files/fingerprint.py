"""A backbone's fingerprint: ``"fd1:" + sha256`` over the names, shapes, dtypes and bytes of its tensors.

It is a hash of hashes: each tensor has its own sha256, and the fingerprint is the sha256 of the sorted lines
``name NUL dtype NUL shape NUL digest LF``. So one pass over the bytes yields both the fingerprint and a description
that shows, if two fingerprints differ, which tensors differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError
from ..match import below

__all__ = ["Description", "describe", "differences", "digest", "fingerprint", "survey", "unreadable"]

Description = dict[str, list[Any]]
"""``{tensor name: [shape, dtype, first 8 hex digits of the sha256 of its bytes]}``, sorted by name."""


class _Entry(NamedTuple):
    shape: list[int]
    dtype: str
    digest: str


def fingerprint(backbone: nn.Module, exclude: Iterable[str] = ()) -> str:
    """``"fd1:" + sha256`` over names, shapes, dtypes and bytes of every parameter and persistent buffer.

    The order of declaration, the device, the memory layout and ``requires_grad`` do not matter. A tensor with several
    names (a tied pair) counts once, under the alphabetically first, and is left out if ``exclude`` has any of them.
    ``exclude`` names the tensors that params replace; names that the backbone does not have are ignored, so
    ``delta.names`` may be passed.

    Raises `CheckpointError` for a tensor without readable bytes: on the meta device, sharded, sparse or quantised.

    >>> layer = nn.Linear(2, 2)
    >>> before = fingerprint(layer)
    >>> before[:4], len(before)
    ('fd1:', 68)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> fingerprint(layer) == before
    False
    """
    return survey(backbone, exclude)[0]


def describe(backbone: nn.Module, exclude: Iterable[str] = ()) -> Description:
    """A short description of each tensor that `fingerprint` hashes: ``{name: [shape, dtype, 8 hex digits]}``.

    >>> describe(nn.Linear(2, 3), exclude=["bias"])["weight"][:2]
    [[3, 2], 'float32']
    """
    return survey(backbone, exclude)[1]


def survey(backbone: nn.Module, exclude: Iterable[str] = ()) -> tuple[str, Description]:
    """`fingerprint` and `describe` of ``backbone`` in one pass over its bytes.

    >>> layer = nn.Linear(2, 3)
    >>> survey(layer) == (fingerprint(layer), describe(layer))
    True
    """
    entries = _entries(_own_tensors(backbone, frozenset(exclude)), "the backbone's tensor")
    return "fd1:" + _combine(entries), {
        name: [entry.shape, entry.dtype, entry.digest[:8]] for name, entry in entries.items()
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes, dtypes and bytes of ``tensors``, in any order.

    >>> a, b = torch.zeros(2), torch.ones(2)
    >>> digest({"a": a, "b": b}) == digest({"b": b, "a": a})
    True
    """
    return _combine(_entries(tensors, "the leaf"))


def differences(saved: Mapping[str, list[Any]], found: Mapping[str, list[Any]], shown: int = 3) -> str:
    """How two descriptions differ, in words and with names: one line per kind, ``""`` if they agree.

    >>> saved = {"w": [[2], "float32", "aa"]}
    >>> print(differences(saved, {"w": [[3], "float32", "bb"], "b": [[], "int8", "cc"]}))
    1 tensor with another shape: w (saved (2,), found (3,))
    1 tensor that the saved backbone did not have: b
    """
    common = [name for name in saved if name in found]
    shape = [name for name in common if list(saved[name][0]) != list(found[name][0])]
    dtype = [name for name in common if name not in shape and saved[name][1] != found[name][1]]
    values = [name for name in common if name not in shape and list(saved[name][:2]) == list(found[name][:2])]
    values = [name for name in values if saved[name][2] != found[name][2]]
    kinds = [
        ("that this backbone lacks", [name for name in saved if name not in found], ""),
        ("with another shape", shape, "(saved {0}, found {1})"),
        ("with another dtype", dtype, "(saved {2}, found {3})"),
        ("with other values", values, ""),
        ("that the saved backbone did not have", [name for name in found if name not in saved], ""),
    ]
    lines = []
    for kind, names, detail in kinds:
        if not names:
            continue
        texts = []
        for name in names[:shown]:
            a, b = saved.get(name, [(), ""]), found.get(name, [(), ""])
            texts.append(f"{name} {detail.format(tuple(a[0]), tuple(b[0]), a[1], b[1])}".rstrip())
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {kind}: {', '.join(texts)}{more}")
    return "\n".join(lines)


def unreadable(tensor: Tensor) -> str | None:
    """Why the bytes of ``tensor`` cannot be read; None if they can.

    >>> unreadable(torch.empty(2, device="meta"))
    'is on the meta device and has no values'
    """
    if is_lazy(tensor):
        return "has no shape yet (a lazy module that was never called)"
    if is_functorch_wrapped_tensor(tensor):
        return "is inside a torch.func transform and has no values of its own"
    if hasattr(tensor, "full_tensor"):
        return "is sharded over processes; gather it first (tensor.full_tensor())"
    if tensor.is_quantized:
        return "has one of torch's quantised dtypes, whose scale is not among its bytes"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}, not torch.strided"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    return None


def _own_tensors(backbone: nn.Module, exclude: frozenset[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once under its first name, without those that ``exclude`` names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        persistent = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | persistent).items():
            if tensor is not None:
                names.setdefault(id(tensor), []).append(below(path, name))
                tensors[id(tensor)] = tensor
    return {min(names[key]): tensors[key] for key in names if exclude.isdisjoint(names[key])}


def _entries(tensors: Mapping[str, Tensor], kind: str) -> dict[str, _Entry]:
    for name, tensor in tensors.items():
        reason = unreadable(tensor)
        if reason is not None:
            raise CheckpointError(
                f"{kind} {name!r} {reason}, so no fingerprint can be taken. "
                "To do without it, save with hash_backbone=False and load with check_hash=False."
            )
    names = sorted(tensors)
    # hashlib releases the GIL while hashing. Only a few threads, because each may hold a copy of a tensor.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(_entry, (tensors[name] for name in names)), strict=True))


def _entry(tensor: Tensor) -> _Entry:
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        inner = {str(part): _entry(getattr(tensor, str(part))) for part in parts}
        return _Entry(list(tensor.shape), f"{_name(tensor.dtype)}:{type(tensor).__name__}", _combine(inner))
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().data
    return _Entry(list(tensor.shape), _name(tensor.dtype), hashlib.sha256(content).hexdigest())


def _combine(entries: Mapping[str, _Entry]) -> str:
    total = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        total.update(f"{name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\0{entry.digest}\n".encode())
    return total.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
