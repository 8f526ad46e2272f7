"""A call: what the parts of a skeleton see while it runs, and the vocabulary that they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..plan.plan import Plan
from .layout import Layout, Run

TENSOR = object()
"""Marks the place of a tensor among outputs; ``None`` is an output like any other."""

Params = Mapping[str, Tensor]
Prepare = Callable[[nn.Module], Any]
Function = Callable[..., Tensor]


def read_mark(path: str) -> str:
    """What a call notes when a tensor of the module at ``path`` is read outside of its own forward.

    >>> read_mark("head")
    'a tensor of head'
    """
    return f"a tensor of {path}"


class Lift(Protocol):
    """How a member's function acts at a site: once for each of ``n`` members with ``rows`` rows, in one batch.

    ``present`` tells which members act at all; ``None``: all of them.
    """

    n: int
    rows: int
    present: Tensor | None

    def __call__(
        self, function: Function, p: Any, values: tuple[Tensor, ...], dims: tuple[int | None, ...], site: str
    ) -> tuple[Tensor, int | None]:
        """``function(p, *values)`` where axis ``dims[i]`` of ``values[i]`` counts rows; the result has ``dims[0]``."""
        ...

    def run(
        self,
        function: Callable[..., list[Tensor]],
        p: Any,
        values: list[Tensor],
        run: Run,
        index: int | None,
        site: str,
    ) -> list[Tensor]:
        """The same for a whole module call with any number of tensors in and out."""
        ...


class Watch(Protocol):
    """What the probe notes while a call runs (:mod:`funcdelta.run.probe`)."""

    def paused(self) -> AbstractContextManager[Any]:
        """A block in which nothing is noted."""
        ...

    def axis(self, site: str, value: Tensor) -> int | None:
        """The axis of ``value`` that counts rows; raises ``FoldError`` where rows are mixed."""
        ...

    def lifted(self, run: Callable[[], tuple[Tensor, int | None]]) -> tuple[Tensor, int | None]:
        """What a method's function gives for all members, by construction each its own."""
        ...

    def site(self, site: str, x: int | None, y: int | None) -> None:
        """One call of a site, with the axes of its hidden input and output."""
        ...

    def read(self, site: str) -> None:
        """A tensor of the module at ``site`` is read outside of its own forward."""
        ...

    def run(self, path: str, call: Call, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module that runs once per member."""
        ...

    def called(self, path: str) -> None:
        """The module at ``path`` is called."""
        ...


@dataclass
class Call:
    """What a skeleton's parts see while it runs.

    Attributes:
        params: the leaves of one member, or of all that ``lift`` splits.
        lift: how members share the batch; ``None``: there is one.
        layout: where their rows are; ``None`` where ``watch`` finds out.
        runs: modules that run once per member.
        watch: the probe, if it looks on.
        reached: collects the sites that the call passes through, if anyone asks.
        visits: how often each module was called.
        notes: what the features of a call keep for its length: spans, prompts, shared trunks.
        plain: eager code that nobody looks at, and in which no module runs once per member.
        never_ends: a view's call; ``ended``: one that is over, whose checkpointed modules may run again.
    """

    params: Params
    lift: Lift | None = None
    layout: Layout | None = None
    runs: Mapping[str, Run] = field(default_factory=dict)
    watch: Watch | None = None
    reached: set[str] | None = None
    visits: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    never_ends: bool = False
    ended: bool = False

    def visit(self, path: str) -> int | None:
        """Count one more call of the module at ``path``; the index of this one, ``None`` if it is made again."""
        if self.ended:
            return None
        index = self.visits.get(path, 0)
        self.visits[path] = index + 1
        return index

    def note(self, key: str, default: Callable[[], Any] = dict) -> Any:
        """What the feature ``key`` keeps for this call."""
        found = self.notes.get(key)
        if found is None:
            found = self.notes[key] = default()
        return found


class Host(Protocol):
    """What is installed in a skeleton sees of it (:class:`funcdelta.run.skeleton.Skeleton`).

    Attributes:
        module: the copy of the backbone's structure.
        plan: what it is opened for; ``None``: for nothing.
        units: the modules of it that are sharded.
        call: the call under way; ``kept``: one that has ended, whose checkpointed modules may run again.
        recomputing: the modules that checkpoint what they call.
    """

    call: Call | None
    kept: weakref.ref[Call] | None
    recomputing: frozenset[str]

    @property
    def module(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan | None: ...

    @property
    def units(self) -> tuple[str, ...]: ...

    @property
    def pads(self) -> bool:
        """Whether tables with a ``padding_idx`` may differ by member."""
        ...

    def under_way(self, path: str) -> Call:
        """The call that the module at ``path`` runs in."""
        ...

    def swap(self, overrides: Mapping[str, Tensor]) -> Callable[[], None]:
        """Put tensors in the place of the module's own; the function that puts those back."""
        ...

    def swapped(self, overrides: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The same inside a block."""
        ...

    def run_inside(
        self,
        path: str,
        forward: Callable[..., Any],
        params: Params,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
    ) -> Any:
        """``forward`` of the module at ``path``, within a call, with tensors of one member."""
        ...

    def check_unit(self, path: str, call: Call) -> None:
        """Refuse a sharded module that cannot run with tensors of the member's own."""
        ...

    def check_runner(self, path: str) -> None:
        """Refuse to map a module that checkpoints inside of itself."""
        ...
