"""The members of a sweep: every combination of hyper-parameters with every seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...match import near
from ...trees.seeding import derive
from .errors import JobError

DEFAULTS = {"lr": (3e-3, 5e-3, 7e-3), "weight_decay": (0.01,)}
"""The hyper-parameters that can differ between members, and their values without ``--sweep``."""


@dataclass(frozen=True)
class Member:
    """One member: its place in the stack, its hyper-parameters and its seed.

    >>> Member(0, lr=1e-3, weight_decay=0.01, seed=2).seed
    2
    """

    index: int
    lr: float
    weight_decay: float
    seed: int


def grid(sweep: Iterable[str] = (), seeds: int = 4) -> list[Member]:
    """The members of ``("name=value,value", ...)`` times ``seeds``, learning rate first and seed last.

    >>> [(member.lr, member.seed) for member in grid(["lr=1e-3,1e-2"], seeds=2)]
    [(0.001, 0), (0.001, 1), (0.01, 0), (0.01, 1)]
    >>> grid(["rl=1e-3"])
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: --sweep rl: no hyper-parameter 'rl'. There are: lr, weight_decay.
    """
    values = dict(DEFAULTS)
    swept: set[str] = set()
    for entry in sweep:
        name, equals, text = entry.partition("=")
        name = name.strip()
        if not equals:
            raise JobError(f"--sweep {entry}: write --sweep name=value,value.")
        if name not in DEFAULTS:
            raise JobError(f"--sweep {name}: no hyper-parameter {name!r}.{near(name, list(DEFAULTS))}")
        if name in swept:
            raise JobError(f"--sweep {name}: given twice; write all its values in one, with commas.")
        swept.add(name)
        values[name] = _numbers(text, entry, positive=name == "lr")
    combinations = itertools.product(values["lr"], values["weight_decay"], range(seeds))
    return [Member(index, *combination) for index, combination in enumerate(combinations)]


def hyper(members: Sequence[Member], name: str) -> Tensor:
    """The members' values of the hyper-parameter ``name``, (n,) float32.

    >>> hyper(grid(["lr=0.5,0.25"], seeds=1), "lr")
    tensor([0.5000, 0.2500])
    """
    return torch.tensor([getattr(member, name) for member in members], dtype=torch.float32)


def batches(rows: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """Which rows a member with ``seed`` sees at each step, (steps, batch_size): epoch after epoch, each reshuffled.

    The order depends on the seed alone, so members that differ in learning rate only see the same batches.

    >>> batches(rows=4, steps=2, batch_size=2, seed=0).sort().values.flatten().unique()
    tensor([0, 1, 2, 3])
    """
    epochs = math.ceil(steps * batch_size / rows)
    orders = []
    for epoch in range(epochs):
        rng = torch.Generator().manual_seed(derive(seed, "order", epoch))
        orders.append(torch.randperm(rows, generator=rng))
    return torch.cat(orders)[: steps * batch_size].view(steps, batch_size)


def _numbers(text: str, entry: str, positive: bool) -> tuple[float, ...]:
    wanted = "positive numbers" if positive else "numbers of at least 0"
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise JobError(f"--sweep {entry}: expected {wanted} separated by commas, found {text!r}.") from error
    for number in numbers:
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            raise JobError(f"--sweep {entry}: expected {wanted}, found {number:g}.")
        if numbers.count(number) > 1:
            raise JobError(f"--sweep {entry}: {number:g} is given twice; more seeds give more members (--seeds).")
    return numbers
