"""What the modules of a view keep between calls, and how long it stays valid.

Models keep three kinds of things in their modules. The state of a text that is read token by token belongs to the
thread that reads it. A table computed from weights is valid until the leaves change. Running statistics are learned,
and stay. So when a call ends, whatever it left in the modules is taken out. The same thread's next call finds it there
again, unless something that it may depend on has changed.
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

    ``depends()`` returns what that may depend on. ``learns`` says whether the view keeps the buffers that modules
    write in training.
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
        """Begin a call: put back what this thread's last call left, if it is still valid."""
        self.memory.note_changes()
        for at in self._written():
            self._adopt(at)  # the view's owner wrote it: end() accounts for everything that calls write
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
        """End a call: keep what modules learned, and take the rest out until this thread's next call."""
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
        """The indices of buffers that were replaced or written in place."""
        memory, copies = self.memory, self.memory.copies
        found = [at for at, copied in enumerate(copies) if self._held(at) is not copied.own]
        if list(map(VERSION, memory.tensors)) != memory.versions:
            own = zip(copies, memory.versions[1::2], strict=True)
            found += [at for at, (copied, version) in enumerate(own) if copied.own._version != version]
        return list(dict.fromkeys(found))

    def _adopt(self, at: int) -> None:
        """Keep a buffer's present value."""
        copied, now = self.memory.copies[at], self._held(at)
        if isinstance(now, Tensor) and not now.is_inference():
            copied.own, copied.source = now, now.detach().clone()
            for table, name in copied.holders:
                self.memory.accept(table, name)
        self._settle(at)

    def _renew(self, at: int) -> None:
        """Restore a buffer that was written by calls in which nothing is learned."""
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
    """The dict in which a module of a view holds ``name``: its buffers, or its attributes."""
    return module._buffers if name in module._buffers else vars(module)
