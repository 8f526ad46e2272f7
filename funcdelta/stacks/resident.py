"""Resident stacks: a stack of fixed capacity whose members come and go, each by one copy in place.

A serving process keeps the members that it answers with in one stack, allocated once. Storage and shapes never change,
so nothing that was compiled for the stack is compiled again, and a change costs one member's numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ParamsError, StackError
from .params import take
from .routing import Index, read_index

if TYPE_CHECKING:
    from ..model import DeltaModel


class Resident(Mapping[str, Tensor]):
    """A stack with ``capacity`` slots of ``delta``, for :meth:`DeltaModel.apply_rows` and ``bind_rows``.

    It is a mapping ``{name: (capacity, …)}`` as any stack is, over tensors of its own that never train. Where an index
    names a slot that holds no member, a call raises; compiled code cannot read an index: there ``check`` it before.

    Args:
        delta: whose members they are.
        capacity: how many slots there are.
        names: the leaves that members have, if not all of the delta's.
        dtype, device: of floating leaves, and where they stand; as in ``delta.init``.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> resident = fd.Resident(delta, capacity=100)
    >>> anna, bert = resident.put(delta.init(1)), resident.put(delta.init(2))
    >>> delta.apply_rows(resident, [bert, -1, anna], torch.zeros(3, 4)).shape
    torch.Size([3, 8])
    >>> resident.remove(anna)
    >>> delta.apply_rows(resident, [anna], torch.zeros(1, 4))
    Traceback (most recent call last):
    ...
    funcdelta.errors.StackError: Slot 0 holds no member: the slots in use are 1. Give the row -1, ...
    """

    def __init__(
        self,
        delta: DeltaModel,
        capacity: int,
        names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ParamsError(f"capacity={capacity!r}: write how many members there may be at once, at least 1.")
        like = delta.init(0, dtype=dtype, device=device)
        if unknown := [name for name in names or () if name not in like]:
            raise ParamsError(f"names: {unknown[0]!r} is no leaf of this delta; its leaves are delta.names.")
        self.leaves = {
            name: _room(leaf, capacity, leaf.shape) for name, leaf in like.items() if names is None or name in names
        }
        self.capacity = capacity
        self._used: set[int] = set()
        self._free = list(range(capacity))

    @classmethod
    def of(cls, delta: DeltaModel, stack: Mapping[str, Tensor], capacity: int) -> Resident:
        """The members of ``stack`` in the first slots of a resident stack, of their dtype and where they are.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> fd.Resident.of(delta, delta.init(0, n=3), capacity=5).used
        (0, 1, 2)
        """
        n = int(next(iter(stack.values())).shape[0])
        if n > capacity:
            raise ParamsError(f"A stack of {n} members does not fit into capacity={capacity}.")
        resident = cls(delta, capacity, names=tuple(stack))
        resident.leaves = {name: _room(leaf, capacity, leaf.shape[1:]) for name, leaf in stack.items()}
        for slot in range(n):
            resident.put(take(dict(stack), slot))
        return resident

    # -- members come and go ---------------------------------------------------------------------------------------

    def put(self, params: Mapping[str, Tensor]) -> int:
        """Copy one member into the lowest free slot; gives the slot. A slot that was removed is given out again.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident(delta, capacity=1)
        >>> resident.put(delta.init(0))
        0
        >>> resident.put(delta.init(0))
        Traceback (most recent call last):
        ...
        funcdelta.errors.StackError: All 1 slots hold a member: remove(slot) one, ...
        """
        if not self._free:
            raise StackError(
                f"All {self.capacity} slots hold a member: remove(slot) one, replace(slot, params), or make a larger "
                f"stack, fd.Resident.of(delta, resident.members(), capacity={2 * self.capacity})."
            )
        self._write(self._free[0], params)
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def replace(self, slot: int, params: Mapping[str, Tensor]) -> None:
        """Copy another member into a slot in use.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=2)
        >>> resident.replace(1, delta.init(7))
        >>> torch.equal(resident.member(1)["0.lora.lora_A"], delta.init(7)["0.lora.lora_A"])
        True
        """
        self.check([slot])
        self._write(slot, params)

    def remove(self, slot: int) -> None:
        """Empty a slot: its numbers become zero, and rows that name it raise.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=2)
        >>> resident.remove(0)
        >>> resident.used
        (1,)
        """
        self.check([slot])
        with torch.no_grad():
            for leaf in self.leaves.values():
                leaf[slot].zero_()
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def _write(self, slot: int, params: Mapping[str, Tensor]) -> None:
        """All of the member or nothing: what does not fit raises before the first copy."""
        for name in (*self.leaves, *params):
            leaf = params.get(name)
            room = self.leaves[name].shape[1:] if name in self.leaves else None
            if leaf is None or room is None or leaf.shape != room:
                found = "nothing" if leaf is None else tuple(leaf.shape)
                raise ParamsError(
                    f"A member of this stack has {name} of {'no shape' if room is None else tuple(room)}; found "
                    f"{found}. Put one member at a time, with the leaves that the stack was made for."
                )
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf[slot].copy_(params[name])

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def used(self) -> tuple[int, ...]:
        """The slots that hold a member, in order."""
        return tuple(sorted(self._used))

    def check(self, index: Index) -> None:
        """Raise ``StackError`` if a row of ``index`` names a slot without a member; -1 is the bare backbone.

        Values that cannot be read, in compiled code and transforms, are not checked.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> fd.Resident.of(delta, delta.init(0, n=2), capacity=9).check([1, 0, -1])
        """
        if torch.compiler.is_compiling():
            return
        read, _ = read_index(index, self.capacity, torch.device("cpu"))
        empty = sorted(set(read.tolist()) - self._used - {-1})
        if empty:
            used = ", ".join(map(str, self.used[:20])) + (" ..." if len(self.used) > 20 else "")
            raise StackError(
                f"Slot {empty[0]} holds no member: the slots in use are {used or 'none'}. Give the row -1, or put a "
                f"member there: slot = resident.put(params)."
            )

    def member(self, slot: int) -> dict[str, Tensor]:
        """A copy of the member in ``slot``.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> list(fd.Resident.of(delta, delta.init(0, n=2), capacity=9).member(1)) == list(delta.names)
        True
        """
        self.check([slot])
        return {name: leaf[slot].clone() for name, leaf in self.leaves.items()}

    def members(self) -> dict[str, Tensor]:
        """A plain stack of the members in the order of :attr:`used`: what to save, or to train on.

        >>> import tempfile
        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=9)
        >>> folder = delta.save_finetuned(resident.members(), tempfile.mkdtemp() + "/resident")
        >>> fd.members(fd.AutoDeltaModel.from_finetuned(folder, backbone_model=delta.backbone)[1])
        2
        """
        if not self._used:
            raise StackError("This stack holds no member yet: put(params) one.")
        return take(self.leaves, list(self.used))

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __repr__(self) -> str:
        return f"Resident({len(self._used)} of {self.capacity} slots in use, {len(self.leaves)} leaves)"


def _room(like: Tensor, capacity: int, shape: Sequence[int]) -> Tensor:
    """Zeros (capacity, …); what is made in inference mode could not be written later, outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(capacity, *shape, dtype=like.dtype, device=like.device)
