"""Routed views: a module of the backbone's class in which every row of the batch runs with a member of its own.

A routed view is a skeleton that takes its rows' members from a stack of the caller's. Members are picked once for many
calls (a whole ``generate``), and again when the stack was written or a graph is needed. Each new kind of call (reading
the text, going on from a cache, the encoder alone) is probed once for where its rows are, as a fold is. Where rows
cannot share a batch each runs by itself.
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
    """What a call has in the place of its layout and its lift while none is under way."""

    present = None
    unused: frozenset[str] = frozenset()
    sites: Mapping[str, Any] = types.MappingProxyType({})

    def site(self, path: str, index: int | None) -> Any:
        """A site outside of a call raises."""
        raise EngineError(
            f"{path} ran by itself, or again for a backward pass (gradient checkpointing). A routed view knows the "
            f"rows' members while the whole model or its encoder is called: call those, and turn checkpointing off. "
            f"What calls other parts of the model (a generate of its own may do) runs member by member: "
            f"delta.bind(fd.take(stack, i)) with that member's rows."
        )

    def run(self, path: str, *_: Any) -> Any:
        """So does a module with weights of each member's own."""
        return self.site(path, 0)

    def __call__(self, function: Any, p: Any, values: Any, dims: Any, site: str) -> Any:
        """And the lift itself."""
        return self.site(site, 0)


class RoutedCalls(Calls):
    """The calls of a routed view, and whose the rows are.

    Each thread that has said whose (:meth:`route`) has its own answer, with the members picked for it.

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

    # -- whose the rows are ----------------------------------------------------------------------------------------

    def route(self, index: Index) -> None:
        """The members of the rows of this thread's calls to come, and of threads that say nothing if it is home."""
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
            raise ParamsError("index is empty: give one member a row, -1 for the bare backbone.")
        prompts = [a.name for a in self.program.plan.all() if a.prompt_rows and a.among(self.leaves)]
        if prompts and present is not None:
            raise EngineError(
                f"{prompts[0]} makes the input longer, so rows of the bare backbone (index -1) do not fit into one "
                f"batch with the others: run those rows with the backbone itself, or with delta.bind({{}})."
            )
        if isinstance(self.source, Resident):
            self.source.check(read)
        return read, present

    def _members(self, times: int) -> Picked:
        """The members of ``times`` rows for each entry; picked once while nothing changes and no graph is wanted."""
        index, present = self.index()
        if present is not None and times != 1:
            present = present.repeat_interleave(times)
        graph = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in self.leaves.values())
        if graph:
            return self._pick(index, times), present
        known = vars(self._own).setdefault("picked", {})
        # Nothing changes between what is compared and what is picked.
        with self.source.lock if isinstance(self.source, Resident) else contextlib.nullcontext():
            versions = [None if leaf.is_inference() else leaf._version for leaf in self.leaves.values()]
            at, found_for, params = known.get(times, (None, None, None))
            # Writes into what was made in inference mode leave no trace.
            if found_for is not index or at != versions or None in versions:
                # What is picked in inference mode would be spoilt for calls outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    params = self._pick(index, times)
                known[times] = versions, index, params
        return params, present  # pyright: ignore[reportReturnType]

    def _pick(self, index: Tensor, times: int) -> Mapping[str, Tensor]:
        source = self.source
        rows = source.pick(index, times) if isinstance(source, Resident) else pick_rows(self.leaves, index, times)
        return expand_stack(self.program.plan.shared, rows)

    def depends(self) -> Any:
        """Which members of the stack the rows have, and how often it was written."""
        written = [None if leaf.is_inference() else leaf._version for leaf in self.leaves.values()]
        return super().depends(), self._modules[0].training, id(self.index()[0]), written

    def reading(self) -> contextlib.AbstractContextManager[Any]:
        """Whoever shares the stack may change it meanwhile."""
        return self.source.lock if isinstance(self.source, Resident) else self.lock

    # -- one call --------------------------------------------------------------------------------------------------

    def make(self, module: nn.Module, path: str, function: Function, args: Any, kwargs: Any) -> Any:
        """A call of the whole model, or of its encoder, with members for its rows."""
        if path not in self.entries:
            return function(module, *args, **kwargs)
        kwargs = self.with_conditions(path, kwargs)
        try:
            return self._entered(module, path, function, args, kwargs)
        except EngineError as error:
            said = without_engines(str(error))
            if said == str(error):
                raise
            raise type(error)(said) from error  # a view is not called with engine=

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
                    self._put(norm, name, None)  # torch's need none in training, and cannot be mapped with them
            output = self._rows(module, path, function, params, present, inputs)
            finished = True
        finally:
            self.skeleton.call = self.idle
            with torch.no_grad():
                # What rows of several members teach belongs to none; batch norms write without a trace.
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
        """Compiled code cannot look up members: the call is plain Python there."""
        return self.enter(module, path, function, args, kwargs)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs, with their rows: one for each entry of the index, or several."""
        m = len(self.index()[0])
        inputs = Inputs(self.program.backbone, 1, args, kwargs, None, self.program.batch_dim, entries=m)
        if inputs.b % m or not inputs.b:
            raise ParamsError(
                f"This batch has {inputs.b or 'no'} rows, and this view runs {m} rows, one for each entry of its "
                f"index, or a multiple where generate makes several of each. Bind other rows: view.route(index), or "
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
                # What was learned does not hold, and the cache that it could be learned from is written.
                program.layouts.pop(key[2], None)
                raise EngineError(
                    f"{error} The cache among the inputs has been written by now, so this call cannot be made again: "
                    f"start anew, or generate with use_cache=False."
                ) from error
            refused: FoldError = error
        except FoldError as error:
            refused = error
        output = self._in_turn(module, path, function, params, present, inputs, str(refused))
        program.refusals[key] = str(refused)
        if str(refused) not in program.warned:
            program.warned.add(str(refused))
            warnings.warn(
                f"The rows of this view run one after the other, which is slower: they cannot share a batch. "
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
        """All rows in one batch; learned anew where the call goes another way than the one that was probed."""
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
        """Row by row, outputs joined where the rows of the whole are; ``why`` they do not run together."""
        opaque = [place for leaf, place in zip(inputs.leaves, inputs.places, strict=True) if _is_opaque(leaf)]
        why = f"{why.rstrip('. ')}. Nor can the rows run one after the other"
        instead = "Run each member's rows by themselves: delta.bind(fd.take(stack, i))"
        if opaque:
            raise FoldError(f"{why}: {opaque[0]} holds tensors that cannot be taken apart by rows. {instead}.")
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
        """The delta's program in the view's present mode, whose modules' modes may differ."""
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
    """Whether a call writes into objects among its inputs, so that it cannot be made again."""
    return any(inputs.is_cache(i) or _is_opaque(leaf) for i, leaf in enumerate(inputs.leaves))


