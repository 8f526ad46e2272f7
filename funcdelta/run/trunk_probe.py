"""Finds the trunk: which modules run on values that no delta has touched, seen in one call on a watched skeleton.

Modules that end before the first delta acts belong to it, and later ones if each of their inputs is an input or output
of such modules (every layer of a decoder projects the encoder's states). A call with the same rows twice shows, by the
sizes that double, where each tensor has its rows. Finally two members on the shared trunk have to get what each gets
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FoldError, FuncdeltaError
from ..plan.sharing import expand_stack
from ..randomness import private_random
from ..transforms import eager, outside_transforms
from ..trees.stack import take
from .call import Call, Params
from .fold import Folded, members_of
from .inputs import Inputs
from .layout import Layout, Run, close
from .layouts import key_of, picked, probing
from .program import Program
from .skeleton import Skeleton
from .trunk import TRUNK, Ends, Trunk, install
from .watch import CountedDropout, Visit, Watch

OTHER_ENGINES = 'Use engine="fold".'


def trunk_for(program: Program, stack: Params, inputs: Inputs, layout: Layout, least: float) -> Trunk:
    """The trunk for these inputs: remembered, or found from two rows.

    If nothing can be shared, or less than ``least`` of the arithmetic, its ``refused`` says why.
    """
    if torch.compiler.is_compiling():
        return Trunk({}, 0.0, f"compiled code cannot share a trunk. {OTHER_ENGINES}")
    key = key_of(program, stack, inputs)
    trunk = program.trunks.get(key)
    if trunk is None or (trunk.refused and trunk.share > least):
        with probing:
            try:
                trunk = find(program, program.plan.present(stack), inputs, layout, least)
            except FoldError as error:
                trunk = Trunk({}, 0.0, str(error))
            program.trunks[key] = trunk
    return trunk


@eager
def find(program: Program, present: frozenset[str], inputs: Inputs, layout: Layout, least: float) -> Trunk:
    """The trunk of a delta with the leaves ``present``.

    Raises :class:`FoldError` if members on it do not get what they get alone.
    """
    dropout = CountedDropout()
    inputs, rows = inputs.concrete(), [0, inputs.b - 1]
    # A private copy, because watching hooks its modules.
    skeleton = program.skeletons.build(program.training)
    with torch.inference_mode(False), outside_transforms(), torch.no_grad(), dropout:
        members = expand_stack(program.plan.shared, program.random_members(2, present))
        acting = _where_deltas_act(program, members, layout, skeleton)

        def once(i: int) -> Any:
            params = take(members, i)
            owned = program.plan.outermost(params) if skeleton.units else {}
            call = Call(params, runs={path: Run(keys) for path, keys in owned.items()})
            return skeleton.run("", params, *picked(inputs, (0, rows)), call)

        def folded(trunk: Trunk | None) -> Any:
            call = Call(members, Folded(2, 2), layout, layout.runs)
            for path in layout.runs:
                skeleton.open(path)
            if trunk is not None:
                call.notes[TRUNK] = trunk
            args, kwargs = picked(inputs, (0, rows), (0, rows))
            return skeleton.run("", {}, args, kwargs, call)

        single = Watch(skeleton, acting, dropout)
        first = single.run(lambda: once(0))
        # Most deltas act in every layer, and the search ends here.
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
        with private_random(0):
            alone = [first, once(1)]
        try:
            with private_random(0):
                together = folded(trunk)
        except FuncdeltaError:
            raise
        except Exception as error:
            raise FoldError(f"Two members on a shared trunk fail: {error}. {OTHER_ENGINES}") from error
        _check(together, alone, layout)
    return trunk


def _where_deltas_act(program: Program, members: Params, layout: Layout, skeleton: Skeleton) -> set[int]:
    """The ids of the modules at whose inputs or outputs members may begin to differ."""
    paths = {end for a in program.plan.all() if a.among(members) for end in a.ends}
    paths |= set(layout.runs)
    return {id(skeleton.module.get_submodule(path)) for path in paths}


def _check(together: Any, alone: list[Any], layout: Layout) -> None:
    found = pytree.tree_leaves(together)
    for i, output in enumerate(alone):
        for place, (leaf, expected, dim) in enumerate(
            zip(found, pytree.tree_leaves(output), layout.outputs, strict=True)
        ):
            if isinstance(leaf, Tensor) and not close(members_of(leaf, dim, 2, 2)[i], expected):
                raise FoldError(
                    f"Two members on a shared trunk do not get what each gets alone (output {place}). {OTHER_ENGINES}"
                )


def compare(single: Watch, double: Watch | None) -> Trunk:
    """The trunk of the outermost calls that can be shared; their rows are on the axes that double.

    Without ``double`` an upper bound: the axes are unknown, and some calls may turn out not to be shared.
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
        return Trunk({}, 0.0, f"no module runs on values that all members have in common. {OTHER_ENGINES}")
    return Trunk(shared, flops / single.flops.total if single.flops.total else 1.0)


def _ends(one: Visit, two: Visit) -> Ends | None:
    """Where a call has its rows; ``None`` if its inputs or outputs have none, or it is unclear where."""
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
