"""Routed views: a module of the backbone's class in which every row of the batch runs with a member of its own.

A routed view is a skeleton that takes its rows' members from a stack of the caller's. Members are picked once for many
calls (a whole ``generate``), and again when the stack was written or a graph is needed. Each new kind of call (reading
the text, going on from a cache, the encoder alone) is probed once for where its rows stand, as a fold is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..errors import EngineError, ParamsError
from ..planning.sharing import expand_stack
from ..run.call import Call
from ..run.fold import Folded
from ..run.inputs import Inputs
from ..run.layout import Layout, Run
from ..run.layouts import layout_of
from ..run.skeleton import Skeleton, runner_candidates
from ..stacks.resident import Resident
from ..stacks.routing import Index, pick_rows, read_index
from .bound import View, as_view

if TYPE_CHECKING:
    from ..model import DeltaModel


class Idle:
    """Stands where a call keeps its layout and its lift while none is under way."""

    present = None

    def site(self, path: str, index: int) -> Any:
        """A site outside of a call raises."""
        raise EngineError(
            f"{path} ran by itself, or again for a backward pass (gradient checkpointing). A routed view knows the "
            f"rows' members while the whole model or its encoder is called: call those, and turn checkpointing off."
        )

    def run(self, path: str, *_: Any) -> Any:
        """So does a module with weights of each member's own."""
        return self.site(path, 0)

    def __call__(self, function: Any, p: Any, values: Any, dims: Any, site: str) -> Any:
        """And the lift itself."""
        return self.site(site, 0)


