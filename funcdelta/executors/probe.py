"""The probe: learns a layout by running one row and two rows, and checks a fold before it is trusted."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calls.layout import Layout, Recorder, WithoutDropout, close, compare
from ..calls.lift import Folded, split_members
from ..calls.skeleton import Call, Params, Skeleton
from ..errors import FoldError, FuncdeltaError
from ..match import within
from ..planning.sharing import expand_stack
from ..pytrees.opaque import spare
from ..stacks.params import take
from ..transforms import concrete, eager, outside_transforms

if TYPE_CHECKING:
    from ..model import DeltaModel

OTHER_ENGINES = 'Use engine="vmap" or "loop".'

probing = threading.Lock()
"""Held while a layout is learned: two threads need not learn the same."""


def layout_for(
    delta: DeltaModel,
    stack: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    row_axis: Mapping[int, int],
    rows: int,
) -> Layout:
    """The layout of this input structure: remembered, or learned from one and two rows of these inputs."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = structure(delta, stack, leaves, kwargs)
    if torch.compiler.is_compiling():
        # Sizes may be symbolic here; how many rows there are does not matter, and other sizes are taken as they are.
        shapes = tuple(
            (tuple(2 if axis == row_axis.get(i) else int(size) for axis, size in enumerate(leaf.shape)), leaf.dtype)
            if isinstance(leaf, Tensor)
            else leaf
            for i, leaf in enumerate(leaves)
        )
        _learn_while_tracing(delta.handle, key, tuple(stack), shapes, len(args), tuple(kwargs), tuple(row_axis.items()))
        return delta.layouts[key]
    layout = delta.layouts.get(key)
    if layout is None:
        with probing:
            values = [concrete(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            names = delta.plan.present(stack)
            delta.layouts[key] = layout = learn(delta, names, values, spec, row_axis, rows)
    return layout


def _precision(leaves: list[Any]) -> str:
    """The dtype that autocast gives where the inputs are: outputs of modules that run once per member have it too."""
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


def structure(delta: DeltaModel, stack: Params, leaves: list[Any], kwargs: Mapping[str, Any]) -> str:
    """What decides where the batch is: the mode, the precision, which leaves are given, and facts of the inputs."""
    return "|".join(
        [str(delta.mode_flag), _precision(leaves), *sorted(delta.plan.present(stack)), *map(_fact, leaves), *kwargs]
    )


def _fact(leaf: Any) -> str:
    """What of an input decides where the batch is: not its sizes, but which of them are 1."""
    if isinstance(leaf, Tensor):
        # Branches, for a symbolic size must become a plain word here.
        return f"{leaf.dtype}" + "".join(["1" if size == 1 else "n" for size in leaf.shape])
    # A number may differ at every call; where the rows are does not hang on it.
    return type(leaf).__name__ if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) else str(leaf)


@torch._dynamo.assume_constant_result
def _learn_while_tracing(
    handle: int,
    key: str,
    names: tuple[str, ...],
    shapes: tuple[Any, ...],
    positional: int,
    keywords: tuple[str, ...],
    row_axis: tuple[tuple[int, int], ...],
) -> bool:
    """Learn a layout in the middle of a compilation, from made-up rows of the same shapes: tracing has no values."""
    from ..model import delta_of

    delta = delta_of(handle)
    if key in delta.layouts:
        return True
    if len(shapes) != positional + len(keywords):
        raise FoldError("Call apply_many once before compiling it: the inputs are nested, and their layout is unknown.")
    axes = dict(row_axis)
    rng = torch.Generator().manual_seed(0)
    leaves = []
    for i, fact in enumerate(shapes):
        if not isinstance(fact, tuple):
            leaves.append(fact)
            continue
        shape, dtype = list(fact[0]), fact[1]
        if i in axes:
            shape[axes[i]] = 2
        # Zeros and ones are valid token numbers, masks and token types alike.
        random = (
            torch.randn(shape, generator=rng) if dtype.is_floating_point else torch.randint(2, shape, generator=rng)
        )
        leaves.append(random.to(dtype))
    spec = pytree.tree_structure((tuple(leaves[:positional]), dict(zip(keywords, leaves[positional:], strict=True))))
    delta.layouts[key] = learn(delta, delta.plan.present(dict.fromkeys(names)), leaves, spec, axes, 2)
    return True


@eager
def learn(
    delta: DeltaModel,
    names: frozenset[str],
    leaves: list[Any],
    spec: Any,
    row_axis: Mapping[int, int],
    rows: int,
    entry: str = "",
) -> Layout:
    """Learn the layout, then check it: two members folded have to equal the first one alone.

    The module at ``entry`` is what is called. Of a cache among the inputs the same rows are taken as of the tensors.
    """
    pick = rows_of(leaves, spec, row_axis, rows)
    skeleton = delta.skeletons.build(delta.mode_flag)
    try:
        return _learn(delta, names, skeleton, pick, entry)
    except FoldError as error:
        raise FoldError(f"{error}{_why_rows_mix(skeleton.module, delta.batch_dim)}") from error


def rows_of(
    leaves: list[Any], spec: Any, row_axis: Mapping[int, int], rows: int
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """``pick(0, 1)`` gives the inputs with their first and last row, made different where they are equal."""
    pairs = {i: _two_rows(leaf, row_axis[i]) for i, leaf in enumerate(leaves) if i in row_axis}
    leaves = [_rows_of_cache(leaf, [0, rows - 1]) if is_cache(leaf) else leaf for leaf in leaves]
    if all(torch.equal(*pair.split(1, row_axis[i])) for i, pair in pairs.items()):
        pairs = {i: _unlike(pair, row_axis[i]) for i, pair in pairs.items()}

    def pick(*which: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        picked = [
            pairs[i].index_select(row_axis[i], torch.tensor(which, device=leaf.device))
            if i in pairs
            else _rows_of_cache(leaf, which)
            if is_cache(leaf)
            else leaf
            for i, leaf in enumerate(leaves)
        ]
        return spare(pytree.tree_unflatten(picked, spec))

    return pick


def _learn(
    delta: DeltaModel,
    names: frozenset[str],
    skeleton: Skeleton,
    pick: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
    entry: str,
) -> Layout:
    with outside_transforms(), torch.no_grad(), torch.random.fork_rng(), WithoutDropout():
        members = expand_stack(delta.plan.shared, delta.random_members(2, names))
        first = take(members, 0)
        # The last row first, too: where rows change places, one of the two orders shows it.
        _compare_orders(skeleton, entry, first, pick)
        one, out_one = _record(skeleton, entry, first, *pick(0))
        two, out_two = _record(skeleton, entry, first, *pick(0, 1))
        names_of_outputs = [_name(path) for path, _ in pytree.tree_flatten_with_path(out_one)[0]]
        flat_one, flat_two = pytree.tree_leaves(out_one), pytree.tree_leaves(out_two)
        if len(flat_one) != len(flat_two):
            raise FoldError('The output has another structure for two rows than for one. Use engine="vmap" or "loop".')
        layout = compare(one, two, flat_one, flat_two, names_of_outputs)
        _check_fold(delta, members, layout, pick(0, 1), skeleton, entry, flat_one, names_of_outputs)
    return layout


def _compare_orders(skeleton: Skeleton, entry: str, params: Params, pick: Callable[..., Any]) -> None:
    one, out_one = _record(skeleton, entry, params, *pick(1))
    two, out_two = _record(skeleton, entry, params, *pick(1, 0))
    flat_one, flat_two = pytree.tree_leaves(out_one), pytree.tree_leaves(out_two)
    if len(flat_one) == len(flat_two):
        compare(one, two, flat_one, flat_two, [_name(path) for path, _ in pytree.tree_flatten_with_path(out_one)[0]])


def _two_rows(leaf: Tensor, axis: int) -> Tensor:
    """The first and the last row."""
    return leaf.index_select(axis, torch.tensor([0, leaf.shape[axis] - 1], device=leaf.device))


def is_cache(leaf: Any) -> bool:
    """Whether an input is a cache whose rows can be chosen, as those of Transformers.

    >>> is_cache(torch.zeros(2))
    False
    """
    return hasattr(leaf, "reorder_cache") and not isinstance(leaf, nn.Module)


def _rows_of_cache(cache: Any, which: Sequence[int]) -> Any:
    """A copy of a cache with some of its rows."""
    cache = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor(which))
    return cache


def _unlike(pair: Tensor, axis: int) -> Tensor:
    """Two rows that differ: equal ones would not show whether rows are mixed."""
    first, second = pair.split(1, axis)
    if pair.is_floating_point():
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        return torch.cat([first, second + noise], axis)
    return torch.cat([first, second.flip(-1)], axis) if axis != pair.ndim - 1 else pair


def _record(
    skeleton: Skeleton, entry: str, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Recorder, Any]:
    call = Call(params, recorder=(recorder := Recorder()))
    if skeleton.units and skeleton.plan is not None:
        call.runners = skeleton.plan.runners(params)
    skeleton.follow_buffers()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return recorder, skeleton.enter(entry, params, args, kwargs, call)
    except (RuntimeError, ValueError) as error:
        # torch's complaint about shapes: an input was taken for rows that is none, or one row is too few for a batch
        # norm in training. Others are the model's own errors.
        if isinstance(error, FuncdeltaError) or not ("shape" in str(error) or "size" in str(error)):
            raise
        raise FoldError(f"The model fails on one or two rows of these inputs: {error}. {OTHER_ENGINES}") from error


def _check_fold(
    delta: DeltaModel,
    members: Params,
    layout: Layout,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    skeleton: Skeleton,
    entry: str,
    alone: list[Any],
    names: list[str],
) -> None:
    """Two members with one row each have to give what the first gives alone."""
    lift = Folded(2, 1)
    skeleton.follow_buffers()
    torch.manual_seed(0)
    call = Call(members, lift=lift, layout=layout, runners=runners(delta, members, layout, entry))
    try:
        together = pytree.tree_leaves(skeleton.enter(entry, {}, *given, call))
    except FuncdeltaError:
        raise
    except Exception as error:
        raise FoldError(f"Two members in one batch fail{lift.suspects()}: {error}. {OTHER_ENGINES}") from error
    for name, leaf, expected, dim in zip(names, together, alone, layout.outputs, strict=True):
        if isinstance(leaf, Tensor) and not close(split_members(leaf, dim, 2)[0], expected):
            raise FoldError(
                f"Two members in one batch do not give what one gives alone (output {name}){lift.suspects()}. "
                f"{OTHER_ENGINES}"
            )


def _why_rows_mix(model: nn.Module, batch_dim: int) -> str:
    """The two usual causes, with what to write, where the model shows them."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            return f" ({path} normalises over the batch in training mode: delta.mode(train=False) does not.)"
    if batch_dim == 0 and any(getattr(module, "batch_first", True) is False for module in model.modules()):
        return " (Where inputs are sequence-first, axis 1 counts the rows: give batch_dim=1 in the config.)"
    return ""


def _name(path: Any) -> str:
    return pytree.keystr(path).strip("[].'\"") or "of the model"


def runners(
    delta: DeltaModel, params: Params, layout: Layout, entry: str = "", skipped: str = ""
) -> Mapping[str, tuple[str, ...]]:
    """Modules that run once per member, each with the keys of params that it needs.

    A tensor that differs by member is used by the module that owns it, or, if that is never called, by the nearest
    module above it that is. A runner inside another runs within it. A call of the module at ``entry`` alone uses
    nothing else, nor does a call of the model that was given what the module at ``skipped`` gives.
    """
    needed: dict[str, list[str]] = {}
    for owner, keys in delta.plan.owners(params).items():
        path = owner
        if owner not in layout.runs:
            # A table that is read under another of its names. If it were read here too, the check of the fold fails.
            ends = {key: [end.rpartition(".")[0] for end in delta.plan.trained.get(key, ())] for key in keys}
            keys = [key for key in keys if not any(end in layout.runs for end in ends[key])]
        if not keys:
            continue
        while path and path not in layout.runs:
            path = path.rpartition(".")[0]
        if not path and (entry or (skipped and within(owner, skipped))):
            continue
        if not path:
            raise FoldError(
                f"{keys[0]} differs by member and is used by the model itself, outside of any module that could run "
                f'once per member. Use engine="vmap" or "loop".'
            )
        needed.setdefault(path, []).extend(keys)
    outermost = [p for p in needed if not any(p != q and p.startswith(q + ".") for q in needed)]
    found: dict[str, tuple[str, ...]] = {}
    for path in outermost:
        keys = [key for other, keys in needed.items() if other == path or other.startswith(path + ".") for key in keys]
        reached = [a for a in delta.plan.all() if any(end.startswith(path + ".") for end in a.ends)]
        for a in reached:
            if a.among(params) and not all(end.startswith(path + ".") for end in a.ends):
                raise FoldError(
                    f"{path} runs once per member, and the span from {a.site.path} to {a.site.exit} has one end in it. "
                    f"{OTHER_ENGINES}"
                )
        # Hidden values of the module itself are changed outside of it, its attention inside.
        reached += [a for a in delta.plan.all() if a.adds_keys and a.site.path == path]
        inside = [key for a in reached for key in a.leaves.values() if key in params]
        found[path] = tuple(dict.fromkeys(keys + inside))
    return found
