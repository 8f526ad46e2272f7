"""Which leaf names never train, remembered for the whole process.

A constant (LoRA's ``scale``, a frozen base, a mask) stands in params so that it maps over members like any
other leaf. An optimiser sees only a pytree of tensors, and a tensor cannot carry the mark itself: its
gradient is zero, but weight decay alone would move a scale from 2.0 to 1.9. So every delta declares its
names here when it is built, and ``funcdelta.optim`` asks here. Two deltas of one process may disagree about
a name; then it counts as trainable and only an explicit mask (``trainable=delta.trainable``) decides.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["declare_leaves", "is_constant", "was_declared_constant"]

_trainable: set[str] = set()
_constants: set[str] = set()


def declare_leaves(trainable: Iterable[str], constants: Iterable[str]) -> None:
    """Remember the names of leaves that train and of leaves that never do.

    >>> declare_leaves(trainable=["doc.q.lora.lora_A"], constants=["doc.q.lora.scale"])
    >>> is_constant("doc.q.lora.scale"), is_constant("doc.q.lora.lora_A")
    (True, False)
    """
    _trainable.update(trainable)
    _constants.update(constants)


def is_constant(name: str) -> bool:
    """Whether ``name`` was declared constant and never declared trainable.

    >>> declare_leaves(trainable=[], constants=["doc.k.lora.scale"])
    >>> is_constant("doc.k.lora.scale"), is_constant("a name nobody declared")
    (True, False)
    >>> declare_leaves(trainable=["doc.k.lora.scale"], constants=[])
    >>> is_constant("doc.k.lora.scale")
    False
    """
    return name in _constants and name not in _trainable


def was_declared_constant(name: str) -> bool:
    """Whether any delta declared ``name`` constant, also where another one trains it.

    >>> declare_leaves(trainable=["doc.v.lora.scale"], constants=["doc.v.lora.scale"])
    >>> was_declared_constant("doc.v.lora.scale"), is_constant("doc.v.lora.scale")
    (True, False)
    """
    return name in _constants
