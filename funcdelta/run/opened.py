"""Opened modules: the forward of a site, as a delta changes it.

A module of a skeleton is *opened* by giving it a forward of its own, around the one that it has. There the methods'
functions act on the hidden values that enter and leave it, and there it runs once per member where tensors of its own
differ by member. Hooks, the backbone's own among them, see the opened forward as they would see the module's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, FoldError, FuncdeltaError
from ..plan.attachment import Attachment
from ..plan.spans import keep, take
from ..randomness import refuse_draws
from ..transforms import innermost
from .bound import Bound, in_precision
from .call import TENSOR, Call, Host, Params
from .hidden import hidden_input, hidden_output
from .layout import Hidden, LayoutMismatchError, Run
from .lookups import padded_lookups
from .reading import READ, refuse_replaced, set_plainly
from .told import told

Result = TypeVar("Result")

DRAW = "in evaluation mode a method computes one thing of one input; draw where site.training is true, or draw leaves"


class Bypass(nn.Module):
    """Runs a module's own forward, for compiled code, which swaps tensors by ``functional_call``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class Opened:
    """What the forward of one opened module does besides running the module.

    Attributes:
        original: the forward that the module had.
        befores, afters: methods that act on what enters and leaves it.
        begun: spans that begin here and end elsewhere.
        quick: the methods, if all act on the output alone and need no more than what enters and leaves.
        running: how many calls of the module are under way; meanwhile its tensors are read by itself.
        kind, shown: the module's class, and the one that answers whoever else reads its tensors, if that is another.
    """

    def __init__(self, skeleton: Host, path: str, module: nn.Module) -> None:
        self.skeleton, self.path, self.module = skeleton, path, module
        self.original: Callable[..., Any] = module.forward
        self.befores: list[Bound] = []
        self.afters: list[Bound] = []
        self.begun: list[Attachment] = []
        self.quick: tuple[Bound, ...] = ()
        self.running = 0
        self.kind: type[nn.Module] = type(module)
        self.shown: type[nn.Module] | None = None
        forward = functools.partial(_forward, self)
        functools.update_wrapper(forward, self.original)
        module.forward = forward  # type: ignore[method-assign]
        self._bypasses = Bypass(module, self.original), Bypass(module, forward)

    def bypass(self, forward: Callable[..., Any]) -> Bypass:
        """A module that runs ``forward``, the original or the opened one."""
        return self._bypasses[forward is not self.original]


def _forward(opened: Opened, /, *args: Any, **kwargs: Any) -> Any:
    """The opened forward; a function, for torch.compile traces it."""
    call = opened.skeleton.call
    if call is None or not call.plain or not opened.quick or kwargs or len(args) != 1 or call.notes:
        return _with_care(opened, call, args, kwargs)
    # What nearly every call of a site is: tensors in and out, methods that act on the output alone.
    (x,), module, shown, lift = args, opened.module, opened.shown, call.lift
    dims = None if lift is None else where(call, opened.path)
    outermost = shown is not None and not opened.running
    opened.running += 1
    if outermost:
        set_plainly(module, "__class__", opened.kind)
    try:
        output = opened.original(x)
    finally:
        opened.running -= 1
        if outermost:
            set_plainly(module, "__class__", shown)
    if not isinstance(x, Tensor):
        x, _ = hidden_input(opened.path, args, {})
    y, put_back = (output, None) if isinstance(output, Tensor) else hidden_output(opened.path, output)
    params, own, training = call.params, y.dtype, module.training
    for bound in opened.quick:
        if bound.key not in params:
            continue
        p = {name: params[key] for name, key in bound.pairs}
        # In the leaves' own precision there is nothing to convert.
        alike = own == x.dtype == p[bound.first].dtype
        try:
            if lift is not None and dims is not None:
                function = (bound.together if alike else bound.functions)[training]
                y, _ = lift(function, p, (y, x), (dims.y, dims.x), opened.path)
            elif alike:
                y = bound.alone[training](p, y, x)
            else:
                y = bound.functions[training](p, y, x)
        except FuncdeltaError:
            raise
        except Exception as error:
            _note(error, opened.path, p, (y, x))
            raise
        if not isinstance(y, Tensor) or y.dtype != own:
            y = in_precision(y, own, "The method", opened.path)
    return y if put_back is None else put_back(y)


