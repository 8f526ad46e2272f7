"""The dtypes that a delta's leaves may have in a call, and which leaves must have the same one.

Leaves may have any precision that torch computes in, whatever they start with: a stack in bfloat16 is half as large.
But torch multiplies only matrices of one dtype, so the leaves that one delta trains at one site must agree. Other kinds
of numbers (indices in place of weights, complex numbers, formats for storage) would fail somewhere inside a method, or
lose their imaginary parts.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError

COMPUTES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The real dtypes that torch computes in; other floating-point dtypes are only for storage."""


class Kinds:
    """The initial dtypes of a delta's leaves, and which leaves are used together.

    Args:
        together: the leaves that train, site by site.
        beside: for each constant, the name of a leaf that trains at the same site.

    >>> kinds = Kinds({"0.lora.lora_A": torch.float32, "0.lora.lora_B": torch.float32}, [])
    >>> kinds.check({"0.lora.lora_A": torch.ones(2, dtype=torch.bfloat16)})
    False
    >>> kinds.check({"0.lora.lora_A": torch.ones(2, dtype=torch.int64)})
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: 0.lora.lora_A is torch.int64; expected floating-point numbers. Write leaf.to(...
    """

    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        together: Sequence[tuple[str, ...]],
        beside: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.dtypes, self.together, self.beside = dtypes, together, beside

    def check(self, params: Mapping[str, Any]) -> bool:
        """Whether leaves that are used together differ in dtype, which raises ``ParamsError`` outside of autocast.

        Raises ``ParamsError`` as well for a leaf with another kind of numbers.
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
                f"{other} is {params[other].dtype} and {first} is {dtype}; the leaves that one delta trains at one "
                f"site must have one dtype. Convert one of them: leaf.to({dtype})."
            )
        return True

    def casts(self, params: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """The constants whose dtype differs from that of the leaves they are used with, with the latter dtype.

        They have to be converted: torch adapts only scalars without axes, not a number per member or a matrix.

        >>> kinds = Kinds({"a": torch.float32, "scale": torch.float32}, [], {"scale": "a"})
        >>> kinds.casts({"a": torch.ones(3, 2, dtype=torch.bfloat16), "scale": torch.ones(3)})
        {'scale': torch.bfloat16}
        """
        pairs = [(name, other) for name, other in self.beside.items() if name in params and other in params]
        return {name: params[other].dtype for name, other in pairs if params[name].dtype != params[other].dtype}

    def _one(self, name: str, leaf: Tensor) -> None:
        expected, dtype = self.dtypes.get(name), leaf.dtype
        if leaf.is_quantized:
            raise ParamsError(f"{name} is quantised ({dtype}); expected plain numbers. Write leaf.dequantize().")
        if expected is None or (dtype in COMPUTES and expected.is_floating_point):
            return
        if expected.is_complex:
            if not dtype.is_complex:
                raise ParamsError(f"{name} is {dtype}; expected complex numbers. Write leaf.to({expected}).")
        elif expected.is_floating_point:
            kind, write = "floating-point numbers", f"leaf.to({expected})"
            if dtype.is_complex:
                kind, write = "real numbers", "leaf.real"
            elif dtype.is_floating_point:
                kind = "a dtype that torch computes in"
            raise ParamsError(f"{name} is {dtype}; expected {kind}. Write {write}.")
        elif dtype.is_floating_point or dtype.is_complex:
            raise ParamsError(f"{name} is {dtype}; expected {expected}. Write leaf.to({expected}).")


def check_device(device: Any) -> None:
    """Raise ``ParamsError`` unless ``device`` names a device.

    >>> check_device("cpu")
    >>> check_device("nowhere")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: device='nowhere' names no device. Write "cpu", "cuda:0" or a torch.device.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise ParamsError(f'device={device!r} names no device. Write "cpu", "cuda:0" or a torch.device.') from None


def _unlike(names: tuple[str, ...], params: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of ``names`` in ``params`` and one with another dtype; ``None`` if all agree."""
    given = [name for name in names if isinstance(params.get(name), Tensor)]
    return next(((given[0], name) for name in given if params[name].dtype != params[given[0]].dtype), None)


def _converts(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device without autocast
        return False
