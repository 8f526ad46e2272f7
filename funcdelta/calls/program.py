"""The program of a delta: its skeletons, one a thread and mode, one a mode for compiled code."""

from __future__ import annotations

import threading

import torch
from torch import nn

from ..errors import StaleBackboneError
from ..planning.plan import Plan
from ..transforms import eager
from .recompute import changed, flags_of
from .sharded import Shards, refuse_sharded, settle
from .skeleton import Prepare, Skeleton


class Skeletons:
    """The skeletons of one plan: one a thread and mode, one a mode for compiled code, rebuilt when weights move."""

    def __init__(self, backbone: nn.Module, plan: Plan, prepare: Prepare | None) -> None:
        refuse_sharded(backbone)
        self.backbone, self.plan, self.prepare = backbone, plan, prepare
        self._local = threading.local()
        self._traced: dict[bool | None, Skeleton] = {}
        self._generation = 0
        self._shards: Shards = {}
        # A mode belongs to the delta: what becomes of the backbone's flags later does not matter.
        self.flags = {path: module.training for path, module in backbone.named_modules()}
        self._ends, self._checkpointing = self._first_and_last(), flags_of(backbone)

    def get(self, training: bool | None, hooked: bool = True) -> Skeleton:
        """This thread's skeleton in the given mode (``None``: the backbone's own flags)."""
        if torch.compiler.is_compiling():
            return self._traced[training]
        self.check()
        if getattr(self._local, "generation", None) != self._generation:
            self._local.cache, self._local.generation = {}, self._generation
        key = (training, hooked)
        if key not in self._local.cache:
            self._local.cache[key] = self.build(training, hooked)
        skeleton = self._local.cache[key]
        skeleton.follow_buffers()
        return skeleton

    @eager
    def build(self, training: bool | None, hooked: bool = True) -> Skeleton:
        """A skeleton that nobody else uses."""
        skeleton = Skeleton(self.backbone, self.plan if hooked else None, training, self.prepare, self.flags)
        settle(skeleton.module, skeleton.units, self._shards)
        return skeleton

    def spare(self, training: bool | None) -> Skeleton:
        """A skeleton of this thread's that no call needs any more, for one that may be recomputed."""
        skeletons = self._local.cache.setdefault(("kept", training), [])
        free = next((skeleton for skeleton in skeletons if skeleton.kept is None or skeleton.kept() is None), None)
        if free is None:
            skeletons.append(free := self.build(training))
        free.follow_buffers()
        return free

    def reserve(self, training: bool | None) -> None:
        """Build the skeleton that compiled code uses: tracing cannot build one."""
        if training not in self._traced:
            self._traced[training] = self.build(training)

    def refresh(self, plan: Plan | None = None) -> None:
        """Forget every skeleton; the next calls copy the backbone as it is now, hooked as ``plan`` says."""
        self.plan = plan or self.plan
        self._generation += 1
        self._shards = {}
        self._ends, self._checkpointing = self._first_and_last(), flags_of(self.backbone)
        self._traced = {training: self.build(training) for training in self._traced}

    def check(self) -> None:
        """Compare the first and the last parameter with what the skeletons share, and follow the checkpointing."""
        if changed(self._checkpointing):
            self.refresh()
        for module, name, pointer, dtype, device in self._ends:
            tensor = module._parameters.get(name)
            if tensor is None or (tensor.data_ptr(), tensor.dtype, tensor.device) != (pointer, dtype, device):
                raise StaleBackboneError(
                    f"The backbone's tensors moved after this delta was built (its {name} was {dtype} on {device}, "
                    f"is {'gone' if tensor is None else f'{tensor.dtype} on {tensor.device}'}): call delta.refresh() "
                    f"after backbone.to(...)."
                )

    def _first_and_last(self) -> list[tuple[nn.Module, str, int, torch.dtype, torch.device]]:
        owned = [(m, name, t) for m in self.backbone.modules() for name, t in m._parameters.items() if t is not None]
        ends = owned[:1] + owned[-1:]
        return [(module, name, t.data_ptr(), t.dtype, t.device) for module, name, t in ends]