def _with_care(opened: Opened, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same in every other call: one that is watched, compiled or recomputed, with spans or members in turn."""
    path = opened.path
    if call is None or opened.skeleton.recomputing:
        call = opened.skeleton.under_way(path)
    if call.watch is not None:
        call.watch.called(path)
    run = call.runs.get(path) if call.runs else None
    if call.layout is not None and path in call.layout.unused:
        raise LayoutMismatchError(f"{path} is called, but was not when the layout of these inputs was learned.")
    if run is not None and run.how == "loop" and call.lift is not None:
        return run_members(opened, call, run, args, kwargs)
    befores, afters, begun = opened.befores, opened.afters, opened.begun
    if not (befores or afters or begun):
        return _inner(opened, call, run, args, kwargs)
    if call.reached is not None:
        call.reached.add(path)
    x, put_back = (args[0], None) if args and isinstance(args[0], Tensor) else hidden_input(path, args, kwargs)
    x_dim = y_dim = None
    if call.lift is not None:
        if call.watch is not None:
            x_dim = call.watch.axis(path, x)
        else:
            dims = where(call, path)
            x_dim, y_dim = dims.x, dims.y
    entered = x
    if begun or befores:
        for bound in befores:
            if bound.key in call.params:
                x, x_dim = act(call, path, bound, opened.module.training, (x,), (x_dim,), entered)
        if x is not entered:
            args, kwargs = ((x, *args[1:]), kwargs) if put_back is None else put_back(x)
        for attachment in begun:
            if attachment.key in call.params:
                keep(call.note("spans"), attachment.key, attachment.site, x, x_dim, call.never_ends or call.ended)
    output = _inner(opened, call, run, args, kwargs)
    if not afters and (call.watch is None or call.lift is None):
        return output
    y, put_back = (output, None) if isinstance(output, Tensor) else hidden_output(path, output)
    if call.watch is not None and call.lift is not None:
        y_dim = call.watch.axis(path, y)
        call.watch.site(path, x_dim, y_dim)
    changed = False
    for bound in afters:
        if bound.key in call.params:
            given, given_dim = x, x_dim
            if bound.spans:
                given, given_dim = take(call.note("spans"), bound.key, bound.attachment.site)
            y, y_dim = act(call, path, bound, opened.module.training, (y, given), (y_dim, given_dim), entered)
            changed = True
    if not changed:
        return output
    return y if put_back is None else put_back(y)


def _inner(opened: Opened, call: Call, run: Run | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's own forward; while it runs, its tensors are read by itself."""
    if call.notes and READ in call.notes:
        refuse_replaced(opened.module, opened.path, call.notes[READ])
    shown = None if opened.running or torch.compiler.is_compiling() else opened.shown
    opened.running += 1
    if shown is not None:
        set_plainly(opened.module, "__class__", opened.kind)
    try:
        return opened.original(*args, **kwargs) if run is None else run_members(opened, call, run, args, kwargs)
    finally:
        opened.running -= 1
        if shown is not None:
            set_plainly(opened.module, "__class__", shown)


def where(call: Call, path: str) -> Hidden:
    """The axes of rows at this visit of the site at ``path``, in a fold.

    >>> from .layout import Layout
    >>> where(Call({}, layout=Layout({"0": (Hidden(0, 1),)})), "0")
    Hidden(x=0, y=1)
    """
    layout, visits = call.layout, call.visits
    if layout is None:
        raise FoldError(f"{path} ran outside of a call that knows the rows' members.")
    index, known = visits.get(path, 0), layout.sites.get(path, ())
    if call.ended or index >= len(known):
        return layout.site(path, call.visit(path))
    visits[path] = index + 1
    return known[index]


def act(
    call: Call,
    path: str,
    bound: Bound,
    training: bool,
    values: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    entered: Tensor | None = None,
) -> tuple[Tensor, int | None]:
    """One method's function at a site, with the site named in whatever goes wrong.

    ``entered`` is what the model gave to the site, before other methods there changed it.
    """
    p = bound.leaves(call.params)
    function, lift = bound.functions[training], call.lift
    if bound.conditions:
        values, dims = told(call, path, bound, values, dims, entered)
    if torch.compiler.is_compiling():
        return (function(p, *values), None) if lift is None else lift(function, p, values, dims, path)
    if call.reached is not None:
        values = tuple(map(_counted, values))

    def compute() -> tuple[Tensor, int | None]:
        if lift is None:
            return function(p, *values), None
        lifted = functools.partial(lift, function, p, values, dims, path)
        return lifted() if call.watch is None else call.watch.lifted(lifted)

    result = checked(call, path, bound, training, p, values, compute)
    same = not bound.keeps_shape or result[1] != dims[0] or values[0].is_nested
    if not same and _closely(call) and result[0].shape != values[0].shape:
        # Where nothing had rows, members may have brought some; what acts before a site may have changed its length.
        raise ConfigError(
            f"The method at {path} gave the shape {tuple(result[0].shape)} for a hidden output of the shape "
            f"{tuple(values[0].shape)}: what leaves a site has one shape, with the method or without it."
        )
    return result


def _closely(call: Call) -> bool:
    """Whether a method's functions are looked at closely, as in the first calls: it does the same in all others."""
    return (call.reached is not None or call.watch is not None) and not torch.compiler.is_compiling()


def checked(
    call: Call,
    path: str,
    bound: Bound,
    training: bool,
    p: Params,
    values: tuple[Tensor, ...],
    compute: Callable[[], Result],
) -> Result:
    """What ``compute`` gives, a method's function of ``values`` at a site, which is named in whatever goes wrong."""
    if torch.compiler.is_compiling():
        return compute()
    closely = _closely(call)
    given = {**p, **bound.attachment.fixed} if closely else {}
    versions, before = _versions(values), _versions(given.values())
    draws = refuse_draws(f"The method at {path}", DRAW) if closely and not training else contextlib.nullcontext()
    try:
        with draws:
            result = compute()
    except FuncdeltaError:
        raise
    except Exception as error:
        _note(error, path, p, values)
        raise
    if _versions(values) != versions:
        raise ConfigError(
            f"The method at {path} changed a hidden value in place, which others still read: write y = y + change "
            f"instead of y += change."
        )
    if closely:
        after = _versions(given.values())
        _check_unwritten(
            path, [leaf for leaf, *times in zip(given, before, after, strict=True) if times[0] != times[1]]
        )
    return result


def _check_unwritten(path: str, written: list[str]) -> None:
    """Refuse a method that wrote into what it was given by name."""
    if written:
        leaf = f"p[{written[0]!r}]"
        raise ConfigError(
            f"The method at {path} changed {leaf} in place, which others read as well, and the caller keeps: compute "
            f"with a changed copy, {leaf} * 2 instead of {leaf}.mul_(2)."
        )


def _note(error: Exception, path: str, p: Params, values: tuple[Tensor, ...]) -> None:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in p.items())
    hidden = ", ".join(str(tuple(value.shape)) for value in values)
    error.add_note(f"funcdelta: at the site {path}, leaves {shapes}, hidden values {hidden}.")


