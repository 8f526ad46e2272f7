"""Backbones whose linear layers are quantised: the module is called as it is, the delta acts on hidden values."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import assert_acts, assert_close, raises_saying
from subjects import MEMBERS, config_for
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

METHODS = ["lora", "adapter", "low_rank_adapter", "compacter", "parallel_adapter", "prefix", "soft_prompt", "bitfit"]


@pytest.fixture(scope="module")
def quantised() -> Any:
    """``quantised(name)``: an architecture of the zoo with int8 weights in all its linear layers, by torchao."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs the package torchao: pip install torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = importlib.import_module("torchao.quantization")

    @functools.cache
    def build(name: str) -> nn.Module:
        model = ZOO[name].build()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    return build


def subject(model: nn.Module, method: str, name: str) -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    config = config_for(method, ZOO[name]).replace(unfrozen_modules=("deltas",))
    delta = fd.DeltaModel(model, config, example=ZOO[name].inputs(2))
    return delta, delta.random_members(MEMBERS, delta.plan.present(dict.fromkeys(delta.names)))


@pytest.mark.parametrize(("method", "name"), [(m, n) for m in METHODS for n in ("llama", "bert")])
def test_every_method_acts_on_int8_weights(quantised: Any, method: str, name: str) -> None:
    architecture, model = ZOO[name], quantised(name)
    delta, stack = subject(model, method, name)
    inputs, before = architecture.inputs(2), snapshot(model)
    assert all(leaf.dtype == torch.float32 for leaf in stack.values())

    def many(stack: dict[str, Tensor], engine: str) -> Tensor:
        return architecture.call(functools.partial(delta.apply_many, stack, engine=engine), inputs)

    with torch.no_grad():
        bare = architecture.call(model, inputs)
        assert torch.equal(architecture.call(functools.partial(delta.apply, {}), inputs), bare)
        loop = many(stack, "loop")
        assert_acts(loop[0], bare)
        assert_close(many(stack, "fold"), loop)
        view = delta.bind(fd.take(stack, 1))
        assert_close(architecture.call(view, inputs), loop[1])
    losses = {e: fd.value_and_grad(lambda s, e=e: many(s, e).flatten(1).cos().sum(1))(stack) for e in ("fold", "loop")}
    for leaf, gradient in losses["fold"][1].items():
        assert gradient.any() or not delta.trainable(leaf)
        assert_close(gradient, losses["loop"][1][leaf], 1e-4)
    assert_unchanged(model, before)


def test_saved_and_loaded_with_the_fingerprint_of_the_int8_weights(quantised: Any, tmp_path: Path) -> None:
    model = quantised("llama")
    delta, stack = subject(model, "lora", "llama")
    delta.save_finetuned(stack, tmp_path / "delta")
    _, again = fd.AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=model)
    assert all(torch.equal(again[name], leaf) for name, leaf in stack.items())
    with raises_saying(fd.errors.CheckpointError, "check_hash=False"):
        fd.AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=ZOO["llama"].build())


def test_what_would_write_into_int8_weights_is_refused(quantised: Any) -> None:
    model = quantised("llama")
    delta, stack = subject(model, "lora", "llama")
    for merge in (delta.merge, delta.merged):
        with raises_saying(fd.errors.MergeError, "q_proj", "Int8Tensor", "delta.apply"):
            merge(fd.take(stack, 0))
    with raises_saying(fd.errors.MatchError, "q_proj.weight", "Int8Tensor", "unfrozen_modules"):
        fd.LoraModel(model, modified_modules=["v_proj"], unfrozen_modules=["deltas", "q_proj"])