def _is_opaque(leaf: Any) -> bool:
    return not is_cache(leaf) and holds_tensors(leaf)


class RoutedView(Viewlike, nn.Module):
    """What a routed view has besides its backbone's class."""

    def route(self, index: Index) -> Self:
        """Other members for the rows of the calls to come; gives the view.

        Threads may share a view: what one says of its rows is for its own calls, and where the thread is the one that
        bound the view, for those of threads that have said nothing.

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
        """Refused: the stack is the caller's."""
        raise ParamsError(NOTHING_OF_ITS_OWN)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """So through a parent."""
        if any(key.startswith(prefix) for key in state_dict):
            (args[-1] if args else kwargs["error_msgs"]).append(NOTHING_OF_ITS_OWN)

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        """Another view of the same stack and rows."""
        other = bind_rows(self._funcdelta.delta, self._funcdelta.calls.source, self._funcdelta.calls.index()[0])
        memo[id(self)] = other
        modules = dict(other.named_modules())
        memo.update({id(module): modules[path] for path, module in self.named_modules() if path in modules})
        give(other, copy.deepcopy(given_since(self, self._funcdelta.born), memo))
        return other

    def __copy__(self) -> nn.Module:
        return made_of(Twin(self._copied, self._reduced))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies share the stack and the backbone; pickles have both."""
        return Twin(self._copied, self._reduced).reduce()

    def _reduced(self) -> tuple[Any, ...]:
        """A routed view travels with its stack, its delta and the whole backbone."""
        return _unpickled, (
            self._funcdelta.delta,
            self._funcdelta.calls.source,
            self._funcdelta.calls.index()[0],
            given_since(self, self._funcdelta.born),
        )


NOTHING_OF_ITS_OWN = (
    "A routed view holds no params of its own, it reads the stack that it was bound to: bind another, "
    "delta.bind_rows(stack, index), or write into the stack."
)


def _unpickled(delta: Bindable, stack: Mapping[str, Tensor], index: Tensor, since: Any) -> nn.Module:
    view = bind_rows(delta, stack, index)
    give(view, since)
    return view


class RoutedGenerator(RoutedView):
    """A routed view of a model that generates."""

    def _supports_mm_encoder_outputs(self) -> bool:
        """Transformers would have images read before the text, where nobody knows which row is whose."""
        return False

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """What is read with the text cannot be repeated: which of the images belong to a row nobody knows."""
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        before: Any = getattr(super(), "_supports_mm_encoder_outputs", lambda: False)
        shown = [name for name in kwargs if name.startswith(("pixel", "image", "video")) and kwargs[name] is not None]
        if expand_size > 1 and shown and before():
            raise EngineError(
                f"{shown[0]} cannot be repeated for {expand_size} sequences a row where rows have members of their "
                f"own: generate one sequence a row (no beams), or member by member, delta.bind(fd.take(stack, i))."
            )
        return expand(expand_size, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; guidance that puts a second batch behind the first is refused, for rows would be mistaken.

        Transformers' general guidance runs that batch by itself, which keeps the rows.
        """
        generate = super().generate  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        config = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale not in (None, 1) and not generate.__module__.startswith("transformers.generation"):
            raise EngineError(
                f"{type(self).__name__} has a generate of its own, which may put a batch without the text behind the "
                f"one with it, so that rows would run with other rows' members: write guidance_scale=None, or "
                f"generate member by member, delta.bind(fd.take(stack, i)).generate(...)."
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
    """``view.to(...)`` to where and what it is; elsewhere the backbone and the stack have to go first."""
    with torch.no_grad():
        if all(fn(tensor) is tensor for _, _, tensor, _ in held_by(module)):
            return
    raise ParamsError(
        "A routed view reads the caller's stack, which would stay behind: move the backbone and the stack, then "
        "delta.refresh() and delta.bind_rows(stack, index)."
    )
