"""The check that the backbone is unchanged, as an operator of compiled code that runs plain Python in every call.

Compiled code runs a private copy of the backbone and reads nothing that would show that the backbone has changed since.
The operator claims to write into a tensor, because compilers drop operators without an effect.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from ..errors import StaleBackboneError


class Checked(Protocol):
    """An object that can check whether its backbone is still the one that it copied."""

    generation: int

    def check(self) -> None:
        """Raise :class:`StaleBackboneError`, or read the backbone again and increase ``generation``."""
        ...


_living: weakref.WeakValueDictionary[int, Checked] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_library = torch.library.Library("funcdelta", "FRAGMENT")  # kept, because its operators vanish with it
_library.define("check(Tensor(a!) seen, int number) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


class CompiledCheck:
    """The check of one ``subject``, to be called where code is traced.

    >>> class Subject:
    ...     generation = 0
    ...     def check(self):
    ...         print("checked")
    >>> subject = Subject()
    >>> CompiledCheck(subject)()
    checked
    """

    def __init__(self, subject: Checked) -> None:
        self.number = next(_numbers)
        self.seen = torch.zeros(0, dtype=torch.uint8, device="cpu")
        _living[self.number] = subject

    def __call__(self) -> None:
        torch.ops.funcdelta.check(self.seen, self.number)


def _check(seen: Tensor, number: int) -> None:
    subject = _living.get(number)
    if subject is None:
        return
    generation = subject.generation
    subject.check()
    if subject.generation != generation:
        raise StaleBackboneError(
            "The backbone changed after this call was compiled: a buffer was replaced, or a number that a forward "
            "reads. Call delta.refresh(), which reads the backbone again; the next call is compiled anew."
        )


_library.impl("check", _check, "CompositeExplicitAutograd")
_library.impl("check", lambda seen, number: None, "Meta")
