"""axis_order: methods on models with other layouts, against explicit permutes around the plain method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, raises_saying, random_params
from torch import Tensor, nn

import funcdelta as fd


class FeaturesFirst(nn.Module):
    """Two blocks on (b, features, tokens), and a pooled head: (b, 6, t) to (b, 3)."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return torch.tanh(self.inner(x.mT)).mT.contiguous(), None

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = self.Head()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
            x = x.view(x.shape[0], 6, -1)  # a view, which needs the layout that the model itself made
        return self.head(x.mean(-1))


class SequenceFirst(nn.Module):
    """A layer on (tokens, b, features): (t, b, 4) to (t, b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


@fd.register_module("test_axis_running", insert="sequential")
def Running(site: fd.Site) -> nn.Module:  # noqa: N802
    """y + w · (mean of the tokens so far), for (batch, tokens, features)."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(site.width))

        def forward(self, y: Tensor) -> Tensor:
            count = torch.arange(1, y.shape[1] + 1, dtype=y.dtype).view(1, -1, 1)
            return y + self.w * y.cumsum(1) / count

    return Mean()


def adapted(params: dict[str, Tensor], path: str, h: Tensor) -> Tensor:
    """The adapter at ``path`` on (…, features)."""
    p = {name.removeprefix(f"{path}.adapter."): leaf for name, leaf in params.items()}
    down = F.gelu(F.linear(h, p["down_proj.weight"], p["down_proj.bias"]), approximate="tanh")
    return h + F.linear(down, p["up_proj.weight"], p["up_proj.bias"])


def test_features_before_tokens() -> None:
    model, x = FeaturesFirst().eval(), torch.randn(4, 6, 5)
    config = fd.AdapterConfig(bottleneck_dim=2, modified_modules=["[r]blocks\\.\\d", "head"], axis_order=(0, 2, 1))
    delta = fd.DeltaModel(model, config, example=(x,))
    assert delta.shapes["blocks.0.adapter.down_proj.weight"] == (2, 6)
    assert delta.shapes["head.adapter.down_proj.weight"] == (2, 3)
    stack = random_params(delta, 3)

    def by_hand(params: dict[str, Tensor]) -> Tensor:
        h = x
        for i in range(2):
            h = adapted(params, f"blocks.{i}", model.blocks[i](h)[0].permute(0, 2, 1)).permute(0, 2, 1)
        # The head's output has two axes and stays as it is.
        return adapted(params, "head", model.head(h.mean(-1)))

    found = assert_engines_agree(delta, stack, x)
    for i in range(3):
        assert_close(found[i], by_hand(fd.take(stack, i)))
    compiled = torch.compile(lambda p: delta.apply(p, x), fullgraph=True, backend="eager")
    assert_close(compiled(fd.take(stack, 1)), found[1])
    assert_close(delta.bind(fd.take(stack, 2))(x), found[2])
    # Without it the tokens are taken for features.
    plain = fd.DeltaModel(model, config.replace(axis_order=None), example=(x,))
    assert plain.shapes["blocks.0.adapter.down_proj.weight"] == (2, 5)
    model.double()
    assert delta.refresh().shapes["blocks.1.adapter.up_proj.weight"] == (6, 2)


def test_tokens_before_batch() -> None:
    model, x = SequenceFirst().eval(), torch.randn(5, 3, 4)
    config = Running(modified_modules=["layer"], axis_order=[1, 0, 2], batch_dim=1)
    delta = fd.DeltaModel(model, config)
    stack = random_params(delta, 3)
    found = torch.stack([delta.apply(fd.take(stack, i), x) for i in range(3)])
    for i in range(3):
        hidden = model.layer(x).permute(1, 0, 2)
        hidden = hidden + stack["layer.test_axis_running.w"][i] * hidden.cumsum(1) / torch.arange(1.0, 6).view(1, -1, 1)
        assert_close(found[i], torch.tanh(hidden.permute(1, 0, 2)))
    for engine in ("loop", "vmap", "fold"):
        assert_close(delta.apply_many(stack, x, engine=engine), found)
    without = fd.DeltaModel(model, config.replace(axis_order=None))
    assert_acts(without.apply(fd.take(stack, 0), x), found[0])


def test_one_config_with_an_order_beside_one_without() -> None:
    model, x = FeaturesFirst().eval(), torch.randn(4, 6, 5)
    delta = fd.DeltaModel(
        model,
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["blocks.0"], axis_order=(0, 2, 1)),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["blocks.0"], name="tokens"),
        example=(x,),
    )
    assert delta.shapes["blocks.0.adapter.down_proj.weight"] == (2, 6)
    assert delta.shapes["blocks.0.tokens.down_proj.weight"] == (2, 5)
    params = random_params(delta)
    h = adapted(params, "blocks.0", model.blocks[0](x)[0].mT).mT
    h = adapted(
        {name.replace("tokens", "adapter"): leaf for name, leaf in params.items() if "tokens" in name}, "blocks.0", h
    )
    assert_close(delta.apply(params, x), model.head(model.blocks[1](h)[0].mean(-1)))


def test_refusals(tmp_path) -> None:
    conv = nn.Sequential(nn.Conv1d(4, 4, 1))
    with raises_saying(fd.errors.MatchError, "axis_order=(0, 2, 1)", "0 (Conv1d)", "axis 1", "without axis_order"):
        fd.LoraModel(conv, modified_modules=["0"], axis_order=(0, 2, 1))
    with raises_saying(fd.errors.MatchError, "axis_order=(0, 2, 1)", "b (Linear)", "axis -1"):
        fd.AdapterModel(MLP(), modified_modules=["b"], axis_order=(0, 2, 1))
    fd.AdapterModel(MLP(), modified_modules=["b"], axis_order=(1, 0, 2))
    with raises_saying(fd.errors.ConfigError, "axis_order=(1, 2)", "from 0"):
        fd.AdapterConfig(axis_order=(1, 2))
    with pytest.raises(AttributeError, match="axis_order="):
        fd.set_axis_order([0, 2, 1])  # pyright: ignore[reportAttributeAccessIssue]
    config = fd.AdapterConfig(axis_order=(1, 0, 2))
    assert fd.AutoDeltaConfig.from_finetuned(config.save_finetuned(tmp_path)) == config
