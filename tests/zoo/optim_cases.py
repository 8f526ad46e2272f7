"""Params, gradients and training loops that the tests of the optimisers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from funcdelta import optim, tree

STEPS = 25
SHAPES = {"layer.0.q.lora_A": (3, 4), "layer.0.q.lora_B": (4, 3), "head.bias": (5,), "temperature": ()}
# Relative to the distance moved: 25 steps of rounding.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}
EXACT = CLOSE[torch.float64]
Tensors = dict[str, torch.Tensor]
OURS: dict[str, Callable[..., optim.Optimizer]] = {"sgd": optim.sgd, "adam": optim.adam, "adamw": optim.adamw}
THEIRS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def start(seed: int, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def gradient(p: Tensors) -> Tensors:
    """Of a curved function, with another scale in every leaf, gentle enough not to be chaotic."""
    return {name: torch.sin(2 * x) * 10.0 ** (i - 3) + 0.1 * x for i, (name, x) in enumerate(p.items())}


def by_torch(kind: str, hypers: dict[str, Any], p: Tensors, steps: int = STEPS) -> Tensors:
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in p.items()}
    optimiser = THEIRS[kind](leaves.values(), **hypers)
    for _ in range(steps):
        for name, g in gradient({name: x.detach() for name, x in leaves.items()}).items():
            leaves[name].grad = g
        optimiser.step()
    return {name: x.detach() for name, x in leaves.items()}


def by_us(opt: optim.Optimizer, p: Tensors, steps: int = STEPS, n: int | None = None) -> tuple[Tensors, Any]:
    state = opt.init(p, n)
    for _ in range(steps):
        updates, state = opt.update(gradient(p), state, p)
        p = tree.add(p, updates)
    return p, state
