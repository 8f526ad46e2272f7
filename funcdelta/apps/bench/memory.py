"""What training n members holds and peaks at, against PEFT with n adapters loaded.

What is held: the backbone, the members' leaves, their gradients and two moments each, counted in tensors. The peak of a
step is what Linux reports for the process above that: activations and other temporary tensors.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import Notify, Row, Table, silent
from funcdelta.apps.bench.rivals import Peft
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Ratio

Leaves = dict[str, Tensor]

MIB = 2**20
CHUNK = 8
HELD, PEAK = "held", "peak of a step"
PEFT_HELD, PEFT_PEAK = "PEFT in turn, held", "PEFT in turn, peak of a step"


def memory_table(subject: Subject, shape: Shape, notify: Notify = silent) -> Table:
    """MiB held while training n members, and the peak of a step above that: folded, in chunks, and by PEFT."""
    title = f"{subject.name} {shape} memory of AdamW"
    notify(f"{title}: measuring")
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    backbone = bytes_of([*subject.backbone.parameters(), *subject.backbone.buffers()])
    figures = {**by_peft(subject, stack, tokens, goals), **by_fold(delta, stack, tokens, goals, backbone)}
    note = f"backbone {backbone / MIB:.0f} MiB; {shape.members} members with gradients and two moments"
    rows = []
    for label, figure in figures.items():
        held = label.endswith(HELD)
        base = figures[PEFT_HELD if held else PEFT_PEAK]
        once = Ratio(figure / base, figure / base, figure / base) if base else None
        rows.append(Row(label, figure / MIB, once, once, note=note if held else ""))
    return Table(title, subject.name, "PEFT", tuple(rows), what="memory", unit="MiB", compared="")


def by_peft(subject: Subject, stack: Leaves, tokens: Tensor, goals: Tensor) -> dict[str, int]:
    """`{label: bytes}` of PEFT with an adapter for every member, trained one after another."""
    rival = Peft(subject, fd.unstack(stack))
    parameters = [parameter for own in rival.adapters for parameter in own.parameters.values()]
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        for gradients, own in zip(rival.in_turn(tokens, goals), rival.adapters, strict=True):
            for name, parameter in own.parameters.items():
                parameter.grad = gradients[name]
        optimizer.step()

    peak = peak_of(step)
    held = [*rival.model.parameters(), *rival.model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {PEFT_HELD: bytes_of(held)} | ({} if peak is None else {PEFT_PEAK: peak})


def by_fold(delta: fd.DeltaModel, stack: Leaves, tokens: Tensor, goals: Tensor, backbone: int) -> dict[str, int]:
    """`{label: bytes}` of a fold over all members, and over a few at a time; `backbone` bytes are held, too."""
    optimizer = fd.optim.adamw(lr=1e-3)
    state = optimizer.init(stack)
    kept: list[Leaves] = []

    losses = c.losses_by(delta, "fold")

    def step_of(chunk_size: int | None) -> Callable[[], None]:
        def step() -> None:
            kept[:] = [fd.value_and_grad(losses, in_dims=0, chunk_size=chunk_size)(stack, tokens, goals)[1]]
            optimizer.update(kept[0], state, stack)

        return step

    sizes = {f"fold, {PEAK}": None, f"fold in chunks of {CHUNK}, {PEAK}": CHUNK}
    peaks = {label: peak_of(step_of(size)) for label, size in sizes.items()}
    held = [*stack.values(), *(leaf for name, leaf in kept[0].items() if delta.trainable(name))]
    held += [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    found = {f"fold, {HELD}": backbone + bytes_of(held)}
    return found | {label: peak for label, peak in peaks.items() if peak is not None}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages behind `tensors`, each counted once.

    >>> x = torch.zeros(4)
    >>> bytes_of([x, x.view(2, 2), torch.zeros(1)])
    20
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_of(step: Callable[[], object]) -> int | None:
    """The most bytes that the process held during a second `step` above what it held before; `None` off Linux.

    >>> peak = peak_of(lambda: torch.ones(2**22))
    >>> peak is None or 2**23 < peak < 2**26
    True
    """
    if sys.platform != "linux":
        return None
    step()  # what the first call builds is not part of a step
    gc.collect()
    trim()
    try:
        # 5 sets the process's high-water mark back to what it holds now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    step()
    return max(_resident("VmHWM") - before, 0)


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _resident(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0
