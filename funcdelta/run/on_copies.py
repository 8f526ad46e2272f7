"""A run whose writes reach the caller's inputs only if it succeeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .inputs import Inputs
from .written import changed, marks

Result = TypeVar("Result")


def on_copies(inputs: Inputs, run: Callable[[Inputs], Result]) -> Result:
    """``run`` of copies of the inputs; if it succeeds, what it wrote is copied into the inputs.

    >>> x = torch.zeros(2, 1)
    >>> on_copies(Inputs(torch.nn.Identity(), 1, (x,), {}, None, 0), lambda own: own.leaves[0].add_(1))
    tensor([[1.],
            [1.]])
    >>> x
    tensor([[1.],
            [1.]])
    """
    copied = inputs.copied()
    own, given = copied.tensors(), inputs.tensors()
    before = marks(own)
    result = run(copied)
    for i in changed(own, before):
        given[i].copy_(own[i])
    return result
