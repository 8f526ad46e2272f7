"""What the laws are tested on: every registered method on every architecture of the zoo, built once."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import custom_methods  # noqa: F401  (registers methods from outside the package)
import torch
from torch import Tensor, nn
from zoo import ZOO, Architecture, cast

import funcdelta as fd
from funcdelta.methods.config import METHODS

ROWS = 3
MEMBERS = 3
# Not what another test file registers for itself: the pairs must not depend on who was imported first.
UNDER_LAW = [
    method
    for method, config in METHODS.items()
    if config.__module__.partition(".")[0] in ("funcdelta", "custom_methods")
]
# Which of an architecture's modules a method acts on, where they are not its linears; none: it cannot act there.
TARGETS = {"adapter": "blocks", "prefix": "attention", "test_llama_adapter": "attention", "test_loreft": "blocks"}
# Fields that make a method as small as the zoo, and outputs as long as the backbone's.
SMALL: dict[str, dict[str, Any]] = {
    "prefix": {"prefix_token_num": 2, "embed_dim": 3, "mid_dim": 4},
    "low_rank_adapter": {"reduction_factor": 4, "low_rank_rank": 2},
    "compacter": {"reduction_factor": 2, "hypercomplex_division": 2, "shared_phm_rule": True, "learn_phm": False},
    "soft_prompt": {"soft_token_num": 2, "strip": True},
}
# Where the pairs of a feed-forward layer begin and end; elsewhere a span is one module.
FEED_FORWARD: dict[str, tuple[str, str]] = {
    "bert": ("intermediate.dense", r"[r]layer\.\d+\.output\.dense"),
    "roberta": ("intermediate.dense", r"[r]layer\.\d+\.output\.dense"),
    "deberta_v2": ("intermediate.dense", r"[r]layer\.\d+\.output\.dense"),
    "distilbert": ("lin1", "lin2"),
    "albert": ("ffn", "ffn_output"),
    "gpt2": ("c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
    "bart": ("fc1", "fc2"),
    "vit": ("fc1", "fc2"),
    "bloom": ("dense_h_to_4h", "dense_4h_to_h"),
    "llama": ("up_proj", "down_proj"),
    "qwen3": (r"[r]mlp\.(gate|up)_proj", "down_proj"),
    "t5": ("wi", "wo"),
    "mlp": ("up", "down"),
    "torch_transformer": ("linear1", "linear2"),
}
# What one module of an architecture a parallel adapter may stand beside, if not its first block.
BESIDE = {"embedding": "project", "conv1d": "conv1", "conv2d": "depthwise"}
# Where a method has nothing to act on, and what its refusal says; test_soft_prompt.py holds it to that.
CANNOT_ACT = {
    **{("soft_prompt", name): "no module has get_input_embeddings" for name in ("mlp", "conv1d", "conv2d")},
    **{("soft_prompt", name): "no module has get_input_embeddings" for name in ("torch_transformer", "embedding")},
    ("soft_prompt", "vit"): "does not embed its input by a table of tokens",
}
# Where an architecture has (rows, tokens, features), if not at all of its blocks: OPT's layers see tokens in one axis.
BY_TOKEN = {"embedding": ("tokens",), "opt": ("self_attn",)}
# Where a method is refused in the call, because there is no text of whose tokens it could know; test_conditions.py.
WITHOUT_TEXT = {("test_loreft", name): "no module around" for name in ("mlp", "conv1d", "conv2d", "vit")}


def targets(method: str, architecture: Architecture) -> tuple[str, ...] | None:
    """The modules of ``architecture`` that ``method`` is tested on; ``None``: it finds its own."""
    if METHODS[method]().gives("own_sites"):
        return None
    if method == "test_loreft" and architecture.name in BY_TOKEN:
        return BY_TOKEN[architecture.name]
    if method == "test_rows" and "batch_free_target" in architecture.flags:
        return (architecture.default_target,)
    if METHODS[method]().gives("spans"):
        beside = BESIDE.get(architecture.name, architecture.blocks[0])
        return (*FEED_FORWARD.get(architecture.name, ()), beside, beside)
    return getattr(architecture, TARGETS.get(method, "linears"))


EVERY_PAIR = [
    (method, name)
    for method in UNDER_LAW
    for name in ZOO
    if targets(method, ZOO[name]) != () and (method, name) not in CANNOT_ACT | WITHOUT_TEXT
]


def thinned(each_method: int = 4) -> list[tuple[str, str]]:
    """Pairs for the slow laws: every architecture with one method, every method with several architectures."""
    methods, names = UNDER_LAW, list(ZOO)
    pairs = {
        next(p for k in range(len(methods)) if (p := (methods[(i + k) % len(methods)], name)) in EVERY_PAIR)
        for i, name in enumerate(names)
    }
    for i, method in enumerate(methods):
        own = [name for name in names if (method, name) in EVERY_PAIR]
        step = max(1, len(own) // each_method)
        pairs |= {(method, own[(i + k * step) % len(own)]) for k in range(each_method)}
    return sorted(pairs)


PAIRS = EVERY_PAIR if os.environ.get("FUNCDELTA_PAIRS") == "all" else thinned(5)
"""What most laws run on. ``FUNCDELTA_PAIRS=all`` takes every method on every architecture."""


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
    given = SMALL.get(method, {}) | fields
    modules = targets(method, architecture)
    return METHODS[method](modified_modules=modules, unfrozen_modules=("deltas", architecture.head), **given)


def with_fewer_sites(config: fd.BaseDeltaConfig) -> fd.BaseDeltaConfig:
    """The same config at what its first name means, or its first pair of names."""
    assert config.modified_modules is not None
    return config.replace(modified_modules=config.modified_modules[: 2 if config.gives("spans") else 1])


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
