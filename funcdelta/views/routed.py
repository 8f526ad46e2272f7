"""Routed views: a module of the backbone's class in which each row of the batch runs with its own member.

A routed view is a skeleton that picks the members of its rows from the caller's stack. They are picked once for many
calls (a whole ``generate``), and again when the stack was written or a graph is needed. Each new kind of call (reading
the text, continuing from a cache, the encoder alone) is probed once for where its rows are, as a fold is. Rows that
cannot share a batch run one after the other.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import EngineError, EngineWarning, FoldError, ParamsError, without_engines
from ..plan.sharing import expand_stack
from ..run.call import Call
from ..run.containers import is_cache
from ..run.first_time import ATTEMPTS
from ..run.fold import Folded
from ..run.forward import without_cache
from ..run.in_turn import run_in_turn
from ..run.inputs import Inputs
from ..run.layout import Layout, LayoutMismatchError, Run
from ..run.layouts import key_of, layout_of, learned_anew
from ..run.on_copies import on_copies
from ..run.program import Program
from ..run.single import tell_missed
from ..run.skeleton import Skeleton, runner_candidates
from ..run.text_model import encoder_path
from ..transforms import eager
from ..trees.opaque import holds_tensors
from ..trees.resident import Resident
from ..trees.routing import Index, pick_rows, read_index
from .bound import as_view
from .calls import Calls, Function
from .copies import Twin, give, given_since, held_by, made_of
from .frozen import learns
from .held import Bindable, Viewlike

Picked = tuple[Mapping[str, Tensor], Tensor | None]


class Idle:
    """Takes the place of a call's layout and lift while no call is running: every use raises."""

    present = None
    unused: frozenset[str] = frozenset()
    sites: Mapping[str, Any] = types.MappingProxyType({})

    def site(self, path: str, index: int | None) -> Any:
        """Raise: a site ran outside a call."""
        raise EngineError(
            f"{path} ran by itself, or was recomputed for a backward pass (gradient checkpointing). A routed view "
            f"knows which member a row has only while the whole model or its encoder is called: call one of those, "
            f"and turn checkpointing off. If the model's own generate calls other parts of it, run the members one by "
            f"one: delta.bind(fd.take(stack, i)) with that member's rows."
        )

    def run(self, path: str, *_: Any) -> Any:
        """Raise: a module whose weights differ by member ran outside a call."""
        return self.site(path, 0)

    def __call__(self, function: Any, p: Any, values: Any, dims: Any, site: str) -> Any:
        """Raise: a method's function ran outside a call."""
        return self.site(site, 0)


