"""Schedules: hyper-parameters as functions of the step tensor, whose peak and length may be one value per member."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, StackError, shown
from .hyper import checked

__all__ = ["Schedule", "cosine", "linear"]

Schedule = Callable[[Tensor], Tensor]


def cosine(
    peak: float | Tensor, steps: int | Tensor, warmup: int | Tensor = 0, floor: float | Tensor = 0.0
) -> Schedule:
    """floor + (peak - floor)·(1 + cos πt)/2, t = (k - warmup)/(steps - warmup); during warm-up, peak·(k + 1)/warmup.

    k is the step, 0 at the first update, whose value is already positive. ``steps`` includes the warm-up; from step
    ``steps`` on, the value is ``floor``. Each argument is a number, a tensor () or a tensor (n,), one value per member.
    The result is float64, shaped like the step and the arguments, and differentiable in ``peak`` and ``floor``.
    Source: Loshchilov and Hutter 2017 (SGDR), one cycle.

    >>> rate = cosine(peak=torch.tensor([1.0, 2.0]), steps=torch.tensor([4, 8]))
    >>> rate(torch.tensor(4)).tolist()
    [0.0, 1.0]
    >>> opt = fd.optim.adamw(lr=cosine(1e-3, steps=100, warmup=10))
    """
    return _schedule(lambda t: (1 + torch.cos(math.pi * t)) / 2, peak, steps, warmup, floor)


def linear(
    peak: float | Tensor, steps: int | Tensor, warmup: int | Tensor = 0, floor: float | Tensor = 0.0
) -> Schedule:
    """floor + (peak - floor)·(1 - t), t = (k - warmup)/(steps - warmup); during warm-up, peak·(k + 1)/warmup.

    The arguments are those of :func:`cosine`; ``floor=peak`` means warm-up only.

    >>> rate = linear(peak=1.0, steps=6, warmup=2)
    >>> [round(rate(torch.tensor(k)).item(), 2) for k in range(8)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _schedule(lambda t: 1 - t, peak, steps, warmup, floor)


def _schedule(
    shape: Callable[[Tensor], Tensor],
    peak: float | Tensor,
    steps: int | Tensor,
    warmup: int | Tensor,
    floor: float | Tensor,
) -> Schedule:
    """The schedule that falls as ``shape`` does, from 1 at t = 0 to 0 at t = 1."""
    given = {"peak": peak, "steps": steps, "warmup": warmup, "floor": floor}
    for name, value in given.items():
        if callable(value) and not isinstance(value, Tensor):
            raise ConfigError(f"{name} of a schedule must be a number or a tensor, () or (n,); found {value!r}.")
    checked(**given)
    for name, value in (("steps", steps), ("warmup", warmup)):
        whole = not value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, int)
        if not whole:
            raise ConfigError(f"{name} counts updates, as an int or a tensor of ints; found {value!r}.")
        if not isinstance(value, Tensor) and abs(value) > sys.maxsize:
            raise ConfigError(f"{name} counts updates, at most {sys.maxsize}; found {shown(value)}.")
    if not isinstance(steps, Tensor) and (steps < 1 or (not isinstance(warmup, Tensor) and warmup >= steps)):
        raise ConfigError(
            f"steps counts all updates, warm-up included, so warmup < steps; found steps={steps}, warmup={warmup}."
        )

    def at(step: Tensor) -> Tensor:
        # Apple's GPUs have no float64.
        dtype = torch.float32 if step.device.type == "mps" else torch.float64
        k = step.to(dtype)
        top, end, begin, bottom = (_fitted(name, value, k) for name, value in given.items())
        t = ((k - begin) / (end - begin).clamp_min(1)).clamp(0, 1)
        fall = bottom + (top - bottom) * shape(t)
        return torch.where(k < begin, top * (k + 1) / begin.clamp_min(1), fall)

    return at


def _fitted(name: str, value: float | Tensor, step: Tensor) -> Tensor:
    """An argument with the dtype and device of the step."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=step.dtype, device=step.device)
    if value.ndim and step.ndim and value.shape != step.shape:
        raise StackError(
            f"{name} of the schedule has {value.shape[0]} values, one per member, but the state has {step.shape[0]} "
            f"members. Make a new schedule for the remaining members: {name}={name}[index]."
        )
    return value.to(dtype=step.dtype, device=step.device)
