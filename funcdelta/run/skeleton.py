"""The skeleton: a private structural copy of the backbone, opened at the sites of a plan.

A *skeleton* is a deep copy of the backbone's module tree that shares the storage of every parameter and owns its
buffers. Its opened modules do nothing until a *call* hands them params, so one skeleton serves all params of a plan. A
call swaps state in a skeleton, so each thread has its own, and one is reserved for compiled code. This file and what it
installs (:mod:`.opened`, :mod:`.reading`, :mod:`.attention`, :mod:`.prompt`) are the only places where a delta touches
a model.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import RecomputeError
from ..match import below, within
from ..plan.attachment import Attachment
from ..plan.plan import Plan
from ..structures.modules.structure import copy_structure, forget_batch_statistics, named_tensors, own_table
from ..transforms import inside_transform, outside_transforms
from .attending import attention_of
from .attention import open_attention
from .bound import added_in_both_modes, around_in_both_modes, bound_in_both_modes, rewritten
from .call import Call, Params, Prepare, read_mark
from .checkpointing import check_runner, note_reentrant, recomputing, require_grad_outside_transforms
from .conditions import Conditions
from .fsdp import check_unit, units
from .layout import LayoutMismatchError
from .lookups import padded
from .memory import Memory
from .opened import Opened, act
from .outputs import apart
from .prompt import Prompts
from .reading import READ, Kinds, own_parameters, refuse_written, rewritten_when_read, watch_reads

# Unless these have hooks, torch runs them by one kernel that calls no submodule and lacks derivatives.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)

Slot = tuple[dict[str, Any], str]


class Skeleton:
    """A copy of the backbone's structure, opened where the plan says; used by one call at a time.

    Args:
        training: the mode of all modules; with ``None``, ``flags`` gives each module's, by path.
        prepare: a function of the copied module, such as ``fully_shard``.
        view: whether users hold the module, which may then keep what calls change in it.

    Attributes:
        call: the running call; a view's never ends.
        kept: a call that has ended, but whose checkpointed modules may run again.
    """

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan | None,
        training: bool | None,
        prepare: Prepare | None,
        flags: Mapping[str, bool] = types.MappingProxyType({}),
        view: bool = False,
    ) -> None:
        # Tensors made in inference mode or in a transform could not be used by other calls.
        with torch.inference_mode(False), outside_transforms():
            # The bare backbone must be exact to the bit, and torch chooses kernels by what requires grad.
            self.module = copy_structure(backbone, trains=plan is None)
        for path, child in self.module.named_modules():
            child.training = flags.get(path, child.training) if training is None else training
        if not view:
            forget_batch_statistics(self.module)
        if prepare is not None:
            prepare(self.module)
        self.units = units(self.module)
        self.dtypes = {name: t.dtype for name, t in named_tensors(self.module)}
        self.plan, self._is_view = plan, view
        self.reads = plan.read if plan is not None else frozenset[str]()
        self.call: Call | None = None
        self.kept: weakref.ref[Call] | None = None
        self.recomputing = recomputing(self.module)
        self.nesting = [m for m in self.module.modules() if isinstance(m, nn.TransformerEncoder)]
        require_grad_outside_transforms(self.module)
        self.opened: dict[str, Opened] = {}
        self.sharing: set[str] = set()
        self.conditions: Conditions | None = None
        self.read_outside: Callable[[str, str, Tensor], Tensor] = self._read_outside
        self._slots: dict[str, Slot] = {}
        self.kinds: Kinds = {}
        own = ((path, vars(child)) for path, child in self.module.named_modules())
        self.hooked_backward = next(
            (p for p, v in own if v.get("_backward_hooks") or v.get("_backward_pre_hooks")), None
        )
        self._fused = [path for path, child in self.module.named_modules() if isinstance(child, FUSED)]
        self._remembers, self.clean = False, True
        if plan is not None:
            self._install(plan)
        self.memory = Memory(backbone, self.module)
        self._remembers = True
        tables = plan.own_tensors if plan is not None else frozenset[str]()
        self.pads = padded(map(self.module.get_submodule, tables))

    # -- installation ----------------------------------------------------------------------------------------------

    def _install(self, plan: Plan) -> None:
        for path in self._fused:
            # torch's fused kernels are not used for modules that have hooks.
            self.module.get_submodule(path).register_forward_hook(_stand_aside)
        begun = [a for a in plan.all() if a.site.exit is not None]
        for path in dict.fromkeys([*plan.attachments, *(a.site.path for a in begun)]):
            attachments = plan.attachments.get(path, ())
            prompting = tuple(a for a in attachments if a.prompt_rows)
            prompts = Prompts(self, path, prompting, act) if prompting else None
            if prompts is not None:
                prompts.open()
            self._open_site(path, [a for a in attachments if a.by_values], [a for a in begun if a.site.path == path])
            if any(a.by_values or a.by_weights for a in attachments):
                self._watch_reads(path)
            if any(a.has_two_forms for a in attachments):
                refuse_written(self.module, path)
            self._open_attention(path, [a for a in attachments if a.in_attention])
            if prompts is not None:
                prompts.close()
        for path in sorted(runner_candidates(plan)):
            self.open(path)
        if plan.conditions:
            self.conditions = Conditions(self, plan)

    def open(self, path: str) -> Opened:
        """Open the module at ``path``, so that it can act by values and run once per member."""
        if path not in self.opened:
            module = self.module.get_submodule(path)
            self.opened[path] = Opened(self, path, module)
            if any(within(path, above) for above in self._fused):
                module.register_forward_hook(_stand_aside)
            if self._remembers:
                self.memory.note()
        return self.opened[path]

    def _open_site(self, path: str, attachments: list[Attachment], begun: list[Attachment]) -> None:
        if not (attachments or begun):
            return
        opened = self.open(path)
        opened.befores = [bound_in_both_modes(a, "before") for a in attachments if a.acts().before is not None]
        opened.afters = [bound_in_both_modes(a, "after") for a in attachments if a.acts().after is not None]
        opened.begun = begun
        if not (opened.befores or begun) and all(b.alone and not b.spans for b in opened.afters):
            opened.quick = tuple(opened.afters)

    def _watch_reads(self, path: str) -> None:
        opened = self.open(path)

        def outside(name: str, tensor: Tensor) -> Tensor:
            return self.read_outside(path, name, tensor)

        # A view has its own table of parameters and its own classes (:mod:`funcdelta.views.frozen`).
        watch_reads(opened.module, lambda: opened.running > 0, outside, self.kinds, listed=not self._is_view)
        if not self._is_view:
            opened.shown = type(opened.module)

    def _open_attention(self, path: str, attachments: list[Attachment]) -> None:
        """Let methods act within the attention of the module at ``path``."""
        if attachments:
            added = [added_in_both_modes(a) for a in attachments if a.acts().attend is not None]
            around = [around_in_both_modes(a) for a in attachments if a.acts().around is not None]
            open_attention(path, self.module.get_submodule(path), attention_of(self, path, added, around))

    # -- what opened modules call ----------------------------------------------------------------------------------

    def under_way(self, path: str) -> Call:
        """The call that an opened module runs in; raises ``RecomputeError`` if a backward pass runs it without one."""
        call = self.call or (self.kept and self.kept())
        if call is None:
            known, self.recomputing = self.recomputing, self.recomputing | {path}
            raise RecomputeError(
                f"{path} runs again, as checkpointed modules do, but the state of its call is gone: "
                + (
                    "none of the call's outputs is alive. Keep one until the backward pass is over."
                    if known
                    else "it was not known to be checkpointed. It is known now: repeat the call."
                )
            )
        if self.recomputing and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            note_reentrant(True)
        return call

    def _read_outside(self, path: str, name: str, tensor: Tensor) -> Tensor:
        """The parameter ``name`` of a site for a reader outside of the site's own forward (see :mod:`.reading`)."""
        call = self.call or (self.kept and self.kept())
        plan = self.plan
        if call is None or plan is None or self.units:
            return tensor
        # A call rewrites tensors before it begins; a view, whose call never ends, when they are read.
        acting = [
            a
            for a in plan.attachments.get(path, ())
            if (a.has_two_forms or (a.by_weights and call.never_ends)) and a.among(call.params)
        ]
        if torch.compiler.is_compiling() and call.lift is not None:
            return tensor  # the probe made the reader run once per member, so here only facts are asked
        reached, place = call.reached, f"{path}.{name}"
        if not acting:
            if reached is None:
                return tensor

            def note() -> Tensor:
                reached.add(read_mark(path))
                return tensor

            return note() if torch.compiler.is_compiling() else rewritten_when_read(tensor, note, place, same=True)

        def compute() -> Tensor:
            if call.watch is not None:
                call.watch.read(path)
            if call.lift is not None:
                raise LayoutMismatchError(f"{path}.{name} differs by member and is read outside of {path}.")
            if call.reached is not None:
                call.reached.add(path)
            if any(a.has_two_forms for a in acting) and not (call.runs or torch.compiler.is_compiling()):
                call.note(READ)[path, name] = tensor
            changed = {below(path, name): tensor}
            for attachment in acting:
                own = self.own_tensors(path, changed)
                changed.update(rewritten(attachment, attachment.of(call.params), own, self.training_at(path)))
            found = changed[below(path, name)]
            # A view must not hand out the backbone's storage, even if its delta leaves the tensor as it is.
            return tensor.clone() if found is tensor and call.never_ends else found

        return compute() if torch.compiler.is_compiling() else rewritten_when_read(tensor, compute, place)

    def check_unit(self, path: str, call: Call) -> None:
        """Note that a module of a sharded backbone runs with a member's tensors; raises if it cannot."""
        if self.units:
            check_unit(path, self.units)
            call.note("ran", set).add(path)

    def check_runner(self, path: str) -> None:
        """Raise if the module at ``path`` checkpoints something inside, and so cannot be mapped."""
        check_runner(self, path)

    # -- calls -----------------------------------------------------------------------------------------------------

    def run(
        self, entry: str, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call | None = None
    ) -> Any:
        """The output of the module at ``entry``, called with its hooks, for the ``params`` of one member.

        Tensors of the module that ``params`` replace are swapped for the time of the call; deltas on hidden values act
        in opened modules, by the params of ``call``. A fold passes no ``params``, for nothing can be swapped there.
        """
        call = call or Call(params)
        overrides = self.overrides(params, entry) if params and (entry or not self.units) else None
        if self.memory.writes_buffers and inside_transform():
            # Transforms forbid writes to tensors from outside.
            buffers = self.module.named_buffers(remove_duplicate=False)
            overrides = {name: buffer.clone() for name, buffer in buffers} | (overrides or {})
        target = self.module.get_submodule(entry) if entry else self.module
        if torch.compiler.is_compiling():
            overrides = self.memory.buffers_now(entry) | (overrides or {})
            with self._during(call):
                if overrides:
                    cut = len(entry) + 1 if entry else 0
                    named = {name[cut:]: tensor for name, tensor in overrides.items()}
                    output = functional_call(target, named, args, kwargs, tie_weights=False)
                else:
                    output = target(*args, **kwargs)
            self.memory.put_back_traced()
            return output
        if self.nesting and inside_transform():
            # Transforms do not support nested tensors, which only save work on padding. The memory resets the flag.
            for module in self.nesting:
                module.use_nested_tensor = False
        # A KeyboardInterrupt may come between any two lines. A skeleton that is not clean is never used again.
        clean, self.clean = self.clean, False
        lent = [] if self._is_view or self.units or not torch.is_grad_enabled() else self.memory.lend()
        restore = self.swap(overrides) if overrides else None
        outer, self.call = self.call, call
        try:
            output = target(*args, **kwargs)
            return apart(output, self.memory.storages()) if self.memory.lends else output
        finally:
            self.call = outer
            if restore is not None:
                restore()
            for copied in lent:
                copied.put(copied.own)
            if self.units:
                self.memory.follow()
            else:
                self.memory.end_call()
            self.clean = clean

    def run_inside(
        self,
        path: str,
        forward: Callable[..., Any],
        params: Params,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
    ) -> Any:
        """The output of ``forward`` of the module at ``path`` with one member's tensors, inside a running call."""
        overrides = self.overrides(params, path)
        with self._during(call):
            if torch.compiler.is_compiling():
                bypass = self.opened[path].bypass(forward)
                cut = len(path) + 1 if path else 0
                named = {"module." + name[cut:]: tensor for name, tensor in overrides.items()}
                return functional_call(bypass, named, args, kwargs, tie_weights=False)
            try:
                with self.swapped(overrides):
                    return forward(*args, **kwargs)
            finally:
                if not (self.units or call.never_ends):
                    self.memory.restore_inside(path)

    @contextmanager
    def _during(self, call: Call) -> Iterator[None]:
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer

    @contextmanager
    def swapped(self, overrides: Mapping[str, Tensor]) -> Iterator[None]:
        """A block in which ``overrides`` take the place of the module's tensors."""
        restore = self.swap(overrides)
        try:
            yield
        finally:
            restore()

    def swap(self, overrides: Mapping[str, Tensor]) -> Callable[[], None]:
        """Put ``overrides`` in place of the module's tensors; returns a function that puts these back."""
        before: list[tuple[Any, Any, Any]] = []
        for name, tensor in overrides.items():
            table, own = self._slot(name)
            before.append((table, own, table[own]))
            table[own] = tensor

        def restore() -> None:
            for table, own, tensor in before:
                table[own] = tensor

        return restore

    def _slot(self, name: str) -> Slot:
        """The table that holds the tensor ``name``, and its name in it."""
        if name not in self._slots:
            path, _, own = name.rpartition(".")
            owner = self.module.get_submodule(path)
            table = next((t for t in (own_table(owner), owner._buffers) if own in t), vars(owner))
            self._slots[name] = table, own
        return self._slots[name]

    def overrides(self, params: Params, under: str = "") -> dict[str, Tensor]:
        """The tensors below the path ``under`` that ``params`` replace or rewrite, by each of their names."""
        plan = self.plan
        found: dict[str, Tensor] = {}
        if plan is None:
            return found
        if not (plan.rewriting or torch.compiler.is_compiling()) and plan.ends.keys().isdisjoint(params):
            return found
        for name, tensor in params.items():
            for end in plan.ends.get(name, ()):
                own = self.dtypes.get(end)
                if own is not None:  # a skeleton in training mode has no running statistics
                    found[end] = tensor if tensor.dtype == own else tensor.to(own)
        for path, attachments in plan.rewriting.items():
            for attachment in attachments:
                if attachment.among(params):
                    own = self.own_tensors(path, found)
                    found.update(rewritten(attachment, attachment.of(params), own, self.training_at(path)))
        return {name: tensor for name, tensor in found.items() if not under or name.startswith(under + ".")}

    def own_tensors(self, path: str, replaced: Params) -> dict[str, Tensor]:
        """The parameters of the module at ``path``, by their names in it, with those ``replaced`` so far."""
        module = self.module.get_submodule(path)
        return {name: replaced.get(below(path, name), tensor) for name, tensor in own_parameters(module).items()}

    def training_at(self, path: str) -> bool:
        """Whether the module at ``path`` is in training mode."""
        return self.module.get_submodule(path).training

    def settle(self) -> None:
        """Restore the skeleton after a call."""
        if self.units:
            self.memory.follow()
        else:
            self.memory.restore()


def runner_candidates(plan: Plan) -> set[str]:
    """The paths of modules that may run once per member: owners of tensors that differ by member, and modules above."""
    owners = {name.rpartition(".")[0] for ends in plan.trained.values() for name in ends}
    owners |= {a.site.path for a in plan.all() if a.by_weights}
    candidates: set[str] = set()
    for owner in owners:
        while owner:
            candidates.add(owner)
            owner = owner.rpartition(".")[0]
    return candidates


def _stand_aside(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook that does nothing: torch's fused kernels are not used for modules that have hooks."""
