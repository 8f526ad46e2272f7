"""What the modules of a view keep from call to call, and for how long it holds.

Models keep things in their modules: states of a text that is read token by token, a table made of their weights, what
a batch has taught them. Of a view, the first belong to the thread that reads; the second are true for as long as the
leaves are those that they were made of; the third are learned, and stay. So what a call leaves behind is taken out of
the modules when it ends. It is there again in that thread's next call, unless something changed that it may depend on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..run.memory import VERSION
from ..run.skeleton import Skeleton
from .frozen import learns


class Remembered:
    """What calls leave in the modules of one view; see the module's docstring.

    ``depends()`` tells what it may depend on. ``learns`` says whether buffers that modules write in training are the
    view's to keep.
    """

    def __init__(self, skeleton: Skeleton, depends: Callable[[], Any], learns: bool) -> None:
        self.memory, self.depends, self.learns = skeleton.memory, depends, learns
        self._own = threading.local()
        self._dirty: set[int] = set()
        self._key: Any = None
        modules = dict(skeleton.module.named_modules())
        tables: dict[int, Any] = {id(module._buffers): module for module in modules.values()}
        tables |= {id(vars(module)): module for module in modules.values()}
        self._places: list[list[tuple[nn.Module, str]]] = []
        for copied in self.memory.copies:
            places = [(tables[id(table)], name) for table, name in copied.holders if id(table) in tables]
            if places:
                copied.holders = [(_table(module, name), name) for module, name in places]
            self._places.append(places)
        self.memory.note()

    def begin(self) -> None:
        """A call begins: what its thread's last one left is there again, where it still holds."""
        self.memory.note_changes()
        for at in self._written():
            self._adopt(at)  # by the view's owner, for a call leaves none that is not known
        left, self._own.left = getattr(self._own, "left", None), None
        if left is None and not self._dirty:
            return
        key = self.depends()
        if self._dirty and self._key != key:
            for at in self._dirty:
                self._renew(at)
            self._dirty.clear()
        if left is not None and left[0] == key:
            for one in left[1]:
                one.bring()

    def end(self, finished: bool) -> None:
        """It ends: what modules learned stays, and the rest is taken out until the thread comes again."""
        for at in self._written():
            if self.learns and any(m.training or learns(m, name) for m, name in self._places[at]):
                self._adopt(at)
            elif self._held(at) is self.memory.copies[at].own:
                self._dirty.add(at)
                self._settle(at)
        left = self.memory.left() if finished else []
        if left or self._dirty:
            self._key = self.depends()
            self._own.left = (self._key, left) if left else None
        self.memory.restore_attributes()

    # -- buffers ---------------------------------------------------------------------------------------------------

    def _held(self, at: int) -> Any:
        copied = self.memory.copies[at]
        if copied.fixed or not copied.holders:
            return copied.own
        table, name = copied.holders[0]
        return table.get(name) if isinstance(table, dict) else table[name] if name < len(table) else None

    def _written(self) -> list[int]:
        """Buffers in whose place others are, or that were written in place."""
        memory, copies = self.memory, self.memory.copies
        found = [at for at, copied in enumerate(copies) if self._held(at) is not copied.own]
        if list(map(VERSION, memory.tensors)) != memory.versions:
            own = zip(copies, memory.versions[1::2], strict=True)
            found += [at for at, (copied, version) in enumerate(own) if copied.own._version != version]
        return list(dict.fromkeys(found))

    def _adopt(self, at: int) -> None:
        """A buffer is meant to stay as it is now."""
        copied, now = self.memory.copies[at], self._held(at)
        if isinstance(now, Tensor) and not now.is_inference():
            copied.own, copied.source = now, now.detach().clone()
            for table, name in copied.holders:
                self.memory.accept(table, name)
        self._settle(at)

    def _renew(self, at: int) -> None:
        """A buffer is what it was before calls that teach nothing wrote it."""
        copied = self.memory.copies[at]
        with torch.inference_mode(False), torch.no_grad():
            copied.own = copied.source.clone()
        for table, name in copied.holders:
            table[name] = copied.own
            self.memory.accept(table, name)
        self._settle(at)

    def _settle(self, at: int) -> None:
        copied, memory = self.memory.copies[at], self.memory
        memory.tensors[2 * at : 2 * at + 2] = copied.source, copied.own
        memory.versions[2 * at : 2 * at + 2] = copied.source._version, copied.own._version
        memory.replaced()


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module of a view holds a buffer, or a tensor that is a plain attribute."""
    return module._buffers if name in module._buffers else vars(module)
