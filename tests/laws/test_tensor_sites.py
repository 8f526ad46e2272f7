"""Bare parameters as sites: experts' tables, a fused input projection, a parameter of the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_methods import HadamardConfig
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd


class Experts(nn.Module):
    """A mixture of three experts, each a matrix of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.router = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bsd,edh->bseh", x, self.up).relu()
        return torch.einsum("bseh,ehd,bse->bsd", hidden, self.down, self.router(x).softmax(-1))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = Experts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.experts(x))


class Rooted(nn.Module):
    """A model whose own parameter is the site."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.table)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "experts": (Mixing, ["experts.up", "experts.down", "out"]),
    "root": (Rooted, ["table"]),
    "multi-head attention": (Attending, ["in_proj_weight"]),
    "encoder": (encoder, ["self_attn.in_proj_weight", "linear1"]),
}
METHODS: dict[str, Callable[..., fd.BaseDeltaConfig]] = {
    "lora": lambda **given: fd.LoraConfig(lora_r=2, **given),
    "hadamard": HadamardConfig,
    "parallel": lambda **given: fd.parallel(fd.LoraConfig(lora_r=1), fd.LoraConfig(lora_r=2), **given),
}


def subject(model: str, method: str) -> tuple[fd.DeltaModel, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    make, names = MODELS[model]
    delta = fd.DeltaModel(make().eval(), METHODS[method](modified_modules=names))
    params = delta.init(0, n=3)
    moved = {
        name: leaf if name in delta.constants else leaf + 0.2 * torch.randn(leaf.shape) for name, leaf in params.items()
    }
    return delta, moved, torch.randn(2, 5, 8)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", ["lora", "parallel"])
@pytest.mark.parametrize("model", MODELS)
def test_every_way_gives_what_merged_weights_give(model: str, method: str) -> None:
    delta, stack, x = subject(model, method)
    merged = torch.stack([delta.merged(fd.take(stack, i))(x) for i in range(3)])
    assert (merged[0] - merged[1]).abs().max() > 1e-3
    assert (merged[0] - delta.apply({}, x)).abs().max() > 1e-3
    for i in range(3):
        close(delta.apply(fd.take(stack, i), x), merged[i])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fd.errors.EngineWarning)
        for engine in ("loop", "vmap", "auto"):
            close(delta.apply_many(stack, x, engine=engine), merged)
        close(delta.apply_rows(stack, [2, 1], x), torch.stack([merged[2][0], merged[1][1]]))
    if model in ("experts", "encoder"):
        close(delta.apply_many(stack, x, engine="fold"), merged)
    close(delta.bind(fd.take(stack, 1))(x), merged[1])


def test_experts_have_factors_of_their_own() -> None:
    delta, stack, _ = subject("experts", "lora")
    assert delta.sites == ("out", "experts.up", "experts.down")
    assert delta.shapes["experts.lora.up.lora_A"] == (3, 2, 6)
    assert delta.shapes["experts.lora.up.lora_B"] == (3, 8, 2)
    params = fd.take(stack, 0)
    change = fd.algebra.materialise(delta, params)["experts.up"]
    a, b = params["experts.lora.up.lora_A"], params["experts.lora.up.lora_B"]
    close(change, torch.stack([8.0 * b[e] @ a[e] for e in range(3)]))


def test_any_change_of_two_matrices() -> None:
    torch.manual_seed(0)
    delta = fd.DeltaModel(Rooted().eval(), HadamardConfig(modified_modules=["table"]))
    params, x = fd.tree.map(torch.rand_like, delta.init(0)), torch.randn(2, 5, 8)
    close(delta.apply(params, x), delta.merged(params)(x))


def test_packing_and_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixing().eval(), torch.randn(2, 5, 8)
    configs = [(2, ["experts.up", "out"]), (3, ["experts.down", "experts.up"])]
    deltas = [fd.LoraModel(model, lora_r=r, modified_modules=names) for r, names in configs]
    pairs = [(delta, fd.tree.map(torch.rand_like, delta.init(0))) for delta in deltas]
    packed, stack = fd.pack(pairs)
    assert len(packed.configs) == 1
    for out, (delta, params) in zip(packed.apply_many(stack, x), pairs, strict=True):
        close(out, delta.apply(params, x))
    for (_, back), (_, params) in zip(fd.unpack(packed, stack), pairs, strict=True):
        assert all(torch.equal(back[key], leaf) for key, leaf in params.items())
    folder = deltas[1].save_finetuned(pairs[1][1], tmp_path / "run")
    loaded, again = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    assert torch.equal(loaded.apply(again, x), deltas[1].apply(pairs[1][1], x))


def test_what_is_refused() -> None:
    model = Mixing()
    with raises_saying(fd.MatchError, "lora", "experts.up", "dropout"):
        fd.LoraModel(model, lora_dropout=0.1, modified_modules=["experts.up"])
    with raises_saying(fd.MatchError, "out.bias", "one axis"):
        fd.LoraModel(model, modified_modules=["out.bias"])
    with raises_saying(fd.MatchError, "experts.up", "no module"):
        fd.AdapterModel(model, modified_modules=["experts.up"])
    with raises_saying(fd.MatchError, "nothing", "no module"):
        fd.LoraModel(model, modified_modules=["nothing"])
    found: Any = fd.LoraModel(model, modified_modules=["experts.up", "out"], exclude_modules=["experts"])
    assert found.sites == ("out",)