class RoutedCalls(Calls):
    """The calls of a routed view, and the member of each row.

    A thread that has called :meth:`route` has its own index, and the members picked for it.

    Attributes:
        leaves: the stack, by reference.
    """

    def __init__(self, delta: Bindable, skeleton: Skeleton, stack: Mapping[str, Tensor], index: Index) -> None:
        super().__init__()
        self.program, self.skeleton, self.source = delta.program, skeleton, stack
        self.leaves = dict(stack)
        encoder = encoder_path(skeleton.module)
        self.entries = ("",) if encoder is None else ("", encoder)
        idle: Any = Idle()
        nowhere = {path: Run(()) for path in runner_candidates(self.program.plan)}
        skeleton.call = self.idle = Call(self.leaves, lift=idle, layout=idle, runs=nowhere)
        self.reached: set[str] | None = None if self.program.is_verified(self.leaves) else set()
        self._modules = list(skeleton.module.modules())
        named = ((module, name, tensor) for module in self._modules for name, tensor in module._buffers.items())
        self._statistics = [(m, name) for m, name, tensor in named if tensor is not None and learns(m, name)]
        self._programs: dict[tuple[bool, ...], Program] = {}
        self.home = threading.get_ident()
        self.everywhere = self._read(index)

    # -- the members of the rows -----------------------------------------------------------------------------------

    def route(self, index: Index) -> None:
        """Set the members of the rows in this thread's next calls; see :meth:`RoutedView.route`."""
        read = self._read(index)
        self._own.index, self._own.picked = read, {}
        if threading.get_ident() == self.home:
            self.everywhere = read

    def index(self) -> tuple[Tensor, Tensor | None]:
        """The member of each row of this thread's calls, and which rows have one."""
        return getattr(self._own, "index", None) or self.everywhere

    def _read(self, index: Index) -> tuple[Tensor, Tensor | None]:
        like = next(iter(self.leaves.values()))
        resident = isinstance(self.source, Resident)
        read, present = read_index(index, None if resident else like.shape[0], like.device)
        if not read.shape[0]:
            raise ParamsError("index is empty: give one member per row, -1 for the bare backbone.")
        prompts = [a.name for a in self.program.plan.all() if a.prompt_rows and a.among(self.leaves)]
        if prompts and present is not None:
            raise EngineError(
                f"{prompts[0]} makes the input longer, so rows of the bare backbone (index -1) cannot share a batch "
                f"with the others: run those rows with the backbone itself, or with delta.bind({{}})."
            )
        if isinstance(self.source, Resident):
            self.source.check(read)
        return read, present

    def _members(self, times: int) -> Picked:
        """The members of ``times`` rows per entry; picked once while nothing changes and no graph is needed."""
        index, present = self.index()
        if present is not None and times != 1:
            present = present.repeat_interleave(times)
        graph = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in self.leaves.values())
        if graph:
            return self._pick(index, times), present
        known = vars(self._own).setdefault("picked", {})
        # Nobody may write between the comparison of versions and the pick.
        with self.source.lock if isinstance(self.source, Resident) else contextlib.nullcontext():
            versions = [None if leaf.is_inference() else leaf._version for leaf in self.leaves.values()]
            at, found_for, params = known.get(times, (None, None, None))
            # Inference tensors have no version, so a write to one goes unnoticed: pick again.
            if found_for is not index or at != versions or None in versions:
                # Inference tensors would be unusable in later calls outside inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    params = self._pick(index, times)
                known[times] = versions, index, params
        return params, present  # pyright: ignore[reportReturnType]

    def _pick(self, index: Tensor, times: int) -> Mapping[str, Tensor]:
        source = self.source
        rows = source.pick(index, times) if isinstance(source, Resident) else pick_rows(self.leaves, index, times)
        return expand_stack(self.program.plan.shared, rows)

    def depends(self) -> Any:
        """The mode, the members of the rows, and the version of every tensor of the stack."""
        written = [None if leaf.is_inference() else leaf._version for leaf in self.leaves.values()]
        return super().depends(), self._modules[0].training, id(self.index()[0]), written

    def reading(self) -> contextlib.AbstractContextManager[Any]:
        """Hold the stack's lock, because others share the stack and may change it."""
        return self.source.lock if isinstance(self.source, Resident) else self.lock

    # -- one call --------------------------------------------------------------------------------------------------

    def make(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run a call of the whole model, or of its encoder, with each row's member."""
        if path not in self.entries:
            return function(module, *args, **kwargs)
        kwargs = self.with_conditions(path, kwargs)
        try:
            return self._entered(module, path, function, args, kwargs)
        except EngineError as error:
            said = without_engines(str(error))
            if said == str(error):
                raise
            raise type(error)(said) from error  # a view's call takes no engine=

    def _entered(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        inputs = self._inputs(args, kwargs)
        params, present = self._members(inputs.b // len(self.index()[0]))
        finished, output = False, None
        learning = [(norm, name, vars(norm)[name]) for norm, name in self._statistics if norm.training]
        before = [tensor.clone() for _, _, tensor in learning]
        try:
            if self.remembered is not None:
                self.remembered.begin()
            for norm, name, _ in learning:
                if isinstance(norm, nn.modules.batchnorm._NormBase):
                    self._put(norm, name, None)  # torch's norms need none in training, and vmap fails with them
            output = self._rows(module, path, function, params, present, inputs)
            finished = True
        finally:
            self.skeleton.call = self.idle
            with torch.no_grad():
                # Statistics of rows of several members belong to none. Batch norms write them without a new version.
                for (norm, name, tensor), value in zip(learning, before, strict=True):
                    self._put(norm, name, tensor.copy_(value))
            if self.remembered is not None:
                self.remembered.end(finished)
        if self.reached is not None and not path:
            reached, self.reached = self.reached, None
            tell_missed(self.program, self.leaves, reached)
        return output

    def _put(self, norm: nn.Module, name: str, value: Tensor | None) -> None:
        vars(norm)[name] = value
        self.skeleton.memory.accept(vars(norm), name)

    @eager
    def trace(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """Run the call as plain Python, because compiled code cannot look up members."""
        return self.enter(module, path, function, args, kwargs)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs, whose rows must be one per entry of the index or a multiple."""
        m = len(self.index()[0])
        inputs = Inputs(self.program.backbone, 1, args, kwargs, None, self.program.batch_dim, entries=m)
        if inputs.b % m or not inputs.b:
            raise ParamsError(
                f"This batch has {inputs.b or 'no'} rows, but this view runs {m}, one per entry of its index, or a "
                f"multiple of that if generate repeats rows. Give other members: view.route(index), or "
                f"delta.bind_rows(stack, index)."
            )
        return inputs

    def _rows(
        self, module: nn.Module, path: str, function: Function, params: Any, present: Tensor | None, inputs: Inputs
    ) -> Any:
        program = self._program()
        key = "fold", "bind_rows", key_of(program, params, inputs, by_row=True, entry=path)
        if key in program.refusals:
            return self._in_turn(module, path, function, params, present, inputs, program.refusals[key])
        try:
            layout = layout_of(program, params, inputs, by_row=True, entry=path)
            return self._together(program, module, path, function, params, present, inputs, layout)
        except LayoutMismatchError as error:
            if _caches(inputs):
                # The layout is wrong, and no second attempt can correct it because the call has written the cache.
                program.layouts.pop(key[2], None)
                raise EngineError(
                    f"{error} The call has already written to the cache among its inputs, so it cannot be repeated: "
                    f"start over with a new cache, or generate with use_cache=False."
                ) from error
            refused: FoldError = error
        except FoldError as error:
            refused = error
        output = self._in_turn(module, path, function, params, present, inputs, str(refused))
        program.refusals[key] = str(refused)
        if str(refused) not in program.warned:
            program.warned.add(str(refused))
            warnings.warn(
                f"The rows of this view cannot share a batch, so they run one after the other, which is slower. "
                f"{without_engines(str(refused))}",
                EngineWarning,
                stacklevel=7,
            )
        return output

    def _together(
        self,
        program: Program,
        module: nn.Module,
        path: str,
        function: Function,
        params: Any,
        present: Tensor | None,
        inputs: Inputs,
        layout: Layout,
    ) -> Any:
        """Run all rows in one batch; the layout is learned again if this call differs from the one probed."""
        for attempt in range(ATTEMPTS):
            for inner in layout.runs:
                self.skeleton.open(inner)
            lift = Folded(inputs.b, 1, present)
            self.skeleton.call = Call(params, lift=lift, layout=layout, runs=layout.runs, reached=self.reached)

            def run(inputs: Inputs) -> Any:
                args, kwargs = inputs.shared()
                return function(module, *args, **kwargs)

            try:
                return on_copies(inputs, run) if program.writes_inputs else run(inputs)
            except LayoutMismatchError:
                if attempt == ATTEMPTS - 1 or _caches(inputs):
                    raise
                layout = learned_anew(program, params, inputs, layout, by_row=True, entry=path)
        raise AssertionError("every attempt returns or raises")

    def _in_turn(
        self,
        module: nn.Module,
        path: str,
        function: Function,
        params: Any,
        present: Tensor | None,
        inputs: Inputs,
        why: str,
    ) -> Any:
        """Run row by row and join the outputs; ``why`` says what keeps the rows from sharing a batch."""
        opaque = [place for leaf, place in zip(inputs.leaves, inputs.places, strict=True) if _is_opaque(leaf)]
        why = f"{why.rstrip('. ')}. Nor can the rows run one after the other"
        instead = "Run each member's rows separately: delta.bind(fd.take(stack, i))"
        if opaque:
            raise FoldError(f"{why}: {opaque[0]} holds tensors that cannot be split by row. {instead}.")
        index, times = self.index()[0], inputs.b // len(self.index()[0])

        def run(row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bare = present is not None and not bool(present[row])
            own = {} if bare else {key: leaf[row] for key, leaf in params.items()}
            skeleton = self.skeleton
            skeleton.call = Call(own, reached=self.reached)
            try:
                with skeleton.swapped(skeleton.overrides(own, path)):
                    return function(module, *args, **kwargs if cached else without_cache(module, kwargs))
            finally:
                skeleton.memory.restore()

        cached = any(inputs.is_cache(i) for i in range(len(inputs.leaves)))
        try:
            return run_in_turn(inputs, index.repeat_interleave(times).tolist(), run)
        except EngineError as error:
            raise FoldError(f"{why}: {error} {instead}.") from error

    # -- modes -----------------------------------------------------------------------------------------------------

    def _program(self) -> Program:
        """The delta's program in the view's present mode, which may differ by module."""
        flags = tuple([module.training for module in self._modules])
        if flags not in self._programs:
            self._programs[flags] = self._in_mode(flags)
        return self._programs[flags]

    def _in_mode(self, flags: tuple[bool, ...]) -> Program:
        paths = [path for path, _ in self.skeleton.module.named_modules()]
        by_path = dict(zip(paths, flags, strict=True))
        own = self.program.skeletons.flags if self.program.training is None else {}
        if by_path == {path: own.get(path, self.program.training) for path in paths}:
            return self.program
        return self.program.mode(flags[0]) if len(set(flags)) == 1 else self.program.flagged(by_path)


def _caches(inputs: Inputs) -> bool:
    """Whether a call writes into objects among its inputs, so that it cannot be repeated."""
    return any(inputs.is_cache(i) or _is_opaque(leaf) for i, leaf in enumerate(inputs.leaves))


def _is_opaque(leaf: Any) -> bool:
    return not is_cache(leaf) and holds_tensors(leaf)


class RoutedView(Viewlike, nn.Module):
    """What a routed view adds to its backbone's class."""

    def route(self, index: Index) -> Self:
        """Set the members of the rows in the next calls; returns the view.

        Threads may share a view: the index applies to calls of the thread that gave it. Threads that gave none use the
        index of the thread that bound the view.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> view = delta.bind_rows(delta.init(0, n=5), [4, -1, 0])
        >>> view.route([2, 2])(torch.zeros(2, 4)).shape
        torch.Size([2, 8])
        """
        self._funcdelta.calls.route(index)
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The leaves of the stack under their names."""
        found: Any = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        at = prefix or (args[1] if len(args) > 1 else "")
        found.update({at + name: leaf if keep_vars else leaf.detach() for name, leaf in self._funcdelta.leaves.items()})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Raise: the stack belongs to the caller."""
        raise ParamsError(NOTHING_OF_ITS_OWN)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse as well when a parent's ``load_state_dict`` reaches this view."""
        if any(key.startswith(prefix) for key in state_dict):
            (args[-1] if args else kwargs["error_msgs"]).append(NOTHING_OF_ITS_OWN)

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        """Another view of the same stack with the same rows."""
        other = bind_rows(self._funcdelta.delta, self._funcdelta.calls.source, self._funcdelta.calls.index()[0])
        memo[id(self)] = other
        modules = dict(other.named_modules())
        memo.update({id(module): modules[path] for path, module in self.named_modules() if path in modules})
        give(other, copy.deepcopy(given_since(self, self._funcdelta.born), memo))
        return other

    def __copy__(self) -> nn.Module:
        return made_of(Twin(self._copied, self._reduced))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies share the stack and the backbone; pickles contain both."""
        return Twin(self._copied, self._reduced).reduce()

    def _reduced(self) -> tuple[Any, ...]:
        """What a pickle contains: the stack, and the delta with the whole backbone."""
        return _unpickled, (
            self._funcdelta.delta,
            self._funcdelta.calls.source,
            self._funcdelta.calls.index()[0],
            given_since(self, self._funcdelta.born),
        )


NOTHING_OF_ITS_OWN = (
    "A routed view holds no params; it reads the stack that it was bound to. Bind another one, "
    "delta.bind_rows(stack, index), or write into the stack."
)


def _unpickled(delta: Bindable, stack: Mapping[str, Tensor], index: Tensor, since: Any) -> nn.Module:
    view = bind_rows(delta, stack, index)
    give(view, since)
    return view


class RoutedGenerator(RoutedView):
    """A routed view of a model that generates."""

    def _supports_mm_encoder_outputs(self) -> bool:
        """False: otherwise Transformers encodes images before the text, where the rows' members are unknown."""
        return False

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Refuse to repeat rows with images, because it is unknown which images belong to which row."""
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        before: Any = getattr(super(), "_supports_mm_encoder_outputs", lambda: False)
        shown = [name for name in kwargs if name.startswith(("pixel", "image", "video")) and kwargs[name] is not None]
        if expand_size > 1 and shown and before():
            raise EngineError(
                f"{shown[0]} cannot be repeated for {expand_size} sequences per row in a routed view. Generate one "
                f"sequence per row (no beams), or run the members one by one: delta.bind(fd.take(stack, i))."
            )
        return expand(expand_size, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``; refuses guidance that appends a second batch, whose rows have no members.

        Transformers' general guidance runs the second batch separately, which keeps the rows.
        """
        generate = super().generate  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        config = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale not in (None, 1) and not generate.__module__.startswith("transformers.generation"):
            raise EngineError(
                f"{type(self).__name__} has its own generate, which may append a batch without the text for guidance, "
                f"so that rows would run with other rows' members. Write guidance_scale=None, or generate member by "
                f"member: delta.bind(fd.take(stack, i)).generate(...)."
            )
        return generate(*args, **kwargs)


def bind_rows(delta: Bindable, stack: Mapping[str, Tensor], index: Index) -> nn.Module:
    """A module of the backbone's class whose rows run with members of ``stack``; see :meth:`DeltaModel.bind_rows`."""
    with torch.inference_mode(False), torch.no_grad():
        skeleton = delta.program.skeletons.build(delta.program.training, view=True)
        calls = RoutedCalls(delta, skeleton, stack, index)
        kind = RoutedGenerator if hasattr(delta.program.backbone, "generate") else RoutedView
        return as_view(delta, skeleton, kind, calls, calls.leaves, _stay)


def _stay(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Refuse ``view.to(...)`` unless it changes nothing: the backbone and the stack have to move first."""
    with torch.no_grad():
        if all(fn(tensor) is tensor for _, _, tensor, _ in held_by(module)):
            return
    raise ParamsError(
        "A routed view reads the caller's stack, which would not move with it. Move the backbone and the stack, then "
        "call delta.refresh() and delta.bind_rows(stack, index)."
    )
