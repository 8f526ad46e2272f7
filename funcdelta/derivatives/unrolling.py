"""A differentiable loop of updates that stores only the states between steps and recomputes each step in backward.

``torch.utils.checkpoint`` fails for a step that differentiates inside, with both ``torch.func`` and ``torch.autograd``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError, RecomputeError
from ..functional.attention import higher_order, needs_mathematical_attention
from ..kinds import count
from ..transforms import eager, inside_transform
from ..trees.leaves import align, named

__all__ = ["unroll"]

State = TypeVar("State")


def unroll(step: Callable[..., State], state: State, steps: int, *data: Any, checkpoint: bool = True) -> State:
    """The state after ``state = step(state, i, *data)`` for i = 0, ..., steps - 1; differentiable in state and data.

    ``state`` and ``data`` are pytrees; ``step`` is pure and may differentiate inside (``fd.value_and_grad``,
    ``torch.func.grad``, or ``torch.autograd.grad`` with ``create_graph=True``). With ``checkpoint=True`` a step's graph
    is dropped when the step ends and rebuilt in the backward pass: memory grows per step by one state instead of the
    step's activations, and each step runs twice. Random numbers, autocast and ``fd.grad.higher_order()`` are the same
    both times. Under ``torch.no_grad()`` it is the plain loop.

    Tensors that require grad should reach ``step`` through ``state`` and ``data``. Leaves that it reads from outside
    get gradients as well; other tensors from outside raise ``RecomputeError``, and so does a ``torch.func`` transform
    around the loop, where you write ``checkpoint=False``. The loop is not compiled. Raises ``ParamsError`` if the
    state's structure changes or ``step`` writes into its arguments. Source: Chen et al. 2016 (arXiv:1604.06174).

    >>> rate = torch.tensor(0.1, requires_grad=True)
    >>> def step(w, i, rate):
    ...     (slope,) = torch.autograd.grad((w**2).sum(), w, create_graph=True)
    ...     return w - rate * slope
    >>> w = fd.grad.unroll(step, torch.ones(1, requires_grad=True), 3, rate)
    >>> w, torch.autograd.grad(w.sum(), rate)[0]
    (tensor([0.5120], grad_fn=...), tensor(-3.8400))
    """
    steps = count(steps, "steps", "times fd.grad.unroll runs step", most=2**24)
    keeps = checkpoint and torch.is_grad_enabled()
    if keeps and inside_transform():
        raise RecomputeError(
            "fd.grad.unroll was called inside a torch.func transform (grad, vmap, jvp), where a step cannot be "
            "recomputed in the backward pass. Write fd.grad.unroll(..., checkpoint=False), or differentiate with "
            "loss.backward() or torch.autograd.grad."
        )
    if keeps:
        return _checkpointed(step, state, steps, data)
    for i in range(steps):
        state = _same_structure(state, step(state, i, *data), i)
    return state


@eager
def _checkpointed(step: Callable[..., State], state: State, steps: int, data: tuple[Any, ...]) -> State:
    """The loop with every step's graph rebuilt in the backward pass."""
    for i in range(steps):
        state = _same_structure(state, _recomputed(step, state, i, data), i)
    return state


def _same_structure(before: State, after: Any, i: int) -> State:
    """``after``; raises if its structure differs from that of ``before``."""
    align(before, after, first_is="the state", other_is=f"the output of step at i={i}")
    return after


