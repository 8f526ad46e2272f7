"""The skeleton: a private structural copy of the backbone in which sites are hooked.

A *skeleton* is a deep copy of the backbone's module tree that shares the storage of every parameter and owns its
buffers. Hooks on it do nothing until a *call* hands them params, so one skeleton serves every delta of a plan.
A call swaps state in a skeleton, so each thread has its own and compiled code has one reserved for it.
This file is the only place where a delta touches a model.
"""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..errors import ConfigError, FuncdeltaError, RecomputeError
from ..planning.plan import Attachment, Plan
from ..planning.spans import Stash, keep, take
from ..sites.structure import copy_structure, forget_batch_statistics, named_tensors, paired_buffers
from ..transforms import inside_transform, is_wrapped, outside_transforms
from .acting import Bound, added_in_both_modes, bound_in_both_modes, rewritten
from .attend import Added, attend_with, attention_mark, by_head, open_attention
from .hidden import hidden_input, hidden_output
from .layout import Layout, Recorder, SiteLayout
from .prompt import Prompts
from .recompute import check_runner, note_reentrant, recomputing, require_grad_outside_transforms
from .sharded import check_unit, units
from .trunk import Ends, Trunk

# torch runs these by one kernel that calls no submodule and has few derivatives, unless they have hooks.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)

VERSION = operator.attrgetter("_version")

TENSOR = object()
"""Marks the place of a tensor among outputs; ``None`` is an output like any other."""

Params = Mapping[str, Tensor]
Prepare = Callable[[nn.Module], Any]


class Lift(Protocol):
    """How a member's function acts at a site: once, or for each of the members folded into the batch.

    ``n`` members have ``rows`` each. ``present`` tells which members act at all; ``None``: all of them.
    """

    n: int
    rows: int
    present: Tensor | None

    def __call__(
        self,
        function: Callable[..., Tensor],
        p: Any,
        values: tuple[Tensor, ...],
        dims: tuple[int | None, ...],
        site: str,
    ) -> tuple[Tensor, int | None]:
        """``function(p, *values)`` where axis ``dims[i]`` of ``values[i]`` counts rows; the result has ``dims[0]``."""
        ...

    def run(
        self,
        function: Callable[..., list[Tensor]],
        p: Any,
        values: list[Tensor],
        layout: SiteLayout,
        site: str,
        bare: Callable[[], list[Tensor]],
    ) -> list[Tensor]:
        """The same for a whole module call with any number of tensors in and out; ``bare`` calls it without a delta."""
        ...


@dataclass
class Call:
    """What hooks see while a skeleton runs: the params, and how a member's function acts at a site."""

    params: Params
    lift: Lift | None = None
    layout: Layout | None = None
    runners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recorder: Recorder | None = None
    reached: set[str] | None = None
    visits: dict[str, int] = field(default_factory=dict)
    input_dims: dict[str, int | None] = field(default_factory=dict)
    prompted: dict[str, tuple[int, int]] = field(default_factory=dict)
    stash: Stash = field(default_factory=dict)
    never_ends: bool = False
    ended: bool = False
    ran: set[str] = field(default_factory=set)
    trunk: Trunk | None = None
    opened: dict[str, Ends | None] = field(default_factory=dict)

    def next_visit(self, path: str) -> int | None:
        """Which call of the module at ``path`` comes next; ``None``: one of those that were made, again."""
        return None if self.ended else self.visits.get(path, 0)

    def visit(self, path: str) -> int | None:
        """Count one more call of the module at ``path``; the index of this one, ``None`` if it is made again."""
        if self.ended:
            return None
        index = self.visits.get(path, 0)
        self.visits[path] = index + 1
        return index