def _versions(values: Iterable[Tensor]) -> list[int | None]:
    with torch._C.DisableTorchFunction():
        return [None if value.is_inference() else value._version for value in map(innermost, values)]


def _counted(value: Tensor) -> Tensor:
    """The same numbers in a tensor whose writes torch counts: of one that was made in inference mode a copy."""
    if not innermost(value).is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def run_members(opened: Opened, call: Call, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module with tensors of the member's own: once, or once for each of the members that share the batch."""
    skeleton, path = opened.skeleton, opened.path
    if call.watch is not None and call.lift is not None:
        return call.watch.run(path, call, opened.original, args, kwargs)
    skeleton.check_unit(path, call)
    if call.lift is None:
        p = {key: call.params[key] for key in run.keys}
        inner = Call(p, reached=call.reached, notes=call.notes, never_ends=call.never_ends)
        return skeleton.run_inside(path, opened.original, p, args, kwargs, inner)
    skeleton.check_runner(path)
    # A module that runs in turn brings the methods that act at it with it.
    forward = opened.module.forward if run.how == "loop" else opened.original
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shape_of_output: list[Any] = []

    def member(p: Params, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        output = skeleton.run_inside(path, forward, p, args, kwargs, Call(p, reached=call.reached))
        out_leaves, out_spec = pytree.tree_flatten(output)
        shape_of_output[:] = [out_spec, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]]
        return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

    p = {key: call.params[key] for key in run.keys}
    with padded_lookups(skeleton.pads):
        results = iter(call.lift.run(member, p, tensors, run, call.visit(f"{path}()"), path))
    out_spec, others = shape_of_output
    # An output that is no tensor stays as it is.
    return pytree.tree_unflatten([next(results) if other is TENSOR else other for other in others], out_spec)