class _Run:
    """One step as a function of the tensors that require grad; all other leaves are fixed."""

    def __init__(self, step: Callable[..., Any], state: Any, i: int, data: tuple[Any, ...]) -> None:
        self.step, self.i = step, i
        self.leaves, self.spec = pytree.tree_flatten((state, data))
        self.tracked = [j for j, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad]
        self.inputs = [self.leaves[j] for j in self.tracked]
        for j in self.tracked:
            self.leaves[j] = None  # autograd saves these, and detects writes to them
        self.names = [name for name, _ in named((state, data))]
        self.captured: list[Tensor] = []
        self.outputs: list[int] = []
        self.surroundings = _Surroundings(self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The state that the step returns for ``inputs``."""
        given = dict(zip(self.tracked, inputs, strict=True))
        # Aliases, so that requires_grad_() in the step does not mark the caller's tensors.
        leaves = [given.get(j, x.detach() if isinstance(x, Tensor) else x) for j, x in enumerate(self.leaves)]
        versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
        state, data = pytree.tree_unflatten(leaves, self.spec)
        result = self.step(state, self.i, *data)
        for name, x, version in zip(self.names, leaves, versions, strict=True):
            if isinstance(x, Tensor) and x._version != version:
                raise ParamsError(
                    f"At i={self.i} the step of fd.grad.unroll writes into its argument {name!r}, which the backward "
                    "pass needs unchanged. Return new tensors: p - lr * g, fd.tree.add(params, updates)."
                )
        return result


class _Recomputed(torch.autograd.Function):
    """The outputs of a step that has already run; backward runs it again."""

    @staticmethod
    def forward(ctx: Any, run: _Run, outputs: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        saved = ctx.saved_tensors[: len(run.tracked)]
        captured, higher = run.captured, torch.is_grad_enabled()
        if higher and captured:
            raise RecomputeError(
                f"The gradient of fd.grad.unroll is itself differentiated, and step reads a tensor of shape "
                f"{tuple(captured[0].shape)} that requires grad but is neither in state nor in data. Pass it as data, "
                "fd.grad.unroll(step, state, steps, it), or write checkpoint=False."
            )
        with torch.enable_grad(), run.surroundings.again():
            # Inputs may depend on one another outside this step; views cut those dependencies off.
            inputs = [x.view_as(x) if higher else x.detach().requires_grad_() for x in saved]
            leaves = pytree.tree_leaves(run(inputs))
        pairs = [(leaves[j], g) for j, g in zip(run.outputs, gradients, strict=True) if g is not None]
        found = torch.autograd.grad(
            [x for x, _ in pairs],
            [*inputs, *captured],
            [g for _, g in pairs],
            create_graph=higher,
            allow_unused=True,
        )
        return None, None, *found


def _recomputed(step: Callable[..., Any], state: Any, i: int, data: tuple[Any, ...]) -> Any:
    """``step(state, i, *data)``, whose graph is rebuilt in the backward pass."""
    run = _Run(step, state, i, data)
    since = _now()
    own = [x.detach().requires_grad_() for x in run.inputs]
    leaves, spec = pytree.tree_flatten(run(own))
    run.surroundings.finish()
    run.outputs = [j for j, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    made = [leaves[j] for j in run.outputs]
    run.captured, older = _from_outside(made, own, since)
    if older:
        _refuse_from_outside(run, older, since)
    values = [x.detach() for x in made]
    del made
    for j in run.outputs:
        leaves[j] = None
    if run.outputs:
        connected = _Recomputed.apply(run, values, *run.inputs, *run.captured)
        for j, x in zip(run.outputs, connected, strict=True):
            leaves[j] = x
    run.inputs = []
    return pytree.tree_unflatten(leaves, spec)


def _now() -> int:
    """The sequence number of a new graph node: nodes with smaller numbers are older."""
    node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
    return node._sequence_nr()


def _from_outside(outputs: list[Tensor], own: list[Tensor], since: int) -> tuple[list[Tensor], list[Any]]:
    """The leaves behind ``outputs`` that are not the step's ``own``, and the nodes made before the step."""
    known = {id(x) for x in own}
    leaves = {id(x): x for x in outputs if x.grad_fn is None and id(x) not in known}
    older: list[Any] = []
    waiting: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in known:
                leaves[id(leaf)] = leaf
            continue
        if node._sequence_nr() < since:
            older.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return list(leaves.values()), older


def _refuse_from_outside(run: _Run, older: list[Any], since: int) -> None:
    """Raise if one of the ``older`` nodes comes from outside the step.

    Nodes are numbered per thread, and backward passes on a GPU run in other threads, so an old number alone proves
    nothing. A second run makes new nodes, but meets those from outside again.
    """
    own = [x.detach().requires_grad_() for x in run.inputs]
    with run.surroundings.again():
        made = [x for x in pytree.tree_leaves(run(own)) if isinstance(x, Tensor) and x.requires_grad]
    _, again = _from_outside(made, own, since)
    both = set(older) & set(again)
    if both:
        raise RecomputeError(
            f"At i={run.i} the step of fd.grad.unroll reads a tensor that requires grad but is neither in state nor in "
            f"data (the output of {next(iter(both)).name()}), so its gradient would be lost. Pass it as data, "
            "fd.grad.unroll(step, state, steps, it), or write checkpoint=False."
        )


class _Surroundings:
    """The random generators, autocast and ``fd.grad.higher_order()`` under which a step ran."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({x.get_device() for x in tensors if x.is_cuda})
        self.random = self._random()
        self.used = False
        self.higher_order = needs_mathematical_attention()
        kinds = ["cpu", *(["cuda"] if self.devices else [])]
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    def _random(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def finish(self) -> None:
        """After the step, forget the generators' states if the step drew nothing."""
        self.used = any(not torch.equal(a, b) for a, b in zip(self.random, self._random(), strict=True))
        if not self.used:
            self.random = []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A block in which the step's surroundings hold again."""
        with contextlib.ExitStack() as stack:
            if self.higher_order:
                stack.enter_context(higher_order())
            if self.used:
                stack.enter_context(torch.random.fork_rng(self.devices))
                torch.set_rng_state(self.random[0])
                for device, state in zip(self.devices, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield
