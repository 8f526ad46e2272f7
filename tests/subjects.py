"""What the laws are tested on: every registered method on every architecture of the zoo, built once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import custom_methods  # noqa: F401  (registers methods from outside the package)
import torch
from torch import Tensor, nn
from zoo import ZOO, Architecture, cast

import funcdelta as fd
from funcdelta.config import METHODS

ROWS = 3
MEMBERS = 3
# Not what another test file registers for itself: the pairs must not depend on who was imported first.
UNDER_LAW = [
    method
    for method, config in METHODS.items()
    if config.__module__.partition(".")[0] in ("funcdelta", "custom_methods")
]
# Where a method has nothing to act on, and what its refusal says; test_soft_prompt.py holds it to that.
CANNOT_ACT = {
    **{("soft_prompt", name): "no module has get_input_embeddings" for name in ("mlp", "conv1d", "conv2d")},
    **{("soft_prompt", name): "no module has get_input_embeddings" for name in ("torch_transformer", "embedding")},
    ("soft_prompt", "vit"): "not embedded by a table of tokens",
}
PAIRS = [(method, name) for method in UNDER_LAW for name in ZOO if (method, name) not in CANNOT_ACT]


def thinned(each_method: int = 4) -> list[tuple[str, str]]:
    """Pairs for the slow laws: every architecture with one method, every method with several architectures."""
    methods, names = UNDER_LAW, list(ZOO)
    pairs = set()
    for i, name in enumerate(names):
        able = [method for method in methods if (method, name) not in CANNOT_ACT]
        pairs.add((able[i % len(able)], name))
    for i, method in enumerate(methods):
        names = [name for name in ZOO if (method, name) not in CANNOT_ACT]
        step = max(1, len(names) // each_method)
        pairs |= {(method, names[(i + k * step) % len(names)]) for k in range(each_method)}
    return sorted(pairs)


@dataclass(frozen=True)
class Subject:
    """One delta on one backbone, with members that are away from their start."""

    method: str
    architecture: Architecture
    model: nn.Module
    delta: fd.DeltaModel
    stack: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def flags(self) -> frozenset[str]:
        return self.architecture.flags

    def inputs(self, rows: int = ROWS, seed: int = 0, mask: bool = True) -> dict[str, Any]:
        return cast(self.architecture.inputs(rows, seed, mask), self.dtype)

    def apply(self, params: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        return self.architecture.call(functools.partial(self.delta.apply, params), inputs)

    def many(self, inputs: dict[str, Any], engine: str, **options: Any) -> Tensor:
        call = functools.partial(self.delta.apply_many, self.stack, engine=engine, **options)
        return self.architecture.call(call, inputs)

    def member(self, i: int) -> dict[str, Tensor]:
        return fd.take(self.stack, i)


def config_for(method: str, architecture: Architecture, **fields: Any) -> fd.BaseDeltaConfig:
    """The method's defaults at the architecture's sites: linears where it can act there, with the head trained too."""
    targets = architecture.blocks if method == "adapter" else architecture.linears
    if METHODS[method].gives("own_sites"):
        targets = None
    if METHODS[method].gives("prompt"):
        # Outputs are compared with the backbone's, so they have to be as long.
        fields = {"soft_token_num": 2, "strip": True} | fields
    if method == "test_rows" and "batch_free_target" in architecture.flags:
        targets = (architecture.default_target,)
    return METHODS[method](modified_modules=targets, unfrozen_modules=("deltas", architecture.head), **fields)


@functools.lru_cache(maxsize=256)
def subject(method: str, name: str, dtype: torch.dtype = torch.float32) -> Subject:
    """The subject for one pair, shared by the laws: nothing that they do may change it."""
    architecture = ZOO[name]
    model = architecture.double() if dtype == torch.float64 else architecture.build()
    example = cast(architecture.inputs(2), dtype)
    given = example.get("args", example)
    delta = fd.DeltaModel(model, config_for(method, architecture), example=given)
    present = delta.plan.present(dict.fromkeys(delta.names))
    return Subject(method, architecture, model, delta, delta.random_members(MEMBERS, present), dtype)