class Routes:
    """The rows of a routed view: whose they are, and the members picked for them.

    Attributes:
        index: (m,) the member of each row; -1: the bare backbone.
        leaves: the stack, by reference.
    """

    def __init__(self, delta: DeltaModel, skeleton: Skeleton, stack: Mapping[str, Tensor], index: Index) -> None:
        self.delta, self.skeleton = delta, skeleton
        self.source = stack
        self.leaves = dict(stack)
        self.entries = [""]
        encoder = encoder_path(skeleton.module)
        if encoder is not None:
            self.entries.append(encoder)
        self.idle: Any = Idle()
        self.nowhere = {path: Run(()) for path in runner_candidates(delta.plan)}
        self.call = Call(self.leaves, lift=self.idle, layout=self.idle, never_ends=True)
        self.rest()
        self.active: nn.Module | None = None
        self.index: Tensor
        self.present: Tensor | None
        self.route(index)
        for path in self.entries:
            module = skeleton.module.get_submodule(path)
            module.register_forward_pre_hook(self._begin(path), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._end, always_call=True)
        skeleton.call = self.call

    def route(self, index: Index) -> None:
        """The members of the rows of the calls to come."""
        n = next(iter(self.leaves.values())).shape[0]
        read, present = read_index(index, n, next(iter(self.leaves.values())).device)
        if not read.shape[0]:
            raise ParamsError("index is empty: give one member a row, -1 for the bare backbone.")
        prompts = [a.name for a in self.delta.plan.all() if a.prompt_rows and a.among(self.leaves)]
        if prompts and present is not None:
            raise EngineError(
                f"{prompts[0]} makes the input longer, so rows of the bare backbone (index -1) do not fit into one "
                f"batch with the others: run those rows with the backbone itself, or with delta.bind({{}})."
            )
        self._check(read)
        self.index, self.present = read, present
        self.forget()

    def forget(self) -> None:
        """Pick anew at the next call."""
        self._picked: dict[int, tuple[Any, Mapping[str, Tensor], Tensor | None]] = {}

    def _check(self, index: Tensor) -> None:
        if isinstance(self.source, Resident):
            self.source.check(index)

    # -- one call --------------------------------------------------------------------------------------------------

    def _begin(self, path: str) -> Any:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active is not None:
                return
            inputs = self._inputs(args, kwargs)
            params, present = self._members(inputs.b // len(self.index))
            layout = self._layout(path, params, inputs)
            self.rest()
            call = self.call
            call.params, call.lift, call.layout = params, Folded(inputs.b, 1, present), layout
            call.runs = layout.runs
            for inner in layout.runs:
                self.skeleton.open(inner)
            self.active = module

        return begin

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.active:
            self.active = None
            self.rest()

    def rest(self) -> None:
        """No call is under way."""
        call = self.call
        call.lift = call.layout = self.idle
        call.runs = self.nowhere
        call.visits.clear()
        call.notes.clear()

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs, with their rows: one for each entry of the index, or several."""
        m = len(self.index)
        inputs = Inputs(self.delta.backbone, 1, args, kwargs, None, self.delta.batch_dim, entries=m)
        if inputs.b % m or not inputs.b:
            raise ParamsError(
                f"This batch has {inputs.b or 'no'} rows, and this view runs {m} rows, one for each entry of its index, "
                f"or a multiple where generate makes several of each. Bind other rows: view.route(index), or "
                f"delta.bind_rows(stack, index)."
            )
        return inputs

    def _members(self, times: int) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """The members of ``times`` rows for each entry; picked once while nothing changes and no graph is wanted."""
        graph = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in self.leaves.values())
        version = [None if leaf.is_inference() else leaf._version for leaf in self.leaves.values()]
        known = self._picked.get(times)
        # Writes into what was made in inference mode leave no trace.
        if known is not None and not graph and None not in version and known[0] == version:
            return known[1], known[2]
        self._check(self.index)
        # What is picked in inference mode would be spoilt for calls outside of it.
        with contextlib.nullcontext() if graph else torch.inference_mode(False), torch.set_grad_enabled(graph):
            params = expand_stack(self.delta.plan.shared, pick_rows(self.leaves, self.index, times))
        present = self.present
        present = present if present is None or times == 1 else present.repeat_interleave(times)
        self._picked = {} if graph else {**self._picked, times: (version, params, present)}
        return params, present

    def _layout(self, path: str, params: Mapping[str, Tensor], inputs: Inputs) -> Layout:
        program, training = self.delta.program, self.skeleton.module.training
        mode = program if training == self.delta.training else program.mode(training)
        return layout_of(mode, params, inputs, by_row=True, entry=path)


def encoder_path(module: nn.Module) -> str | None:
    """Where the encoder of an encoder-decoder stands, which ``generate`` calls by itself; ``None`` if there is none.

    >>> encoder_path(torch.nn.Linear(2, 2)) is None
    True
    """
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False) or not hasattr(module, "get_encoder"):
        return None
    encoder = getattr(module, "get_encoder")()  # noqa: B009  (typed as a tensor or a module)
    return next((path for path, child in module.named_modules() if child is encoder and path), None)


class RoutedView(View):
    """What a routed view has besides its backbone's class."""

    _routes: Any

    def route(self, index: Index) -> Self:
        """Other members for the rows of the calls to come; gives the view.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> view = delta.bind_rows(delta.init(0, n=5), [4, -1, 0])
        >>> view.route([2, 2])(torch.zeros(2, 4)).shape
        torch.Size([2, 8])
        """
        self._routes.route(index)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Refused: the stack is the caller's."""
        raise ParamsError(
            "A routed view holds no params of its own, it reads the stack that it was bound to: bind another, "
            "delta.bind_rows(stack, index), or write into the stack."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``view.to(...)`` to where and what it is; elsewhere the backbone and the stack have to go first."""
        tensors = [*self.parameters(), *self.buffers()]
        with torch.no_grad():
            if all(fn(tensor) is tensor for tensor in tensors):
                return self
        raise ParamsError(
            "A routed view reads the caller's stack, which would stay behind: move the backbone and the stack, then "
            "delta.refresh() and delta.bind_rows(stack, index)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Another view of the same stack and rows."""
        other = bind_rows(self._delta, self._routes.source, self._routes.index)
        for mine, its in zip(self.modules(), other.modules(), strict=True):
            its.training = mine.training
        memo[id(self)] = other
        return other


class RoutedGenerator(RoutedView):
    """A routed view of a model that generates."""

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


def bind_rows(delta: DeltaModel, stack: Mapping[str, Tensor], index: Index) -> nn.Module:
    """A module of the backbone's class whose rows run with members of ``stack``; see :meth:`DeltaModel.bind_rows`."""
    skeleton = delta.program.skeletons.build(delta.mode_flag, view=True)
    routes = Routes(delta, skeleton, stack, index)
    kind = RoutedGenerator if hasattr(delta.backbone, "generate") else RoutedView
    view = as_view(delta, skeleton, kind, routes.leaves)
    object.__setattr__(view, "_routes", routes)
    return view
