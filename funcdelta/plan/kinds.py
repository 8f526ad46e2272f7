"""Which kinds of numbers a delta computes with: the dtypes that its leaves may have in a call, and must have together.

Leaves may be of any precision that torch computes in, whatever a delta starts with: a stack in bfloat16 is half as
large. But torch multiplies matrices of one dtype only, so the leaves that one delta trains at one site go together.
What has another kind of numbers (indices where weights belong, complex numbers, a format for storage) would fail
somewhere inside of a method, or drop its imaginary part.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError

COMPUTES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The real dtypes that torch computes in; others of floating point are for storage alone."""


class Kinds:
    """The dtypes of a delta's leaves as they start, and which of the leaves are used together.

    ``together`` are those that train, site by site; ``beside`` names one of them for each constant.

    >>> kinds = Kinds({"0.lora.lora_A": torch.float32, "0.lora.lora_B": torch.float32}, [])
    >>> kinds.check({"0.lora.lora_A": torch.ones(2, dtype=torch.bfloat16)})
    False
    >>> kinds.check({"0.lora.lora_A": torch.ones(2, dtype=torch.int64)})
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: 0.lora.lora_A is torch.int64; expected numbers of floating point. Write leaf.to(...
    """

    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        together: Sequence[tuple[str, ...]],
        beside: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.dtypes, self.together, self.beside = dtypes, together, beside

    def check(self, params: Mapping[str, Any]) -> bool:
        """Raise ``ParamsError`` where a leaf has numbers of another kind; gives whether leaves used together differ.

        Those that differ raise as well, unless autocast converts them.
        """
        for name, leaf in params.items():
            if isinstance(leaf, Tensor):
                self._one(name, leaf)
        mixed = next((found for names in self.together if (found := _unlike(names, params))), None)
        if mixed is None:
            return False
        first, other = mixed
        if not _converts(params[first].device):
            dtype = params[first].dtype
            raise ParamsError(
                f"{other} is {params[other].dtype} and {first} is {dtype}; what one delta trains at one site has one "
                f"dtype. Convert one: leaf.to({dtype})."
            )
        return True

    def casts(self, params: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """The constants that have another dtype than what trains beside them, with that dtype.

        A single number takes on the dtype of whatever it meets; a number for each member, or a matrix, does not.

        >>> kinds = Kinds({"a": torch.float32, "scale": torch.float32}, [], {"scale": "a"})
        >>> kinds.casts({"a": torch.ones(3, 2, dtype=torch.bfloat16), "scale": torch.ones(3)})
        {'scale': torch.bfloat16}
        """
        pairs = [(name, other) for name, other in self.beside.items() if name in params and other in params]
        return {name: params[other].dtype for name, other in pairs if params[name].dtype != params[other].dtype}

    def _one(self, name: str, leaf: Tensor) -> None:
        expected, dtype = self.dtypes.get(name), leaf.dtype
        if leaf.is_quantized:
            raise ParamsError(f"{name} is quantised, {dtype}; expected plain numbers. Write leaf.dequantize().")
        if expected is None or (dtype in COMPUTES and expected.is_floating_point):
            return
        if expected.is_complex:
            if not dtype.is_complex:
                raise ParamsError(f"{name} is {dtype}; expected complex numbers. Write leaf.to({expected}).")
        elif expected.is_floating_point:
            kind, write = "numbers of floating point", f"leaf.to({expected})"
            if dtype.is_complex:
                kind, write = "real numbers", "leaf.real"
            elif dtype.is_floating_point:
                kind = "a dtype that torch computes in"
            raise ParamsError(f"{name} is {dtype}; expected {kind}. Write {write}.")
        elif dtype.is_floating_point or dtype.is_complex:
            raise ParamsError(f"{name} is {dtype}; expected {expected}, no weights. Write leaf.to({expected}).")


def check_device(device: Any) -> None:
    """Raise ``ParamsError`` where ``device`` names none.

    >>> check_device("cpu")
    >>> check_device("nowhere")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: device='nowhere' names no device: write "cpu", "cuda:0" or a torch.device.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise ParamsError(f'device={device!r} names no device: write "cpu", "cuda:0" or a torch.device.') from None


def _unlike(names: tuple[str, ...], params: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of ``names`` in ``params``, and one of another dtype."""
    given = [name for name in names if isinstance(params.get(name), Tensor)]
    return next(((given[0], name) for name in given if params[name].dtype != params[given[0]].dtype), None)


def _converts(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device that has none
        return False
