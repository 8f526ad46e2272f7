"""Resident stacks: stacks of fixed capacity whose members are added and removed by copying in place.

A serving process keeps its members in one stack that is allocated once. Storage and shapes never change, so code that
was compiled for the stack is not compiled again, and a change copies one member.

A member is identified by its *slot*, a number that is never reused: its row, plus ``capacity`` for each member that the
row held before. So a request that names a removed member raises even if another member has taken the row, and code
without access to a table can compute the row as ``slot % capacity``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ParamsError, StackError, shown
from ..kinds import count
from ..locks import fork_safe_lock
from ..transforms import is_wrapped
from .leaves import check_leaves
from .routing import Index, pick_rows, read_index
from .stack import members, take


class Delta(Protocol):
    """The part of a delta that a resident stack needs."""

    def init(
        self, seed: int, /, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Mapping[str, Tensor]:
        """One member's params."""
        ...


class Resident(Mapping[str, Tensor]):
    """A stack with room for ``capacity`` members of ``delta``, for :meth:`DeltaModel.apply_rows` and ``bind_rows``.

    Like any stack, it is a mapping ``{name: (capacity, …)}``; its tensors are its own and never train. A call whose
    index names an empty slot raises.

    Any number of threads may share it. Changes, and each :meth:`pick` of a batch's members, exclude one another, so a
    batch sees the members before a change or after it, never a mixture. A change that fails or is interrupted leaves
    the members as they were. Code that reads the leaves directly (such as compiled code, which cannot check an index
    either) holds the lock and uses rows instead of slots:

        with resident.lock:
            out = compiled(resident.leaves, resident.rows(index), batch)

    Args:
        delta: the delta whose members it holds.
        capacity: the largest number of members at any time.
        names: the leaves that members have, if not all of the delta's.
        dtype, device: of floating leaves and of all leaves, as in ``delta.init``.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> resident = fd.Resident(delta, capacity=100)
    >>> anna, bert = resident.put(delta.init(1)), resident.put(delta.init(2))
    >>> delta.apply_rows(resident, [bert, -1, anna], torch.zeros(3, 4)).shape
    torch.Size([3, 8])
    >>> resident.remove(anna)
    >>> resident.put(delta.init(3))
    100
    >>> delta.apply_rows(resident, [anna], torch.zeros(1, 4))
    Traceback (most recent call last):
    ...
    funcdelta.errors.StackError: Slot 0 holds no member: it was removed, and slot 100 took its place. ...
    """

    def __init__(
        self,
        delta: Delta,
        capacity: int,
        names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        capacity = count(capacity, "capacity", "members there may be at once", least=1)
        like = delta.init(0, dtype=dtype, device=device)
        if unknown := [name for name in names or () if name not in like]:
            raise ParamsError(f"names: {shown(unknown[0])} is not a leaf of this delta; its leaves are delta.names.")
        self.leaves = {
            name: _room(leaf, capacity, leaf.shape) for name, leaf in like.items() if names is None or name in names
        }
        self.capacity = capacity
        self.lock = fork_safe_lock()
        # For each row: the slot of its member, and that of its next one. A row with a slot is in use, so a single
        # assignment puts it into use, with no state in between.
        self._slots: list[int | None] = [None] * capacity
        self._next = list(range(capacity))

    @classmethod
    def of(cls, delta: Delta, stack: Mapping[str, Tensor], capacity: int) -> Resident:
        """A resident stack with the members of ``stack`` in its first slots, on their device and with their dtypes.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> fd.Resident.of(delta, delta.init(0, n=3), capacity=5).used
        (0, 1, 2)
        """
        check_leaves(stack, "Resident.of")
        n = members(dict(stack))
        resident = cls(delta, capacity, names=tuple(stack))
        if n > capacity:
            raise ParamsError(f"A stack of {n} members does not fit into capacity={capacity}.")
        for name, leaf in stack.items():
            if leaf.shape[1:] != (shape := resident.leaves[name].shape[1:]):
                expected = f"({', '.join(map(str, (n, *shape)))})"
                raise ParamsError(f"Resident.of: {name} has shape {tuple(leaf.shape)}; expected {expected}.")
        resident.leaves = {name: _room(leaf, capacity, leaf.shape[1:]) for name, leaf in stack.items()}
        for slot in range(n):
            resident.put(take(dict(stack), slot))
        return resident

    # -- changes ---------------------------------------------------------------------------------------------------

    def put(self, params: Mapping[str, Tensor]) -> int:
        """Copy one member into the first free row; returns its slot, a number that is never reused.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident(delta, capacity=1)
        >>> resident.put(delta.init(0))
        0
        >>> resident.put(delta.init(0))
        Traceback (most recent call last):
        ...
        funcdelta.errors.StackError: All 1 slots hold a member: remove(slot) one, ...
        """
        member = self._fitting(params)
        with self.lock:
            if None not in self._slots:
                raise StackError(
                    f"All {self.capacity} slots hold a member: remove(slot) one, replace(slot, params), or make a "
                    f"larger stack, fd.Resident.of(delta, resident.members(), capacity={2 * self.capacity})."
                )
            row = self._slots.index(None)
            slot = self._next[row]
            try:
                self._write(row, member)
                self._next[row] = slot + self.capacity
                self._slots[row] = slot
            except BaseException:
                self._slots[row] = None
                self._clear(row)
                raise
        return slot

    def replace(self, slot: int, params: Mapping[str, Tensor]) -> None:
        """Replace the member in ``slot`` by a copy of another one, which keeps the slot's number.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=2)
        >>> resident.replace(1, delta.init(7))
        >>> torch.equal(resident.member(1)["0.lora.lora_A"], delta.init(7)["0.lora.lora_A"])
        True
        """
        member = self._fitting(params)
        with self.lock:
            row = self._row(slot)
            number, before = self._slots[row], self._copy(row)
            self._slots[row] = None  # while the row holds a mixture of both
            try:
                self._write(row, member)
                self._slots[row] = number
            except BaseException:
                self._slots[row] = None
                self._write(row, before)
                self._slots[row] = number
                raise

    def remove(self, slot: int) -> None:
        """Remove a member: its leaves become zero, and an index that names its slot raises from now on.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=2)
        >>> resident.remove(0)
        >>> resident.used
        (1,)
        """
        with self.lock:
            row = self._row(slot)
            self._slots[row] = None
            self._clear(row)

    def _fitting(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves of one member, exactly those of this stack; raises, before anything is written, if they differ."""
        if not isinstance(params, Mapping):
            raise ParamsError(f"A member is a dict of tensors; found {type(params).__name__}.")
        given: dict[str, Any] = dict(params)
        for name in (*self.leaves, *given):
            leaf = given.get(name)
            room = self.leaves[name].shape[1:] if name in self.leaves else None
            if (problem := _unlike(leaf, room)) is not None:
                raise ParamsError(
                    f"{_short(name)}: expected {'no such leaf' if room is None else tuple(room)} in a member of this "
                    f"stack; found {problem}. Put one member at a time, with the leaves that the stack was made for."
                )
        return {name: given[name] for name in self.leaves}

    def _write(self, row: int, member: Mapping[str, Tensor]) -> None:
        self._settle()
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf[row].copy_(member[name])
        self._settle()

    def _clear(self, row: int) -> None:
        self._settle()
        with torch.no_grad():
            for leaf in self.leaves.values():
                leaf[row].zero_()

    def _settle(self) -> None:
        """Wait for accelerators, because threads may use different streams, which the lock does not order."""
        for device in {leaf.device for leaf in self.leaves.values()}:
            if device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(device)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def used(self) -> tuple[int, ...]:
        """The slots that hold a member, in order."""
        with self.lock:
            return self._used()

    def _used(self) -> tuple[int, ...]:
        return tuple(sorted(slot for slot in self._slots if slot is not None))

    def check(self, index: Index) -> None:
        """Raise ``StackError`` if ``index`` names a slot without a member; -1 is the bare backbone.

        In compiled code and transforms values cannot be read, and are not checked. Another thread may remove a member
        right afterwards; :meth:`pick` checks and reads in one step.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> fd.Resident.of(delta, delta.init(0, n=2), capacity=9).check([1, 5])
        Traceback (most recent call last):
        ...
        funcdelta.errors.StackError: Slot 5 holds no member. The slots in use are 0, 1: ...
        """
        self.rows(index)

    def rows(self, index: Index) -> Tensor:
        """The rows of the leaves that hold the members of ``index``, after :meth:`check`; -1 stays -1.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=3), capacity=3)
        >>> resident.remove(1)
        >>> slot = resident.put(delta.init(1))
        >>> slot, resident.rows([slot, -1, 2])
        (4, tensor([ 1, -1,  2]))
        """
        read, _ = read_index(index, None, next(iter(self.leaves.values())).device)
        if not (torch.compiler.is_compiling() or is_wrapped(read)):
            with self.lock:
                for slot in sorted(set(read.tolist()) - {-1}):
                    self._row(slot)
        return torch.where(read < 0, read, read % self.capacity)

    def pick(self, index: Index, times: int = 1) -> dict[str, Tensor]:
        """A copy of each row's member, that of ``index[i // times]`` for row i; for -1 any member, to be masked.

        It checks the index and copies all leaves in one step, so that nothing can change in between.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=9)
        >>> resident.pick([1, -1, 0], times=2)["0.lora.lora_A"].shape
        torch.Size([6, 8, 4])
        """
        if torch.compiler.is_compiling():
            return pick_rows(self.leaves, self.rows(index), times)
        with self.lock:
            return pick_rows(self.leaves, self.rows(index), times)

    def _row(self, slot: int) -> int:
        """The row of a slot in use; raises ``StackError`` for others."""
        try:
            number = operator.index(slot)
        except TypeError:
            raise ParamsError(f"A slot is a number that put(params) returned; found {slot!r}.") from None
        row = number % self.capacity
        other = self._slots[row]
        if other == number and not isinstance(slot, bool):
            return row
        why = ": it was removed" if 0 <= number < self._next[row] else ""
        why += f", and slot {other} took its place" if why and other is not None else ""
        used = self._used()
        listed = ", ".join(map(str, used[:20])) + (" ..." if len(used) > 20 else "")
        raise StackError(
            f"Slot {slot} holds no member{why}. The slots in use are {listed or 'none'}: use one of them, or -1 for "
            f"the bare backbone, or add the member: slot = resident.put(params)."
        )

    def member(self, slot: int) -> dict[str, Tensor]:
        """A copy of the member in ``slot``.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> list(fd.Resident.of(delta, delta.init(0, n=2), capacity=9).member(1)) == list(delta.names)
        True
        """
        with self.lock:
            return self._copy(self._row(slot))

    def _copy(self, row: int) -> dict[str, Tensor]:
        return {name: leaf[row].clone() for name, leaf in self.leaves.items()}

    def members(self) -> dict[str, Tensor]:
        """A plain stack of the members in the order of :attr:`used`, to save or to train further.

        >>> import tempfile
        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> resident = fd.Resident.of(delta, delta.init(0, n=2), capacity=9)
        >>> folder = delta.save_finetuned(resident.members(), tempfile.mkdtemp() + "/resident")
        >>> fd.members(fd.AutoDeltaModel.from_finetuned(folder, backbone_model=delta.backbone)[1])
        2
        """
        with self.lock:
            used = self._used()
            if not used:
                raise StackError("This stack holds no member yet: put(params) one.")
            return take(self.leaves, [slot % self.capacity for slot in used])

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, taken at one moment under the lock; they have their own lock."""
        with self.lock:
            leaves = {
                name: leaf.detach().clone().requires_grad_(leaf.requires_grad) for name, leaf in self.leaves.items()
            }
            return self.__dict__ | {"leaves": leaves, "_slots": list(self._slots), "_next": list(self._next)}

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __repr__(self) -> str:
        return f"Resident({len(self.used)} of {self.capacity} slots in use, {len(self.leaves)} leaves)"


def _room(like: Tensor, capacity: int, shape: Sequence[int]) -> Tensor:
    """Zeros (capacity, …), made outside inference mode so that they can be written later."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(capacity, *shape, dtype=like.dtype, device=like.device)


def _short(name: Any) -> str:
    return name if isinstance(name, str) and len(name) < 200 else shown(name)


def _unlike(leaf: Any, room: torch.Size | None) -> str | None:
    """What ``leaf`` is, if it cannot be copied into ``room``; ``None`` if it can."""
    if leaf is None:
        return "nothing"
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    if leaf.is_meta or leaf.layout != torch.strided:
        return "a meta tensor, without values" if leaf.is_meta else f"the layout {leaf.layout}"
    if leaf.is_nested or leaf.is_quantized:
        return "a nested tensor" if leaf.is_nested else f"quantised numbers, {leaf.dtype}"
    if leaf.shape != room:
        return str(tuple(leaf.shape))
    return "a tensor of a running transform" if is_wrapped(leaf) else None
