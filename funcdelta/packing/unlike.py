"""Members of different deltas in one stack: ``pack`` puts (delta, params) pairs side by side, ``unpack`` inverts it.

A stack has one tensor per leaf, so members with other ranks, sites or methods must be given the same leaves. A *slot*
is one packed config of the delta that they then share (:mod:`funcdelta.packing.packed`). Configs of one method share a
slot if their leaves have the same shapes or can be padded to them; other configs get their own slots, which do not act
on members without them. Every member carries the leaves of every slot, so a slot costs n times its largest member.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError
from ..model import DeltaModel
from ..run.checked import checks_of
from ..trees.constants import still
from ..trees.stack import stack, take
from .agreement import check_agreement
from .packed import Packed
from .shelves import stacked, taken_out
from .slots import Chunk, Slot, exactly, place

Pair = tuple[DeltaModel, Mapping[str, Tensor]]

PADDINGS = ("auto", "pad", "group")


def pack(pairs: Iterable[Pair], padding: str = "auto") -> tuple[DeltaModel, dict[str, Tensor]]:
    """One delta and one stack for members of different deltas on one backbone; each computes what it computes alone.

    ``pairs`` are ``(delta, params)``, where params may also be a stack. Members may differ in rank or bottleneck,
    scale, dropout, sites and methods, but not in the backbone, the trained backbone leaves and the mode. Parts that a
    member does not have do not act on it and have no gradient, whatever an optimiser does to their leaves.

    Args:
        padding: ``"auto"`` pads leaves with zeros to one size if the method allows it, and makes a slot for each other
            size. A stack of ranks r₁ … rₙ then holds n · max r; with ``"group"``, which makes a slot for every size,
            it holds n times the sum of the distinct ranks. ``"pad"`` raises if a size cannot be padded. If a few
            members are far larger than the rest, two stacks are smaller than one.

    Raises ``ParamsError`` for pairs that cannot share a stack, with the reason.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    >>> small = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> large = fd.LoraModel(backbone, lora_r=3, lora_alpha=8, modified_modules=["0", "2"])
    >>> other = fd.AdapterModel(backbone, bottleneck_dim=2, modified_modules=["2"])
    >>> pairs = [(small, small.init(0)), (large, large.init(1)), (other, other.init(2))]
    >>> delta, stack = fd.pack(pairs)
    >>> {name: tuple(leaf.shape) for name, leaf in stack.items() if name.startswith("0.")}
    {'0.lora.lora_A': (3, 3, 4), '0.lora.lora_B': (3, 8, 3), '0.lora.scale': (3,), '0.lora.size.rank': (3,), \
'0.lora.present': (3,)}
    >>> x = torch.randn(5, 4)
    >>> outs = delta.apply_many(stack, x)
    >>> all(torch.allclose(out, one.apply(params, x), atol=1e-6) for out, (one, params) in zip(outs, pairs))
    True
    """
    if padding not in PADDINGS:
        raise ParamsError(f"padding={padding!r}: write one of {', '.join(PADDINGS)}.")
    chunks = _chunks(pairs)
    slots: list[Slot] = []
    kinds: dict[Any, tuple[int, ...]] = {}
    for chunk in chunks:
        if chunk.kind not in kinds:
            kinds[chunk.kind] = place(chunk, slots, padding)
    used = [set(places) for places in kinds.values()]
    first = chunks[0].delta
    taken: set[str] = set()
    configs = [slot.config(taken, all(i in own for own in used), first) for i, slot in enumerate(slots)]
    if first.plan.trained:
        configs[0] = configs[0].replace(
            unfrozen_modules=("deltas", *map(exactly, first.plan.trained)),
            unfrozen_init="fresh" if first.plan.fresh else "copy",
        )
    examples = [chunk.delta.example for chunk in chunks if chunk.delta.example is not None]
    delta = DeltaModel(first.backbone, *configs, example=examples[0] if examples else None, prepare=first.prepare)
    delta = delta if first.mode_flag is None else delta.mode(train=first.mode_flag)
    check_agreement(delta)
    return delta, still(stacked(delta, chunks, slots, kinds), delta.constants)


def unpack(delta: DeltaModel, stack: Mapping[str, Tensor]) -> list[tuple[DeltaModel, dict[str, Tensor]]]:
    """The inverse of :func:`pack`, bit for bit: every member with a delta of its original configs.

    Members that came in one stack and are still adjacent are returned as one. ``stack`` may have been trained, and may
    hold only some of the members, in any order (``fd.take``). The deltas are built anew, one per kind of member.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> one, two = (fd.LoraModel(backbone, lora_r=r, modified_modules=["0"]) for r in (1, 2))
    >>> packed = fd.pack([(one, one.init(0)), (two, two.init(1, n=5))])
    >>> [(delta.configs[0].lora_r, tuple(params["0.lora.scale"].shape)) for delta, params in fd.unpack(*packed)]
    [(1, ()), (2, (5,))]
    """
    packed = _packed_configs(delta)
    n, _ = checks_of(delta).stack(stack)
    _need_all(delta, stack, "unpack")
    for name, config in zip(delta.plan.names, packed, strict=True):
        if len(config.origins) * torch.finfo(stack[f"{name}.source"].dtype).eps > 2:
            raise ParamsError(
                f"{name}.source is {stack[f'{name}.source'].dtype}, which cannot count to {len(config.origins)}; keep "
                f"this leaf in float32."
            )
    sources = torch.stack([stack[f"{name}.source"].detach().round().long().cpu() for name in delta.plan.names], 1)
    rows = [tuple(row) for row in sources.tolist()]
    built: dict[Any, DeltaModel] = {}
    pairs: list[tuple[DeltaModel, dict[str, Tensor]]] = []
    start = 0
    while start < n:
        kind = rows[start]
        origins = {i: packed[i].origins[source] for i, source in enumerate(kind) if source >= 0}
        if not origins:
            raise ParamsError(f"Member {start} of the stack has no origin: all its leaves called source are -1.")
        as_stack = any(origin.stack is not None for origin in origins.values())
        stop = start + 1
        while as_stack and stop < n and rows[stop] == kind:
            stop += 1
        if kind not in built:
            own = DeltaModel(
                delta.backbone, *(o.config for o in origins.values()), example=delta.example, prepare=delta.prepare
            )
            built[kind] = own if delta.mode_flag is None else own.mode(train=delta.mode_flag)
        params = take(dict(stack), slice(start, stop) if as_stack else start)
        own = taken_out(delta, params, built[kind], list(origins))
        pairs.append((built[kind], still(own, built[kind].constants)))
        start = stop
    return pairs


# -- pairs ---------------------------------------------------------------------------------------------------------


def _chunks(pairs: Iterable[Pair]) -> list[Chunk]:
    """The pairs, checked; adjacent single members of one delta become one chunk."""
    pairs = list(pairs)
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 and isinstance(p[0], DeltaModel) for p in pairs):
        raise ParamsError("pack takes pairs, one or more: fd.pack([(delta_a, params_a), (delta_b, params_b)]).")
    runs: list[tuple[DeltaModel, list[Mapping[str, Tensor]], int | None]] = []
    for number, (delta, params) in enumerate(pairs):
        _check_alike(number, delta, pairs[0][0])
        is_stack = _check_params(number, delta, params)
        if not is_stack and runs and runs[-1][2] is None and runs[-1][0].configs == delta.configs:
            runs[-1][1].append(params)
        else:
            runs.append((delta, [params], number if is_stack else None))
    return [
        Chunk(delta, stack([{name: one[name] for name in delta.names} for one in run]), None)
        if number is None
        else Chunk(delta, run[0], number)
        for delta, run, number in runs
    ]


def _check_alike(number: int, delta: DeltaModel, first: DeltaModel) -> None:
    who = f"Pair {number} cannot share a stack with pair 0: "
    if delta.backbone is not first.backbone:
        raise ParamsError(f"{who}its backbone is another object. Build both deltas on one backbone.")
    if any(isinstance(config, Packed) for config in delta.configs):
        raise ParamsError(
            f"Pair {number} is packed already: write fd.pack([*fd.unpack(delta, stack), ...]), which packs all at once."
        )
    if delta.training != first.training or delta.mode_flag != first.mode_flag:
        raise ParamsError(f"{who}their modes differ. Write delta.mode(train={first.training}) of each.")
    if delta.batch_dim != first.batch_dim or delta.prepare is not first.prepare:
        field_name = "batch_dim" if delta.batch_dim != first.batch_dim else "prepare"
        raise ParamsError(f"{who}{field_name} differs, but the whole batch has to run with one.")
    unlike = sorted(set(delta.plan.trained) ^ set(first.plan.trained))
    if unlike:
        has, lacks = (number, 0) if unlike[0] in delta.plan.trained else (0, number)
        raise ParamsError(
            f"{who}pair {has} trains {unlike[0]} of the backbone, and pair {lacks} does not. All members of a stack "
            f"train the same backbone leaves: give all the same unfrozen_modules, or pack them separately."
        )


def _check_params(number: int, delta: DeltaModel, params: Any) -> bool:
    """Whether ``params`` is a stack; raises unless it is complete."""
    is_stack = checks_of(delta).is_stack(params)
    _need_all(delta, params, f"pair {number}")
    return is_stack


def _need_all(delta: DeltaModel, params: Mapping[str, Tensor], what: str) -> None:
    missing = [name for name in delta.names if name not in params]
    if missing:
        raise ParamsError(f"{what}: {len(missing)} leaves are missing, first {missing[0]!r}. Give all of them.")


def _packed_configs(delta: DeltaModel) -> list[Packed]:
    configs = [config for config in delta.configs if isinstance(config, Packed)]
    if len(configs) != len(delta.configs):
        raise ParamsError(f"{type(delta).__name__} was not made by fd.pack. Its members are fd.unstack(stack).")
    return configs
