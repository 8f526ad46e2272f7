"""Marks on the memory behind tensors, so that other tensor objects over the same memory are recognised.

``as_subclass``, ``.data`` and views made before a write are objects without marks over memory that is marked. From what
is known of one place in a storage follows, by strides, what another place in it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Known = TypeVar("Known")


class Place(NamedTuple):
    """Where a tensor lies in its storage.

    >>> Place.of(torch.zeros(4, 3)[1:])
    Place(offset=3, shape=(3, 3), stride=(3, 1))
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """The place of ``tensor``."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def same_axis(place: Place, axis: int, other: Place) -> int | None:
    """The axis of ``other`` that runs through the same memory as ``axis`` of ``place``; ``None`` if there is none.

    >>> whole = Place.of(torch.zeros(5, 5, 4))
    >>> same_axis(Place.of(torch.zeros(5, 5, 4)[..., :2]), 1, whole), same_axis(whole, 0, Place.of(torch.zeros(5, 4)))
    (1, None)
    """
    size, step = place.shape[axis], place.stride[axis]
    fits = [i for i, (n, by) in enumerate(zip(other.shape, other.stride, strict=True)) if n == size and by == step]
    if len(fits) != 1 or size < 2 or step == 0:
        return None
    # Both must begin in the same row: their offsets differ by less than one step along the rows.
    low, high = sorted((place.offset, other.offset))
    return fits[0] if (high - low) // step % size == 0 else None


@dataclass(slots=True)
class _Block(Generic[Known]):
    """One storage. The weak reference keeps its address from being reused, without keeping its memory."""

    reference: Any
    places: dict[Place, Known] = field(default_factory=dict)
    spoiled: bool = False
    inputs: frozenset[int] = frozenset()


class Storages(Generic[Known]):
    """What is known of tensors, by their storage and their place in it.

    Attributes:
        has_inputs: whether any storage holds numbers that come from inputs.
        has_spoiled: whether any storage holds something unclear.

    >>> known = Storages[str]()
    >>> x = torch.zeros(4, 3)
    >>> known.note(x, "rows")
    >>> known.find(x.view(4, 3), lambda place, name, other: None, "unclear", lambda name: True)
    'rows'
    """

    def __init__(self) -> None:
        self._blocks: dict[int, _Block[Known]] = {}
        self.has_inputs = self.has_spoiled = False

    def __deepcopy__(self, memo: Any) -> Storages[Known]:
        return self  # a second owner of the same weak references would free them twice

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()

    def _block(self, tensor: Tensor, new: bool = False) -> _Block[Known] | None:
        try:
            storage = tensor.untyped_storage()
        except Exception:  # sparse, or wrapped: there is no one storage
            return None
        found = self._blocks.get(storage._cdata)
        if found is None and new:
            found = self._blocks[storage._cdata] = _Block(StorageWeakRef(storage))
        return found

    def note(self, tensor: Tensor, known: Known) -> None:
        """Note what is known of a tensor."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor, new=True)
            if block is not None:
                block.places[Place(int(tensor.storage_offset()), tensor.shape, tensor.stride())] = known

    def note_inputs(self, tensor: Tensor, inputs: frozenset[int]) -> None:
        """Note that numbers in a tensor's storage come from these inputs."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor, new=True)
            if block is not None:
                block.inputs |= inputs
                self.has_inputs |= bool(inputs)

    def written(self, tensor: Tensor, spoils: bool) -> None:
        """Note that a tensor was written; one that fills its storage replaces all that was known of it.

        ``spoils`` says that what was written is unclear, so that everything in the storage is unclear from now on.
        """
        with torch._C.DisableTorchFunction():
            block = self._block(tensor)
            if block is None:
                return
            whole = math.prod(tensor.shape) * tensor.element_size() == tensor.untyped_storage().nbytes()
            if whole:
                block.places.clear()
                block.inputs = frozenset()
            block.spoiled = spoils or (block.spoiled and not whole)
            self.has_spoiled |= block.spoiled

    def inputs(self, tensor: Tensor) -> frozenset[int]:
        """The inputs from which numbers in the tensor's storage come."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor)
            return frozenset() if block is None else block.inputs

    def spoiled(self, tensor: Tensor) -> bool:
        """Whether something unclear was written into the tensor's storage."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor)
            return block is not None and block.spoiled

    def find(
        self,
        tensor: Tensor,
        carry: Callable[[Place, Known, Place], Known | None],
        unclear: Known,
        matters: Callable[[Known], bool],
    ) -> Known | None:
        """What is known of an unmarked tensor: as noted for its place, carried over from another place, or ``unclear``.

        Args:
            carry: a function of a noted place, what is known of it, and the tensor's place.
            matters: whether something known is worth carrying over.
        """
        with torch._C.DisableTorchFunction():
            block = self._block(tensor)
            if block is None:
                return None
            place = Place.of(tensor)
            if place in block.places:
                return block.places[place]
            noted = [(other, known) for other, known in block.places.items() if matters(known)]
            if not noted:
                return None
            carried = [carry(other, known, place) for other, known in noted]
            found = {known for known in carried if known is not None}
            return found.pop() if len(found) == 1 else unclear
