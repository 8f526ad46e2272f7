"""What is known of the memory behind tensors, so that another tensor object over it is not taken for a new one.

``as_subclass``, ``.data`` and views made before something was written give objects that nobody has marked, over
memory that is. What is known of one place in a storage says, by strides, what another place in it holds.
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
    """The axis of ``other`` that goes through the same memory as ``axis`` of ``place``, entry by entry.

    >>> whole = Place.of(torch.zeros(5, 5, 4))
    >>> same_axis(Place.of(torch.zeros(5, 5, 4)[..., :2]), 1, whole), same_axis(whole, 0, Place.of(torch.zeros(5, 4)))
    (1, None)
    """
    size, step = place.shape[axis], place.stride[axis]
    fits = [i for i, (n, by) in enumerate(zip(other.shape, other.stride, strict=True)) if n == size and by == step]
    if len(fits) != 1 or size < 2 or step == 0:
        return None
    # Both begin in the same row: what lies between their beginnings is less than a step along the rows.
    low, high = sorted((place.offset, other.offset))
    return fits[0] if (high - low) // step % size == 0 else None


@dataclass(slots=True)
class _Block(Generic[Known]):
    """One storage; the weak reference keeps its address from being given to another."""

    reference: Any
    places: dict[Place, Known] = field(default_factory=dict)
    spoiled: bool = False
    inputs: frozenset[int] = frozenset()


class Storages(Generic[Known]):
    """What is known of tensors, by the place that they have in their storages.

    Attributes:
        has_inputs, has_spoiled: whether any storage has numbers of inputs, or something unclear in it.

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
        """Note what a tensor is."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor, new=True)
            if block is not None:
                block.places[Place(int(tensor.storage_offset()), tensor.shape, tensor.stride())] = known

    def note_inputs(self, tensor: Tensor, inputs: frozenset[int]) -> None:
        """Note which inputs numbers in a tensor's storage come from."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor, new=True)
            if block is not None:
                block.inputs |= inputs
                self.has_inputs |= bool(inputs)

    def written(self, tensor: Tensor, spoils: bool) -> None:
        """A tensor has been written: all of its storage is as new, or nothing is clear there from now on."""
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
        """The inputs that anything in the storage comes from."""
        with torch._C.DisableTorchFunction():
            block = self._block(tensor)
            return frozenset() if block is None else block.inputs

    def spoiled(self, tensor: Tensor) -> bool:
        """Whether something unclear was written into the storage."""
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
        """What an unmarked tensor is: as noted for its place, carried over from another one, or ``unclear``."""
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