class Bypass(nn.Module):
    """Runs a module's own forward without its hooks, so that a hook can run its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.original = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class Skeleton:
    """One copy of the backbone's structure, hooked at the plan's sites; used by one call at a time.

    ``call`` is the call under way; in a view it never ends. ``kept`` is one that has ended, whose checkpointed modules
    may run again. ``training`` sets one mode, else ``flags`` tell each module's (by path).
    """

    def __init__(
        self,
        backbone: nn.Module,
        plan: Plan | None,
        training: bool | None,
        prepare: Prepare | None,
        flags: Mapping[str, bool] = types.MappingProxyType({}),
    ) -> None:
        # Copies made in inference mode or in a transform would be spoilt for every other call.
        with torch.inference_mode(False), outside_transforms():
            # Without a delta it is the backbone to the bit, and kernels are chosen by who requires grad.
            self.module = copy_structure(backbone, trains=plan is None)
        self._buffers = paired_buffers(backbone, self.module)
        self._versions = list(map(VERSION, self._buffers))
        self.writes_buffers = False
        for path, child in self.module.named_modules():
            child.training = flags.get(path, child.training) if training is None else training
        forget_batch_statistics(self.module)
        if prepare is not None:
            prepare(self.module)
        self.units = units(self.module)
        self._dtypes = {name: t.dtype for name, t in named_tensors(self.module)}
        self.plan = plan
        self.call: Call | None = None
        self.kept: weakref.ref[Call] | None = None
        self.recomputing = recomputing(self.module)
        require_grad_outside_transforms(self.module)
        self.bypasses: dict[str, Bypass] = {}
        self.sharing: set[str] = set()
        if plan is not None:
            for child in self.module.modules():
                if isinstance(child, FUSED):
                    child.register_forward_hook(_stand_aside)
            begun = [a for a in plan.all() if a.site.exit is not None]
            for path in dict.fromkeys([*plan.attachments, *(a.site.path for a in begun)]):
                attachments = plan.attachments.get(path, ())
                prompting = tuple(a for a in attachments if a.prompt_rows)
                prompts = Prompts(self, path, prompting, _act) if prompting else None
                if prompts is not None:
                    prompts.open()
                acting = tuple(a for a in attachments if a.by_values)
                self._hook(path, acting, tuple(a for a in begun if a.site.path == path))
                self._open_attention(path, [added_in_both_modes(a) for a in attachments if a.adds_keys])
                if prompts is not None:
                    prompts.close()
            for path in sorted(runner_candidates(plan)):
                self.open_forward(path)

    def follow_buffers(self) -> None:
        """Copy the backbone's buffers again where either side was written since.

        Parameters are shared, buffers are not; and what a call writes into them is forgotten: a call has no memory.
        """
        # One pass in C over all of them, for models may have thousands.
        if list(map(VERSION, self._buffers)) == self._versions:
            return
        with torch.no_grad(), outside_transforms():
            for at in range(0, len(self._buffers), 2):
                source, own = self._buffers[at : at + 2]
                if [source._version, own._version] != self._versions[at : at + 2]:
                    self.writes_buffers |= own._version != self._versions[at + 1]
                    own.copy_(source)
        self._versions = list(map(VERSION, self._buffers))

    # -- installation ----------------------------------------------------------------------------------------------

    def _hook(self, path: str, attachments: tuple[Attachment, ...], begun: tuple[Attachment, ...]) -> None:
        """Real hooks, because torch's fused paths look for hooks and stand aside for them.

        ``attachments`` act at ``path``; the spans of ``begun`` begin there.
        """
        befores = [bound_in_both_modes(a, "before") for a in attachments if a.config.gives("before")]
        afters = [bound_in_both_modes(a, "after") for a in attachments if a.config.gives("after")]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._before(self.under_way(path), path, befores, begun, module.training, args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._after(self.under_way(path), path, afters, module.training, args, kwargs, output)

        module = self.module.get_submodule(path)
        if befores or begun:
            module.register_forward_pre_hook(enter, with_kwargs=True)
        if attachments or begun:
            module.register_forward_hook(leave, with_kwargs=True)

    def _open_attention(self, path: str, attended: list[Bound]) -> None:
        """Let keys and values be added to those of the attention module at ``path``."""
        if not attended:
            return

        def attention(original: Any, implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            call = self.under_way(path)
            if call.reached is not None:
                call.reached.add(attention_mark(path))
            acting = [bound for bound in attended if bound[0].among(call.params)]
            if not acting:
                return original(module, *args, **kwargs)
            added = [_added(call, path, bound, module.training, args[0], args[1]) for bound in acting]
            return attend_with(added, path, original, implementation, module, *args, **kwargs)

        open_attention(path, self.module.get_submodule(path), attention)

    def open_forward(self, path: str) -> None:
        """Let the module at ``path`` be run once per member, with weights of the member's own."""
        module = self.module.get_submodule(path)
        bypass = Bypass(module)
        # A plain attribute: registered, it would make the module its own grandchild.
        self.bypasses[path] = bypass

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self.under_way(path)
            if path not in call.runners and call.recorder is None:
                return bypass.original(*args, **kwargs)
            return self._run_members(call, path, args, kwargs)

        module.forward = forward  # type: ignore[method-assign]
        module.register_forward_hook(_stand_aside)

    def under_way(self, path: str) -> Call:
        """The call that a hook belongs to; without one the module is being recomputed for a backward pass."""
        call = self.call or (self.kept and self.kept())
        if call is None:
            known, self.recomputing = self.recomputing, self.recomputing | {path}
            raise RecomputeError(
                f"{path} runs again, as what is checkpointed does, and its call is gone: "
                + (
                    "none of the call's outputs is held any more. Hold one until the backward pass is over."
                    if known
                    else "that it is checkpointed was not seen before. It is known now: make the call again."
                )
            )
        if self.recomputing and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            note_reentrant(True)
        return call

    # -- a call at a site ------------------------------------------------------------------------------------------

    def _before(
        self,
        call: Call,
        path: str,
        befores: list[Bound],
        begun: tuple[Attachment, ...],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        x, put_back = hidden_input(path, args, kwargs)
        x_dim = None if call.layout is None else call.layout.site(path, call.next_visit(path)).x
        changed = False
        for attachment, function in befores:
            if attachment.key in call.params:
                x, x_dim = _act(call, path, function[training], attachment.of(call.params), (x,), (x_dim,))
                changed = True
        if changed and call.layout is not None:
            call.input_dims[path] = x_dim
        for attachment in begun:
            if attachment.key in call.params:
                keep(call.stash, attachment.key, attachment.site, x, x_dim, replace=call.never_ends or call.ended)
        return put_back(x) if changed else None

    def _after(
        self,
        call: Call,
        path: str,
        afters: list[Bound],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        x = args[0] if args and isinstance(args[0], Tensor) else hidden_input(path, args, kwargs)[0]
        y, put_back = (output, None) if isinstance(output, Tensor) else hidden_output(path, output)
        x_dim = y_dim = None
        if call.reached is not None:
            call.reached.add(path)
        if call.recorder is not None:
            call.recorder.site(path, x, y)
        if call.layout is not None:
            # Counted only here: in compiled code a counter that lives on would be a new graph a call.
            dims = call.layout.site(path, call.visit(path))
            x_dim, y_dim = call.input_dims.pop(path, dims.x), dims.y
        changed = False
        for attachment, function in afters:
            if attachment.key in call.params:
                given, given_dim = x, x_dim
                if attachment.site.exit is not None:
                    given, given_dim = take(call.stash, attachment.key, attachment.site)
                p = attachment.of(call.params)
                y, y_dim = _act(call, path, function[training], p, (y, given), (y_dim, given_dim))
                changed = True
        if not changed:
            return None
        return y if put_back is None else put_back(y)

    def _run_members(self, call: Call, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module at ``path`` with weights of the member's own: once, or once for each folded member."""
        if self.units and path in call.runners:
            check_unit(path, self.units)
            call.ran.add(path)
        if call.recorder is None and call.lift is None:
            return self._run_one(call, path, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shape_of_output: list[Any] = []

        def member(p: Params, *tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            output = self.run(path, p, args, kwargs)
            out_leaves, out_spec = pytree.tree_flatten(output)
            shape_of_output[:] = [out_spec, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]]
            return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

        if call.recorder is not None:
            alone = path in call.runners
            output = self._run_one(call, path, args, kwargs) if alone else self.bypasses[path](*args, **kwargs)
            call.recorder.run(path, tensors, [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)])
            return output
        assert call.layout is not None
        assert call.lift is not None
        check_runner(self, path)
        p = {key: call.params[key] for key in call.runners[path]}

        def bare() -> list[Tensor]:
            output = self.run(path, {}, args, kwargs)
            return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

        results = iter(call.lift.run(member, p, tensors, call.layout.run(path, call.visit(f"{path}()")), path, bare))
        out_spec, others = shape_of_output
        # An output that is no tensor stands as itself.
        filled = [next(results) if other is TENSOR else other for other in others]
        return pytree.tree_unflatten(filled, out_spec)

    def _run_one(self, call: Call, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module at ``path`` once, with tensors of the one member of this call."""
        p = {key: call.params[key] for key in call.runners[path]}
        inner = Call(
            p, recorder=call.recorder, reached=call.reached, stash=call.stash, never_ends=call.never_ends, ran=call.ran
        )
        return self.run(path, p, args, kwargs, inner)

    # -- calls -----------------------------------------------------------------------------------------------------

    def run(
        self, path: str, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call | None = None
    ) -> Any:
        """The module at ``path`` with one member's params: hidden values through hooks, weights through a swap."""
        # A sharded module sets its parameters as it begins, over an override: runners replace them (Plan.runners).
        overrides = self.overrides(params, path) if path or not self.units else {}
        target: nn.Module = self.module
        if path in self.bypasses:
            target = self.bypasses[path]
            cut = len(path) + 1 if path else 0
            overrides = {"module." + name[cut:]: tensor for name, tensor in overrides.items()}
        elif self.writes_buffers and inside_transform():
            # Transforms forbid writing to what they did not make.
            buffers = self.module.named_buffers(remove_duplicate=False)
            overrides = {name: buffer.clone() for name, buffer in buffers} | overrides
        return self.call_with(target, overrides, args, kwargs, call or Call(params))

    def enter(self, path: str, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
        """The module at ``path`` called from outside, hooks and all: the model itself, or its encoder alone."""
        target = self.module.get_submodule(path)
        cut = len(path) + 1 if path else 0
        found = self.overrides(params, path) if path or not self.units else {}
        overrides = {name[cut:]: tensor for name, tensor in found.items()}
        return self.call_with(target, overrides, args, kwargs, call)

    def call_with(
        self,
        target: nn.Module,
        overrides: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
    ) -> Any:
        """``target`` called with some tensors replaced, while ``call`` is what the hooks see."""
        outer, self.call = self.call, call
        try:
            if not overrides:
                return target(*args, **kwargs)
            return functional_call(target, overrides, args, kwargs, tie_weights=False)
        finally:
            self.call = outer

    def overrides(self, params: Params, under: str = "") -> dict[str, Tensor]:
        """The backbone's tensors that ``params`` replace or rewrite, below the path ``under``, by every name."""
        plan = self.plan
        if plan is None:
            return {}
        found: dict[str, Tensor] = {}
        for name, tensor in params.items():
            for end in plan.ends.get(name, ()):
                own = self._dtypes[end]
                found[end] = tensor if tensor.dtype == own else tensor.to(own)
        for path, attachments in plan.attachments.items():
            for attachment in attachments:
                if attachment.by_weights and attachment.among(params):
                    own = self.own_tensors(path, found)
                    found.update(rewritten(attachment, attachment.of(params), own, self.training_at(path)))
        return {name: tensor for name, tensor in found.items() if not under or name.startswith(under + ".")}

    def own_tensors(self, path: str, replaced: Params) -> dict[str, Tensor]:
        """The site's own tensors by their own names, as replaced so far."""
        module = self.module.get_submodule(path)
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        return {name: replaced.get(f"{path}.{name}", tensor) for name, tensor in own.items()}

    def training_at(self, path: str) -> bool:
        """Whether the module at ``path`` is in training mode."""
        return self.module.get_submodule(path).training


def runner_candidates(plan: Plan) -> set[str]:
    """Modules that may have to run once per member: owners of tensors that differ by member, and those above them."""
    owners = {name.rpartition(".")[0] for ends in plan.trained.values() for name in ends}
    owners |= {a.site.path for a in plan.all() if a.by_weights}
    candidates: set[str] = set()
    for owner in owners:
        while owner:
            candidates.add(owner)
            owner = owner.rpartition(".")[0]
    return candidates


def _stand_aside(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook that only has to exist: fused paths skip modules with hooks."""


def _act(
    call: Call,
    path: str,
    function: Callable[..., Tensor],
    p: Params,
    values: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
) -> tuple[Tensor, int | None]:
    """One method's function at a site, with the site named in whatever goes wrong."""
    if torch.compiler.is_compiling():
        return (function(p, *values), None) if call.lift is None else call.lift(function, p, values, dims, path)
    versions = [None if is_wrapped(value) or value.is_inference() else value._version for value in values]
    try:
        result = (function(p, *values), None) if call.lift is None else call.lift(function, p, values, dims, path)
    except FuncdeltaError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in p.items())
        hidden = ", ".join(str(tuple(value.shape)) for value in values)
        error.add_note(f"funcdelta: at the site {path}, leaves {shapes}, hidden values {hidden}.")
        raise
    if any(version is not None and value._version != version for value, version in zip(values, versions, strict=True)):
        raise ConfigError(
            f"The method at {path} changed a hidden value in place, which others still read: write y = y + ... "
            f"instead of "
            f"y += ...."
        )
    return result


def _added(call: Call, path: str, bound: Bound, training: bool, query: Tensor, key: Tensor) -> Added:
    """What one method adds at an attention site, for every row of this call."""
    attachment, function = bound
    shape, rows = attachment.site.attention, query.shape[0]
    # One number a row: enough to tell which rows are whose.
    slot, p = key.new_zeros(()).expand(rows, 1, 1), attachment.of(call.params)
    both, _ = _act(call, path, function[training], p, (slot,), (0,))
    visible, present = None, attachment.config.present
    if present(p) is not None or (call.lift is not None and call.lift.present is not None):

        def seen(p: Params, slot: Tensor) -> Tensor:
            shown = present(p)
            return torch.ones_like(slot) if shown is None else torch.zeros_like(slot) + shown

        visible = seen(p, slot) if call.lift is None else call.lift(seen, p, (slot,), (0,), path)[0]
        visible = visible.flatten() > 0
    keys, values = both.split([shape.key_width, shape.value_width], -1)
    widen = functools.partial(attachment.config.widen_bias, attachment.at(training))
    return Added(by_head(keys, shape.heads), by_head(values, shape.heads), visible, widen)
