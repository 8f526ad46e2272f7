"""Routes rows of a batch to members: checks an index against a stack, and picks the members that it names.

If a model's ``generate`` makes k rows of each (beams, several sequences), they are adjacent and are only reordered
among themselves, so row i belongs to entry i // k of the index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ParamsError
from ..transforms import is_wrapped

Index = Sequence[int] | Tensor


def read_index(index: Index, n: int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """``index`` (b,) as a tensor, and a mask of the rows that have a member, which is ``None`` if all do.

    Raises ``ParamsError`` if an entry is neither -1 nor one of n members. ``n=None`` allows any number, for the slots
    of a resident stack, which checks them itself. In compiled code and under transforms values cannot be read, so any
    row may turn out to be bare.

    >>> read_index([2, -1], 3, torch.device("cpu"))
    (tensor([ 2, -1]), tensor([ True, False]))
    >>> read_index([2, 0], 3, torch.device("cpu"))[1] is None
    True
    """
    try:
        index = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParamsError(f"index is {index!r}; expected one integer per row, such as [0, 2, -1].") from error
    index = index if index.numel() else index.long()  # an empty list becomes a float tensor
    if index.layout is not torch.strided or index.is_nested or index.is_quantized:
        kind = "nested" if index.is_nested else f"{index.dtype}, {index.layout}"
        raise ParamsError(f"index is a tensor that is {kind}; expected (b,) integers in a dense tensor or a list.")
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ParamsError(f"index has shape {tuple(index.shape)} and dtype {index.dtype}; expected (b,) integers.")
    index = index.long()  # torch reads uint8 as a mask
    if torch.compiler.is_compiling() or is_wrapped(index):
        return index, index >= 0
    if index.shape[0] and (int(index.min()) < -1 or (n is not None and int(index.max()) >= n)):
        there = "slots are 0 or more" if n is None else f"expected 0 to {n - 1}"
        raise ParamsError(
            f"index names the members {int(index.min())} to {int(index.max())}; {there}, or -1 for the bare backbone."
        )
    bare = index < 0
    return index, ~bare if bool(bare.any()) else None


def pick_rows(
    stack: Mapping[str, Tensor], index: Tensor, times: int = 1, some_bare: bool | None = None
) -> dict[str, Tensor]:
    """The member of each row, leaf[index[i // times]] for row i; a bare row (-1) gets numbers that will be masked.

    Those are bounded even if members hold NaN: a mask keeps NaN out of values, but not out of gradients. ``some_bare``
    says whether there are bare rows, if known.

    >>> pick_rows({"a": torch.tensor([5.0, 6.0])}, torch.tensor([1, 0]), times=2)
    {'a': tensor([6., 6., 5., 5.])}
    """
    rows = index.clamp(min=0)
    rows = rows if times == 1 else rows.repeat_interleave(times)
    picked = {name: leaf[rows.to(leaf.device)] for name, leaf in stack.items()}
    if some_bare is None:
        some_bare = torch.compiler.is_compiling() or is_wrapped(index) or bool((index < 0).any())
    if not some_bare:
        return picked
    bare = index < 0 if times == 1 else (index < 0).repeat_interleave(times)
    return {name: _tame(leaf, bare.to(leaf.device)) for name, leaf in picked.items()}


def _tame(leaf: Tensor, bare: Tensor) -> Tensor:
    """``leaf`` (rows, ...) whose ``bare`` rows have numbers between -1 and 1 without a gradient."""
    if not leaf.is_floating_point():
        return leaf
    numbers = leaf.detach().nan_to_num(1.0, 1.0, -1.0).clamp(-1.0, 1.0)
    return torch.where(bare.view(-1, *[1] * (leaf.ndim - 1)), numbers, leaf)
