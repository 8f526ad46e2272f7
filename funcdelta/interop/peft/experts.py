"""Factors of a table of experts: PEFT's two matrices as one pair an expert, and back.

Of a parameter (E, out, in) PEFT has A (E r, in), one expert after the other, and B (out, r E), one rank after the
other: ``ΔW_e = s B.view(out, r, E)[..., e] A.view(E, r, in)[e]``. Of one (E, in, out), in a module that says
``is_transposed``, it has the same factors of ``ΔW_eᵀ``. Here ``lora_A`` is (E, r, columns) and ``lora_B`` (E, rows, r)
of the parameter as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""A and B."""

SEPARATE = re.compile(r"^(?P<holder>.*\bexperts)\.(?P<expert>\d+)\.(?P<own>w1|w2|w3|gate_proj|up_proj|down_proj)$")
"""What an expert's layers were called before Transformers 5 put them into one parameter a kind."""
FUSED = {"w1": "gate_up_proj", "gate_proj": "gate_up_proj", "w3": "gate_up_proj", "up_proj": "gate_up_proj"}
FUSED |= {"w2": "down_proj", "down_proj": "down_proj"}
_SECOND = ("w3", "up_proj")


def is_turned(module: nn.Module) -> bool:
    """Whether PEFT takes the module's tables as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def from_peft(a: Tensor, b: Tensor, shape: Sequence[int], turned: bool) -> Pair | None:
    """The factors of each expert of a parameter of that shape; ``None`` where they do not fit it.

    ``turned`` decides where the shape does not, because rows and columns are as many.

    >>> a, b = from_peft(torch.zeros(6, 5), torch.zeros(4, 6), (3, 4, 5), turned=False)
    >>> a.shape, b.shape
    (torch.Size([3, 2, 5]), torch.Size([3, 4, 2]))
    """
    experts, rows, columns = shape
    rank, rest = divmod(len(a), experts)
    if rest or not rank or b.shape[1] != len(a):
        return None
    sizes = (b.shape[0], a.shape[1])
    if sizes == (columns, rows) and (turned or rows != columns):
        return b.unflatten(1, (rank, experts)).permute(2, 1, 0), a.unflatten(0, (experts, rank)).mT
    if sizes == (rows, columns):
        return a.unflatten(0, (experts, rank)), b.unflatten(1, (rank, experts)).permute(2, 0, 1)
    return None


def to_peft(a: Tensor, b: Tensor, turned: bool) -> Pair:
    """The inverse of :func:`from_peft`.

    >>> a, b = torch.randn(6, 5), torch.randn(4, 6)
    >>> again = to_peft(*from_peft(a, b, (3, 4, 5), turned=False), turned=False)
    >>> torch.equal(again[0], a), torch.equal(again[1], b)
    (True, True)
    """
    if turned:
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def fused(pairs: Mapping[tuple[int, str], Pair], shape: Sequence[int]) -> tuple[Pair | None, int]:
    """The factors of experts that were layers of their own, ``{(expert, name): (A, B)}``, and how many each has.

    Two layers that are one parameter now, the rows of one below those of the other, give A one below the other, too,
    and B in blocks. ``None`` where an expert lacks one, or where they do not fit.

    >>> pairs = {(e, own): (torch.ones(2, 5), torch.ones(3, 2)) for e in range(4) for own in ("w1", "w3")}
    >>> (a, b), pieces = fused(pairs, (4, 6, 5))
    >>> a.shape, b.shape, pieces
    (torch.Size([4, 4, 5]), torch.Size([4, 6, 4]), 2)
    """
    experts, rows, _ = shape
    names = sorted({own for _, own in pairs}, key=lambda own: own in _SECOND)
    if {expert for expert, _ in pairs} != set(range(experts)) or len(pairs) != experts * len(names):
        return None, len(names)
    if len({(a.shape, b.shape) for a, b in pairs.values()}) != 1:
        return None, len(names)
    every_a = torch.stack([torch.cat([pairs[e, own][0] for own in names]) for e in range(experts)])
    every_b = torch.stack([torch.block_diag(*(pairs[e, own][1] for own in names)) for e in range(experts)])
    if every_b.shape[1] < rows and len(names) == 1:  # one half of the rows alone has a change
        half = every_b.new_zeros(experts, rows - every_b.shape[1], every_b.shape[2])
        every_b = torch.cat([half, every_b] if names[0] in _SECOND else [every_b, half], 1)
    fits = every_a.shape[2] == shape[2] and every_b.shape[1] == rows
    return ((every_a, every_b) if fits else None), len(names)
