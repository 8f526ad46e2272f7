"""Calls of one view, serialised by a lock and cleaned up however they end.

A call keeps state in the view's modules (the input of a span, the members of the rows). So it holds a lock, and its
state is removed when it ends, even by ``KeyboardInterrupt`` or a cancelled task. Only the outermost call counts, and
any module may receive it: ``generate`` calls the encoder by itself, and people call a head.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import EngineError, StaleBackboneError
from ..locks import fork_safe_lock
from ..plan.sharing import Expanding
from ..run.call import Call
from ..run.conditions import CONDITIONS, GIVEN
from ..run.memory import VERSION
from ..run.old_functions import named_functions
from ..transforms import eager_alone, inside_backward

Function = Callable[..., Any]


class Remembering(Protocol):
    """What modules keep from call to call (:mod:`.remembering`)."""

    def begin(self) -> None:
        """Called before a call."""
        ...

    def end(self, finished: bool) -> None:
        """Called after it; ``finished`` is False if it raised."""
        ...


class Calls:
    """Tracks which thread, if any, is inside a call of a view.

    The view's modules show that thread what the backbone's would: every tensor, unguarded.

    Attributes:
        shared: the backbone's tensors that the view uses, by name.
        conditioned: the paths of the modules that may be given conditions of a call.

    >>> calls = Calls()
    >>> calls.inside(), calls.enter(torch.nn.Identity(), "", lambda module: calls.inside(), (), {})
    (False, True)
    """

    def __init__(self) -> None:
        self.lock = fork_safe_lock()
        self.thread: int | None = None
        self.guards: dict[int, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.remembered: Remembering | None = None
        self.conditioned: frozenset[str] = frozenset()
        self._own = threading.local()

    def inside(self) -> bool:
        """Whether this thread is inside a call, or compiling one."""
        return torch.compiler.is_compiling() or self.thread == threading.get_ident()

    def sees_all(self) -> bool:
        """Whether this thread is shown all of the model's tensors, unguarded."""
        return self.inside() or getattr(self._own, "looking", False)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """A block in which this thread sees the tensors that it would see inside a call."""
        before = getattr(self._own, "looking", False)
        self._own.looking = True
        try:
            yield
        finally:
            self._own.looking = before

    @contextlib.contextmanager
    def moving(self) -> Iterator[dict[int, Any]]:
        """A block that converts a module and its descendants; yields ``{id(tensor): (tensor, converted)}``."""
        known = getattr(self._own, "moved", None)
        if known is not None:
            yield known
            return
        self._own.moved = {}
        try:
            with self.looking():
                yield self._own.moved
        finally:
            del self._own.moved

    # At a graph break this runs as plain Python, which the compiler need not trace.
    @eager_alone
    def enter(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """``function(module, ...)`` as the outermost call, or as a part of this thread's current call."""
        if self.thread == threading.get_ident():
            return function(module, *args, **kwargs)
        if inside_backward() and isinstance(threading.current_thread(), threading._DummyThread):
            # One of autograd's threads is recomputing; the thread that holds the lock may be waiting for it.
            return function(module, *args, **kwargs)
        with self.lock:
            if self.thread is not None:
                raise EngineError(
                    "This process was forked while another thread was inside a call of this view, so the view's state "
                    "is incomplete here. Bind a new one: delta.bind(fd.unbind(view))."
                )
            before = list(map(VERSION, self.shared.values()))
            try:
                self.thread = threading.get_ident()
                output = self.make(module, path, function, args, kwargs)
            finally:
                self.thread = None
            if list(map(VERSION, self.shared.values())) != before:
                self._tell_written(before)
            return output

    @contextlib.contextmanager
    def given_to_all(self, conditions: Mapping[str, Tensor] | None) -> Iterator[None]:
        """A block in which every call that this thread makes is given these conditions."""
        before = getattr(self._own, "conditions", None)
        self._own.conditions = conditions
        try:
            yield
        finally:
            self._own.conditions = before

    def repeat(self, times: int) -> None:
        """From here on each row of this thread's calls stands ``times`` times, and what it was given, too."""
        given = getattr(self._own, "conditions", None)
        if given is not None and times != 1:
            repeated = {n: t.repeat_interleave(times, 0) if t.ndim and t.shape[0] > 1 else t for n, t in given.items()}
            self._own.conditions = repeated

    def with_conditions(self, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the module at ``path``, with the conditions that are given to all calls."""
        given = getattr(self._own, "conditions", None)
        return kwargs if given is None or path not in self.conditioned or GIVEN in kwargs else {**kwargs, GIVEN: given}

    def depends(self) -> Any:
        """What a call's results depend on besides its inputs, to compare with a later call's."""
        return torch.is_grad_enabled()

    def reading(self) -> contextlib.AbstractContextManager[Any]:
        """A block during which no call changes what the view holds."""
        return self.lock

    def _tell_written(self, before: list[int]) -> None:
        """Raise: the model's forward, or another thread meanwhile, wrote to a tensor of the backbone."""
        named = zip(self.shared.items(), before, strict=True)
        written = [name for (name, tensor), version in named if tensor._version != version]
        raise StaleBackboneError(
            f"{written[0]} belongs to the backbone and was written in place during a call of this view, which may "
            f"change its delta only. To train a copy of that tensor, name it in the config: "
            f'unfrozen_modules=["deltas", "{written[0]}"].'
        )

    def make(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run one outermost call, of the module at ``path``."""
        return function(module, *args, **kwargs)

    def trace(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """As :meth:`make` in compiled code, where a call holds no lock and leaves nothing behind."""
        return function(module, *args, **kwargs)


class MemberCalls(Calls):
    """The calls of a view of one member, whose :class:`Call` never ends."""

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        leaves: Mapping[str, Tensor],
        given: Expanding,
        verify: Callable[[Call], None] | None,
    ) -> None:
        super().__init__()
        self.module, self.call, self.leaves, self.given, self.verify = module, call, leaves, given, verify
        self.expands = len(given) > len(leaves)
        if verify is not None:
            call.reached = set()

    def depends(self) -> Any:
        """The mode, and the identity and version of every leaf."""
        leaves = list(self.leaves.values())
        written = [None if leaf.is_inference() else leaf._version for leaf in leaves]
        return super().depends(), self.module.training, list(map(id, leaves)), written

    def make(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run the call between ``begin`` and ``end`` of what modules remember; a recomputation finds it in place."""
        remembered = None if inside_backward() else self.remembered
        if remembered is None:
            return self._call(module, path, function, args, kwargs)
        finished = False
        try:
            remembered.begin()
            output = self._call(module, path, function, args, kwargs)
            finished = True
            return output
        finally:
            remembered.end(finished)

    def _call(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run the call; one of the whole model clears the notes of the call before it, and its own at the end."""
        call, kwargs = self.call, self.with_conditions(path, kwargs)
        if path:
            return self._part(module, function, args, kwargs)
        try:
            call.notes = {}
            self.given.begin()
            with named_functions():
                output = function(module, *args, **kwargs)
            if self.verify is not None:
                self.verify(call)
                self.verify = call.reached = None
            return output
        finally:
            self.given.end()
            call.notes = {}

    def trace(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run the call with shared leaves expanded once, inside the graph."""
        if path or not self.expands:
            return function(module, *args, **kwargs)
        self.given.begin()
        try:
            return function(module, *args, **kwargs)
        finally:
            self.given.end()

    def _part(self, module: nn.Module, function: Function, args: Any, kwargs: Any) -> Any:
        """Call one module by itself. People may call layer after layer, so each thread's notes outlive the call.

        What a call tells of its texts does not: the next part may be given others.
        """
        whole, own = self.call.notes, vars(self._own).setdefault("notes", {})
        try:
            self.call.notes = own
            return function(module, *args, **kwargs)
        except BaseException:
            own.clear()
            raise
        finally:
            own.pop(CONDITIONS, None)
            self.call.notes = whole
