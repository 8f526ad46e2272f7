"""``engine="auto"``: run a call by the first engine that can, and remember why the others could not.

Any error of an engine, torch's own included, leads to the next one. Refusals are remembered by the key of the inputs,
so that nothing is tried twice, and the user is warned once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EngineError, EngineWarning, FuncdeltaError
from .call import Params
from .engines import call_best_fold, call_loop, call_vmap
from .inputs import Inputs
from .layout import MixedBackwardError
from .layouts import key_of, layout_of
from .on_copies import on_copies
from .program import Program

SHORT = 300
"""How many characters of a reason are shown."""

AUTO = {"fold": call_best_fold, "vmap": call_vmap, "loop": call_loop}
"""In the order in which they are tried: a fold is fastest, vmap can do some of what it cannot, a loop runs anything."""


def run_any(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None) -> Any:
    """Every member's output, by the first engine that can compute it."""
    if torch.compiler.is_compiling():
        return call_best_fold(program, stack, inputs, reached)
    ways = {name: lambda inputs, run=run: run(program, stack, inputs, reached) for name, run in AUTO.items()}
    return run_first_that_can(program, lambda: key_of(program, stack, inputs), ways, inputs, "apply_many")


def run_first_that_can(
    program: Program,
    key_of_now: Callable[[], Any],
    ways: Mapping[str, Callable[[Inputs], Any]],
    inputs: Inputs,
    call: str,
) -> Any:
    """The result of the first of ``ways`` that can run; an error of the last one is raised as it is.

    A refusal is remembered under the key of the inputs, but only once a later way has succeeded: an error that every
    way raises says nothing about engines. The key is then computed anew, because a probe may meanwhile have found that
    the values of some input belong to it.
    """
    key = key_of_now()
    refused: dict[str, str] = {}
    ours = False
    last = list(ways)[-1]
    for name, run in ways.items():
        if name in refused or (name != last and (name, call, key) in program.refusals):
            continue
        try:
            # A way may write into the inputs before it fails; the next one needs them unchanged.
            result = on_copies(inputs, run) if program.writes_inputs and name != last else run(inputs)
        except FuncdeltaError as error:
            if name == last or not isinstance(error, EngineError):
                raise
            refused[name], ours = str(error), True
            if isinstance(error, MixedBackwardError):
                # Under vmap tensors do not require grad, so the model would silently leave out its backward hooks.
                refused |= dict.fromkeys([other for other in ways if other not in (name, last)], str(error))
        except Exception as error:
            if name == last and call == "apply_rows" and ours:
                raise EngineError(
                    f"The rows of these inputs cannot run with different members. They cannot share a batch: "
                    f"{next(iter(refused.values()))} And a single row fails ({type(error).__name__}: {error}). Call "
                    f"delta.apply(params, ...) for each member instead."
                ) from error
            if name == last:
                for other, reason in refused.items():
                    error.add_note(f"funcdelta: {other!r} could not run it: {reason}")
                raise
            refused[name] = f"{type(error).__name__}: {error}"
        else:
            key = key_of_now() if refused else key
            for other, reason in refused.items():
                program.refusals[(other, call, key)] = reason
            _tell(program, call, name, refused)
            return result
    raise AssertionError("the last way returns or raises")


def _tell(program: Program, call: str, name: str, refused: Mapping[str, str]) -> None:
    """Warn of a slower engine, once per reason."""
    if not refused:
        return
    first, reason = next(iter(refused.items()))
    known = (call, name, reason[:80])
    if known in program.warned:
        return
    program.warned.add(known)
    warnings.warn(
        f"{call} runs by {name!r}, which is slower: {first!r} cannot run these inputs. {reason[:SHORT]}",
        EngineWarning,
        stacklevel=5,
    )


@dataclass(frozen=True)
class Explanation:
    """Which engine ``engine="auto"`` takes for a call, why not another, and how often the backbone runs.

    Attributes:
        engine: the engine that is taken.
        refused: why the engines tried before it cannot run the call, by name.
        calls: how often the backbone is called.
        rows: how many rows each of these calls has.
        once_per_member: paths of modules that run once per member within a fold, with the reason.
        shared: the fraction of the arithmetic that runs once for all members.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> print(delta.explain(delta.init(0, n=5), torch.randn(3, 4)))
    fold: 1 call of the backbone with 15 rows
    """

    engine: str
    refused: Mapping[str, str]
    calls: int
    rows: int
    once_per_member: Mapping[str, str]
    shared: float = 0.0

    def __str__(self) -> str:
        calls = f"{self.calls} call{'' if self.calls == 1 else 's'} of the backbone with {self.rows} rows"
        lines = [f"{self.engine}: {calls}"]
        if self.shared:
            lines.append(f"  {self.shared:.0%} of the arithmetic runs once for all members")
        lines += [f"  once per member: {path or 'the model'} ({why})" for path, why in self.once_per_member.items()]
        lines += [f"  not {name}: {reason[:SHORT]}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(program: Program, stack: Params, inputs: Inputs) -> Explanation:
    """Which engine ``auto`` takes for these inputs. Runs the call, which is the only way to find out."""
    # Neither under no_grad nor detached: a call that wants gradients may be refused where one without is not.
    run_any(program, stack, inputs, set())
    key = key_of(program, stack, inputs)
    refused = {
        name: program.refusals[(name, "apply_many", key)]
        for name in AUTO
        if (name, "apply_many", key) in program.refusals
    }
    engine = next(name for name in AUTO if name not in refused)
    if engine == "loop":
        return Explanation(engine, refused, inputs.n, inputs.b, {})
    if engine == "vmap":
        return Explanation(engine, refused, 1, inputs.b, {})
    if inputs.n == 1 or not inputs.b:
        return Explanation("fold", refused, 1, inputs.b, {})
    layout = layout_of(program, stack, inputs)
    trunk = program.trunks.get(key)
    shared = trunk.share if trunk is not None and not trunk.refused and not any(inputs.is_mapped) else 0.0
    runs = {path: f"{run.why}" + (" (mapped)" if run.how == "map" else "") for path, run in layout.runs.items()}
    return Explanation("trunk" if shared else "fold", refused, 1, inputs.n * inputs.b, runs, shared)
