"""Finds the trunk: one call on a watched skeleton tells which modules run on what no delta has touched yet.

Modules that end before the first delta acts belong to it, and later ones whose every tensor is one of those that such
modules took or gave (the encoder's states, which every layer of a decoder projects anew). The same rows once and twice
over tell where each tensor has them. Then two members on the shared trunk have to give what each gives alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .errors import FoldError, FuncdeltaError
from .layout import Layout, WithoutDropout, close
from .lift import Folded
from .params import take
from .probe import probing, rows_of, runners, structure
from .reach import UNCHANGED
from .sharing import expand_stack
from .skeleton import Call, Params, Skeleton
from .transforms import concrete, eager, outside_transforms
from .trunk import Ends, Trunk, install, members_of, places

if TYPE_CHECKING:
    from .model import DeltaModel

PLAIN = (*UNCHANGED, torch.dtype, torch.device, torch.Size)
OTHER_ENGINES = 'Use engine="fold".'

Pick = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]


def trunk_for(
    delta: DeltaModel,
    stack: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    row_axis: Mapping[int, int],
    layout: Layout,
    least: float,
) -> Trunk:
    """The trunk of this input structure, folded inputs given: remembered, or found from two of their rows.

    Where nothing can be shared, or less than ``least`` of the arithmetic, ``refused`` says why.
    """
    if torch.compiler.is_compiling():
        return Trunk({}, 0.0, f"compiled code does not share a trunk. {OTHER_ENGINES}")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = structure(delta, stack, leaves, kwargs)
    trunk = delta.trunks.get(key)
    if trunk is None or (trunk.refused and trunk.share > least):
        with probing:
            values = [concrete(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                trunk = find(delta, delta.plan.present(stack), rows_of(values, spec, row_axis), layout, least)
            except FoldError as error:
                trunk = Trunk({}, 0.0, str(error))
            delta.trunks[key] = trunk
    return trunk


@eager
def find(delta: DeltaModel, names: frozenset[str], pick: Pick, layout: Layout, least: float) -> Trunk:
    """The trunk of a delta with the leaves ``names``; ``pick(0, 1)`` gives inputs of these rows.

    Raises :class:`FoldError` where members on it would not give what they give alone.
    """
    dropout = CountedDropout()
    with torch.inference_mode(False), outside_transforms(), torch.no_grad(), torch.random.fork_rng(), dropout:
        members = expand_stack(delta.plan.shared, delta.random_members(2, names))
        skeleton = delta.skeletons.build(delta.mode_flag)
        acting = _where_deltas_act(delta, members, layout, skeleton)

        def once(i: int) -> Any:
            return skeleton.run("", take(members, i), *pick(0, 1), Call(take(members, i)))

        def folded(trunk: Trunk | None) -> Any:
            call = Call(members, Folded(2, 2), layout, runners(delta, members, layout), trunk=trunk)
            args, kwargs = pick(0, 1, 0, 1)
            return skeleton.run("", {}, args, kwargs, call)

        single = Watch(skeleton, acting, dropout)
        first = single.run(lambda: once(0))
        # Most deltas act in every layer: for them the search ends here.
        at_most = compare(single, None)
        if at_most.refused or at_most.share < least:
            few = f"only {at_most.share:.0%} of the arithmetic comes before a delta. {OTHER_ENGINES}"
            return Trunk({}, at_most.share, at_most.refused or few)
        double = Watch(skeleton, acting, dropout)
        double.run(lambda: folded(None))
        trunk = compare(single, double)
        if trunk.refused:
            return trunk
        install(skeleton, trunk)
        alone = [first, _seeded(skeleton, lambda: once(1))]
        try:
            together = _seeded(skeleton, lambda: folded(trunk))
        except FuncdeltaError:
            raise
        except Exception as error:
            raise FoldError(f"Two members on a shared trunk fail: {error}. {OTHER_ENGINES}") from error
        _check(together, alone, layout)
    return trunk


def _where_deltas_act(delta: DeltaModel, members: Params, layout: Layout, skeleton: Skeleton) -> set[int]:
    """Modules at whose entrance members begin to differ."""
    paths = {end for a in delta.plan.all() if a.among(members) for end in a.ends}
    paths |= set(runners(delta, members, layout))
    return {id(skeleton.module.get_submodule(path)) for path in paths}


def _seeded(skeleton: Skeleton, run: Callable[[], Any], begin: Callable[[], None] = lambda: None) -> Any:
    skeleton.follow_buffers()
    torch.manual_seed(0)
    begin()
    return run()


def _check(together: Any, alone: list[Any], layout: Layout) -> None:
    found = pytree.tree_leaves(together)
    for i, output in enumerate(alone):
        for place, (leaf, expected, dim) in enumerate(
            zip(found, pytree.tree_leaves(output), layout.outputs, strict=True)
        ):
            if isinstance(leaf, Tensor) and not close(members_of(leaf, dim, 2, 2)[i], expected):
                raise FoldError(
                    f"Two members on a shared trunk do not give what each gives alone (output {place}). {OTHER_ENGINES}"
                )


# -- watching ------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """One call of a module.

    Attributes:
        parent: the index of the call that it stands in.
        alike: whether members do not differ in it.
        sharable: ``alike``, and it changes nothing and takes and gives nothing but tensors and plain values.
        inputs, outputs: shapes by place; ``flops`` of its arithmetic.
    """

    path: str
    parent: int | None
    alike: bool
    sharable: bool
    inputs: dict[str, tuple[int, ...]]
    other: tuple[Any, ...]
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flops: int = 0


class Watch:
    """Notes every module call of one run of a skeleton."""

    def __init__(self, skeleton: Skeleton, acting: set[int], dropout: CountedDropout) -> None:
        self.skeleton, self.acting, self.dropout = skeleton, acting, dropout
        self.visits: list[Visit] = []
        self.flops = Flops()
        self._open: list[tuple[int, int, int, list[Tensor], list[int]]] = []
        self._events = 0
        self._drawn: tuple[Any, ...] = ()
        self._alike: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """The output of ``call``, watched."""
        handles = []
        for path, module in self.skeleton.module.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving, with_kwargs=True))
        try:
            with self.flops:
                return _seeded(self.skeleton, call, self._begin)
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self) -> None:
        self._note_randomness([])
        self._events = 0

    def _note_randomness(self, tensors: list[Tensor]) -> None:
        """Random numbers are drawn for each member's rows, so members differ from there on."""
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
        drawn = self.dropout.count, *(state.numpy().tobytes() for state in states)
        if self._drawn[: len(drawn)] != drawn[: len(self._drawn)]:
            self._events += 1
        self._drawn = drawn

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves, _ = places((args, kwargs))
            tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
            self._note_randomness(tensors)
            if id(module) in self.acting:
                self._events += 1
            alike = not self._events or (bool(tensors) and all(map(self._is_alike, tensors)))
            if alike:
                self._remember(tensors)
            others = tuple((place, leaf) for place, leaf in leaves if not isinstance(leaf, Tensor))
            plain = all(isinstance(leaf, PLAIN) for _, leaf in others)
            shapes = {place: tuple(leaf.shape) for place, leaf in leaves if isinstance(leaf, Tensor)}
            visit = Visit(
                path, self._open[-1][0] if self._open else None, alike, plain, shapes, others if plain else ()
            )
            versions = [_version(tensor) for tensor in tensors]
            self._open.append((len(self.visits), self._events, self.flops.total, tensors, versions))
            self.visits.append(visit)

        return enter

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        index, events, flops, tensors, versions = self._open.pop()
        visit = self.visits[index]
        self._note_randomness(tensors)
        visit.alike &= self._events == events and id(module) not in self.acting
        visit.flops = self.flops.total - flops
        leaves, _ = places(output)
        visit.outputs = {place: tuple(leaf.shape) for place, leaf in leaves if isinstance(leaf, Tensor)}
        # A module that writes its inputs would write the first member's rows alone.
        visit.sharable &= visit.alike and [_version(tensor) for tensor in tensors] == versions
        # What hands on its input (dropout that is off) has nothing to save.
        handed_on = any(leaf is tensor for _, leaf in leaves for tensor in tensors)
        visit.sharable &= not handed_on and all(isinstance(leaf, PLAIN) for _, leaf in leaves)
        if visit.alike:
            self._remember([leaf for _, leaf in leaves if isinstance(leaf, Tensor)])

    def _remember(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._alike[id(tensor)] = weakref.ref(tensor), _version(tensor)

    def _is_alike(self, tensor: Tensor) -> bool:
        """Whether no delta has touched it: the very tensor, not written since."""
        known = self._alike.get(id(tensor))
        return known is not None and known[0]() is tensor and known[1] == _version(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def compare(single: Watch, double: Watch | None) -> Trunk:
    """The outermost calls that can be shared, with the axes that double when the same rows come twice.

    Without ``double`` the most that they can be: where their rows are is not known.
    """
    if double is not None and [v.path for v in single.visits] != [v.path for v in double.visits]:
        return Trunk({}, 0.0, f"which modules run depends on the number of members. {OTHER_ENGINES}")
    modules: dict[str, list[Ends | None]] = {}
    inside: set[int] = set()
    flops = 0
    for index, (one, two) in enumerate(zip(single.visits, (double or single).visits, strict=True)):
        nested = one.parent in inside
        ends = None if nested or not one.path or not (one.sharable and two.sharable) else _ends(one, two)
        if nested or ends is not None:
            inside.add(index)
        if ends is not None:
            flops += one.flops
        modules.setdefault(one.path, []).append(ends)
    shared = {path: tuple(visits) for path, visits in modules.items() if any(visits)}
    if not shared:
        return Trunk({}, 0.0, f"no module runs on what all members have in common. {OTHER_ENGINES}")
    return Trunk(shared, flops / single.flops.total if single.flops.total else 1.0)


def _ends(one: Visit, two: Visit) -> Ends | None:
    """Where the rows are; ``None`` where there are none on one side, or they cannot be told."""
    if one is two:
        return Ends({}, {})
    if one.other != two.other:
        return None
    inputs, outputs = _grown(one.inputs, two.inputs), _grown(one.outputs, two.outputs)
    if inputs is None or outputs is None or not any(axis is not None for axis in inputs.values()):
        return None
    return Ends(inputs, outputs) if any(axis is not None for axis in outputs.values()) else None


def _grown(one: dict[str, tuple[int, ...]], two: dict[str, tuple[int, ...]]) -> dict[str, int | None] | None:
    if one.keys() != two.keys():
        return None
    found: dict[str, int | None] = {}
    for place, shape in one.items():
        other = two[place]
        grown = [axis for axis in range(len(shape)) if len(other) == len(shape) and shape[axis] != other[axis]]
        if len(other) != len(shape) or len(grown) > 1 or any(other[axis] != 2 * shape[axis] for axis in grown):
            return None
        found[place] = grown[0] if grown else None
    return found


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of the matrix products inside the block.

    >>> with Flops() as flops:
    ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> flops.total
    48
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class CountedDropout(WithoutDropout):
    """Turns dropout off and counts where it would have acted: masks are drawn for each member's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in self.OFF:
            share, training = (*args[1:3], *(None, None))[:2]
            share = given.get("p", 0.5) if share is None else share
            training = given.get("training", given.get("train", True)) if training is None else training
            if training and share > 0:
                self.count += 1
                # Another tensor, as it would be, and not one that no random number has touched.
                return super().__torch_function__(func, types, args, kwargs).clone()
        elif func is torch.nn.functional.scaled_dot_product_attention:
            self.count += float(args[4] if len(args) > 4 else given.get("dropout_p", 0.0)) > 0
        elif func is torch.nn.functional.multi_head_attention_forward:
            # Its chance stands eleventh.
            share = args[10] if len(args) > 10 else given.get("dropout_p", 0.0)
            self.count += bool(given.get("training", True)) and share > 0
        return super().__torch_function__(func, types, args, kwargs)
