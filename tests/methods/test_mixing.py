"""Fold checks itself: models whose rows depend on each other are refused, and run in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import assert_engines_agree, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO
from zoo_plain import TorchTransformer

import funcdelta as fd


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model.eval(), lora_r=2, modified_modules=list(names), **fields)


def test_batch_norm_in_training_runs_once_per_member() -> None:
    model = ZOO["conv2d"].build()
    before = snapshot(model)
    delta = lora(model, "conv1", "hidden").mode(train=True)
    stack, images = random_params(delta, 3), torch.randn(6, 3, 9, 9)
    assert_engines_agree(delta, stack, images, engines=("loop", "vmap", "fold", "auto"))
    assert list(delta.explain(stack, images).once_per_member) == ["norm1", "norm2"]
    assert_engines_agree(delta.mode(train=False), stack, images)
    assert_unchanged(model, before)


class Centred(nn.Module):
    """Subtracts the mean over the rows, which no shape shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0, keepdim=True)


def test_rows_that_are_mixed_without_a_trace_in_the_shapes() -> None:
    delta = lora(Centred(), "layer")
    stack, x = random_params(delta, 3), torch.randn(4, 4)
    with raises_saying(fd.errors.FoldError, "rows", "engine="):
        delta.apply_many(stack, x, engine="fold")
    # A fresh LoRA changes nothing, so only random leaves show the mistake.
    with raises_saying(fd.errors.FoldError, "rows"):
        lora(Centred(), "layer").apply_many(delta.init(0, n=3), x, engine="fold")
    assert_engines_agree(delta, stack, x, engines=("auto",))


class Sharpened(nn.Module):
    """Moves every row away from the mean of all: nothing happens where rows are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + (y - y.mean(0, keepdim=True))


@pytest.mark.parametrize("first", [torch.zeros(5, 4), torch.ones(5, 4)], ids=["zeros", "ones"])
def test_rows_that_tell_nothing_teach_nothing(first: Tensor) -> None:
    delta = lora(Sharpened(), "layer")
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    assert_engines_agree(delta, stack, first, engines=("auto",))
    assert_engines_agree(delta, stack, x, engines=("auto",))
    with raises_saying(fd.errors.FoldError, "rows"):
        delta.apply_many(stack, x, engine="fold")


class Sorts(nn.Module):
    """Calls its layer on sorted rows and puts them back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.layer(x[order])[order.argsort()]


@pytest.mark.parametrize("descending", [True, False])
def test_rows_that_change_places(descending: bool) -> None:
    delta = lora(Sorts(), "layer")
    x = torch.randn(5, 4).sort(0, descending=descending).values
    assert_engines_agree(delta, random_params(delta, 3), x, engines=("auto",))


class Splits(nn.Module):
    """Sends every row one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, y = x[:, 0] > 0, torch.zeros(len(x), 3)
        y[left] = self.left(x[left])
        y[~left] = self.right(x[~left])
        return y


def test_rows_that_go_different_ways() -> None:
    delta = lora(Splits(), "left", "right")
    x = torch.tensor([[1.0, 2, 3, 4], [2, 1, 1, 1], [-1, 2, 3, 1], [-1, 0, 0, 1]])
    assert_engines_agree(delta, random_params(delta, 3), x, engines=("loop", "auto"))


def test_what_is_known_of_numbers_and_words_is_bounded() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return self.layer(x) * by

    delta = lora(Scaled(), "layer")
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    limit = delta.program.layouts.limit = 5
    for step in range(20):
        assert_engines_agree(delta, stack, x, by=0.1 * step, engines=("fold",))
    assert len(delta.program.layouts) == limit


def test_the_probe_leaves_no_trace() -> None:
    model = ZOO["bert"].build()
    before = snapshot(model)
    delta = lora(model, "query", lora_dropout=0.5).mode(train=True)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    first = delta.apply_many(random_params(delta, 3), **ZOO["bert"].inputs(4), engine="fold").logits
    torch.manual_seed(5)
    assert torch.equal(delta.apply_many(random_params(delta, 3), **ZOO["bert"].inputs(4), engine="fold").logits, first)
    torch.set_rng_state(state)
    assert_unchanged(model, before)


def test_a_tensor_of_the_model_itself_cannot_be_folded() -> None:
    model = TorchTransformer().eval()
    delta = lora(model, "linear1", unfrozen_modules=["deltas", "position"])
    stack, inputs = random_params(delta, 3), ZOO["torch_transformer"].inputs(4)
    with raises_saying(fd.errors.FoldError, "position", "engine="):
        delta.apply_many(stack, **inputs, engine="fold")
    assert_engines_agree(delta, stack, engines=("loop", "vmap", "auto"), **inputs)
