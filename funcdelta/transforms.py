"""Queries about ``torch.func``'s running transforms, and decorators that instruct ``torch.compile``.

Only this module reads torch's interpreter stack. The decorators do what those of ``torch.compiler`` do; importing
those would import torch._dynamo, and with it sympy and much else, for everybody who imports funcdelta.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

# torch has no public API for this; its own Python layer uses these functions.
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (the type checker does not know the attribute)
_frames: Any = getattr(torch._C, "_dynamo").eval_frame  # noqa: B009

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Decorate ``function`` so that it, and everything that it calls, runs as plain Python even in compiled code.

    >>> @eager
    ... def larger(x, y):
    ...     return max(x, y)
    >>> larger(1, 2)
    2
    """
    return _skipped(function, _frames._FrameAction.SKIP)


def eager_alone(function: Function) -> Function:
    """Decorate ``function`` so that it runs as plain Python even in compiled code; what it calls may be compiled.

    >>> @eager_alone
    ... def call(function, *args):
    ...     return function(*args)
    >>> call(max, 1, 2)
    2
    """
    return _skipped(function, _frames._FrameAction.DEFAULT)


def _skipped(function: Function, what_it_calls: Any) -> Function:
    strategy = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, what_it_calls)
    _frames.set_code_exec_strategy(function.__code__, strategy)  # for calls from plain Python
    function.__dict__["_torchdynamo_disable"] = True  # for calls that are traced
    return function


def constant_while_tracing(function: Function) -> Function:
    """Decorate ``function`` so that tracing by ``torch.compile`` runs it, and its result is a constant of the graph.

    >>> @constant_while_tracing
    ... def answer():
    ...     return 42
    >>> answer()
    42
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # During tracing torch reports that it is compiling, even to functions that it runs for real.
        compiler: Any = torch.compiler
        tracing, compiler._is_compiling_flag = compiler._is_compiling_flag, False
        try:
            return function(*args, **kwargs)
        finally:
            compiler._is_compiling_flag = tracing

    run.__dict__["_dynamo_marked_constant"] = True
    return run  # pyright: ignore[reportReturnType]


current_transform: Callable[[], Any] = _functorch.peek_interpreter_stack
"""Returns the innermost running transform, or ``None``; torch's own function, which costs next to nothing."""


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform is running; False in compiled code, where tracing hides it.

    >>> inside_transform(), torch.vmap(lambda x: x + inside_transform())(torch.zeros(2))
    (False, tensor([1., 1.]))
    """
    return not torch.compiler.is_compiling() and current_transform() is not None


def inside_backward() -> bool:
    """Whether autograd is running a backward pass, in which checkpointed modules run again.

    >>> inside_backward()
    False
    """
    return torch._C._current_graph_task_id() != -1


def wants_mathematical_attention() -> bool:
    """Whether fused attention would fail or be slow: inside two Grad levels, a Jvp level, or a Vmap level.

    Fused kernels have no double backward, no forward derivative, and no batching rule (vmap would loop over members).

    >>> wants_mathematical_attention()
    False
    """
    levels = _functorch.get_interpreter_stack()
    if not levels:
        return False
    kinds = [level.key() for level in levels]
    transform = _functorch.TransformType
    return kinds.count(transform.Grad) >= 2 or transform.Jvp in kinds or transform.Vmap in kinds


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``tensor`` belongs to a running transform, so that its values cannot be read.

    >>> is_wrapped(torch.zeros(2))
    False
    """
    return _functorch.is_functorch_wrapped_tensor(tensor)


def concrete(tensor: Tensor) -> Tensor:
    """The plain tensor inside the wrappers of ``torch.func``; of a mapped tensor, its first entry.

    >>> concrete(torch.ones(2))
    tensor([1., 1.])
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        axis = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor if axis is None else tensor.select(axis, 0)
    return tensor.detach()


def innermost(tensor: Tensor) -> Tensor:
    """The plain tensor inside the wrappers of ``torch.func``, including the mapped axes.

    >>> torch.vmap(lambda row: row + innermost(row).ndim)(torch.zeros(2, 3))
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def outside_of_map(compute: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """``compute(*values)`` one level outside of the innermost ``torch.vmap``, with the entries of all on a first axis.

    What it gives, with such an axis, too, is back inside of the map, where each entry has its own.

    >>> torch.vmap(lambda x: x + outside_of_map(lambda all_x: all_x.flip(0), 2 * x))(torch.tensor([1.0, 10.0]))
    tensor([21., 12.])
    """
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        raise RuntimeError("The innermost transform is not torch.vmap.")
    level, n = interpreter.level(), interpreter.batch_size()
    held = [_functorch._unwrap_batched(value, level) for value in values]
    with interpreter.lower():
        every = [v.expand(n, *v.shape) if axis is None else v.movedim(axis, 0) for v, axis in held]
        found = compute(*every)
    return _functorch._add_batch_dim(found, 0, level)


def outside_transforms() -> AbstractContextManager[Any]:
    """A block that runs as if no transform were running.

    >>> with outside_transforms():
    ...     inside_transform()
    False
    """
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()
