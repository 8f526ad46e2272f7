"""Adapter and BitFit against modules written by hand, and methods of one's own that are wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import (
    MLP,
    assert_acts,
    assert_close,
    assert_engines_agree,
    logits,
    raises_saying,
    random_params,
    transposed,
)
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd

# -- adapter -------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "swish": F.silu,
    "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
    "gelu_orig": F.gelu,
    "leakyrelu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}


class HandAdapter(nn.Module):
    """A bottleneck written as a module: h + up(act(down(h)))."""

    def __init__(self, params: dict[str, Tensor], path: str, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width = params[f"{path}.adapter.up_proj.weight"].shape[0]
        size = params[f"{path}.adapter.down_proj.weight"].shape[0]
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation = activation
        with torch.no_grad():
            self.down.weight.copy_(params[f"{path}.adapter.down_proj.weight"])
            self.down.bias.copy_(params[f"{path}.adapter.down_proj.bias"])
            self.up.weight.copy_(params[f"{path}.adapter.up_proj.weight"])
            self.up.bias.copy_(params[f"{path}.adapter.up_proj.bias"])

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(self.activation(self.down(hidden)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_adapter_is_the_hand_written_module(name: str) -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    delta = fd.AdapterModel(model, bottleneck_dim=3, non_linearity=name, modified_modules=["b"])
    params = random_params(delta)
    by_hand = copy.deepcopy(model)
    by_hand.b = nn.Sequential(model.b, HandAdapter(params, "b", ACTIVATIONS[name]))
    assert_close(delta.apply(params, x), by_hand(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


def test_adapter_after_blocks_that_return_tuples() -> None:
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(3)
    delta = fd.AdapterModel(model, bottleneck_dim=3, modified_modules=["attention", "output"])
    params = random_params(delta)
    by_hand = copy.deepcopy(model)
    for path in delta.sites:
        block, adapter = by_hand.get_submodule(path), HandAdapter(params, path, ACTIVATIONS["gelu_new"])

        def after(module: nn.Module, args: Any, output: Any, adapter: nn.Module = adapter) -> Any:
            return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

        block.register_forward_hook(after)
    assert len(delta.sites) == 6  # attention, attention.output and output of two layers
    assert_close(delta.apply(params, **inputs).logits, by_hand(**inputs).logits)


def test_adapter_on_channels() -> None:
    model, images = ZOO["conv2d"].build(), torch.randn(2, 3, 9, 9)
    delta = fd.AdapterModel(model, bottleneck_dim=3, modified_modules=["conv1"])
    params = random_params(delta)
    adapter = HandAdapter(params, "conv1", ACTIVATIONS["gelu_new"])
    by_hand = copy.deepcopy(model)
    by_hand.conv1.register_forward_hook(lambda m, a, y: adapter(y.movedim(1, -1)).movedim(-1, 1))
    assert_close(delta.apply(params, images), by_hand(images))
    assert_engines_agree(delta, random_params(delta, 3), images)


def test_a_fresh_adapter_is_near_the_identity() -> None:
    delta = fd.AdapterModel(MLP().eval(), modified_modules=["b"])
    params = delta.init(0)
    assert params["b.adapter.down_proj.weight"].shape == (24, 8)
    assert 0.005 < float(params["b.adapter.down_proj.weight"].std()) < 0.02
    assert not params["b.adapter.up_proj.bias"].any()
    x = torch.randn(5, 4)
    assert_close(delta.apply(params, x), delta.backbone(x), 0.02)


def test_adapters_own_sites() -> None:
    assert len(fd.AdapterModel(ZOO["bert"].build()).sites) == 4
    assert len(fd.AdapterModel(ZOO["t5"].build()).sites) >= 8


def test_a_width_that_weights_do_not_tell_needs_an_example() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)).eval(), torch.randn(5, 4)
    with raises_saying(fd.errors.MatchError, "0", "width", "example="):
        fd.AdapterModel(model, modified_modules=["[r]^0"])
    for example in ((x,), [x], {"input": x}):
        delta = fd.AdapterModel(model, modified_modules=["[r]^0"], example=example)
        assert delta.shapes["0.adapter.up_proj.bias"] == (6,)
    assert_engines_agree(delta, random_params(delta, 3), x)
    with raises_saying(fd.errors.MatchError, "0", "example"):
        fd.AdapterModel(model, modified_modules=["[r]^0"], example=(torch.randn(5, 7),))


# -- BitFit --------------------------------------------------------------------------------------------------------


def shifted(model: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with every bias moved, and made where there was none."""
    other = copy.deepcopy(model)
    for name, offset in params.items():
        module = other.get_submodule(name.removesuffix(".bitfit.bias"))
        bias = getattr(module, "bias", None)
        module.bias = nn.Parameter(offset.clone() if bias is None else bias.detach() + offset)
    return other


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 6), torch.randn(2, 5, 4)),
        (nn.Linear(4, 6, bias=False), torch.randn(2, 5, 4)),
        (nn.Conv1d(4, 6, 3, bias=False), torch.randn(2, 4, 9)),
        (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 9, 9)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
        (nn.ConvTranspose2d(3, 6, 2, bias=False), torch.randn(2, 3, 9, 9)),
        (transposed(4, 6), torch.randn(2, 5, 4)),
        (nn.LayerNorm(4), torch.randn(2, 5, 4)),
        (nn.BatchNorm2d(3), torch.randn(2, 3, 9, 9)),
        (nn.GroupNorm(3, 6), torch.randn(2, 6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_bitfit_moves_the_bias(layer: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    delta = fd.BitFitModel(model, modified_modules=["0"])
    params = random_params(delta)
    assert torch.equal(delta.apply(delta.init(0), x), model(x))
    assert_acts(delta.apply(params, x), model(x))
    assert_close(delta.apply(params, x), shifted(model, params)(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


def adds_bias(module: nn.Module) -> bool:
    """Whether the module adds the ``bias`` that it is given."""
    return hasattr(module, "bias")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_bitfit_on_whole_models(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(3)
    targets = {"modified_modules": ["[r]layers?\\.\\d+"]} if name == "vit" else {}
    delta = fd.BitFitModel(model, **targets)
    params = random_params(delta)
    # A norm without a bias adds none: its offsets are tried at zero here, and alone in the laws.
    kept = {
        key: leaf for key, leaf in params.items() if adds_bias(model.get_submodule(key.removesuffix(".bitfit.bias")))
    }
    found = delta.apply({**delta.init(0), **kept}, **inputs)
    assert_close(logits(found), logits(shifted(model, kept)(**inputs)))
    assert_engines_agree(delta, random_params(delta, 2), engines=("fold",), pick=logits, **inputs)


def test_bitfit_needs_something_that_has_a_bias() -> None:
    with raises_saying(fd.errors.MatchError, "1"):
        fd.BitFitModel(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), modified_modules=["1"])


# -- methods of one's own that are wrong ---------------------------------------------------------------------------


def method(**functions: Callable[..., Any]) -> fd.BaseDeltaConfig:
    """A config on site ``a`` whose class gives ``functions``."""
    from dataclasses import dataclass

    start: dict[str, Callable[..., Any]] = {"init": lambda self, site, rng: {"w": torch.zeros(())}}
    return dataclass(frozen=True)(type("Own", (fd.BaseDeltaConfig,), start | functions))(modified_modules=["a"])


def test_a_method_that_draws_from_the_global_generator() -> None:
    with raises_saying(fd.errors.ConfigError, "Own.init", "generator=rng"):
        fd.DeltaModel(MLP(), method(init=lambda self, site, rng: {"w": torch.randn(3)}, after=lambda *a: a[3]))


def test_a_method_that_does_nothing() -> None:
    with raises_saying(fd.errors.ConfigError, "Own", "before", "after", "weights"):
        fd.DeltaModel(MLP(), method())


def test_a_method_that_returns_nothing() -> None:
    delta = fd.DeltaModel(MLP(), method(after=lambda self, site, p, y, x: None))
    with raises_saying(fd.errors.FuncdeltaError, "Own", "after", "NoneType"):
        delta.apply(delta.init(0), torch.randn(2, 4))


@pytest.mark.parametrize("call", ["apply", "apply_many", "bind"])
def test_an_error_inside_a_method_tells_the_site(call: str) -> None:
    delta = fd.DeltaModel(MLP(), method(after=lambda self, site, p, y, x: y + torch.ones(5)))
    x = torch.randn(2, 4)
    with pytest.raises(Exception, match="5") as caught:
        {
            "apply": lambda: delta.apply(delta.init(0), x),
            "apply_many": lambda: delta.apply_many(delta.init(0, n=2), x),
            "bind": lambda: delta.bind(delta.init(0))(x),
        }[call]()
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "site a" in told
    assert "(2, 8)" in told


def test_a_method_that_mixes_rows_is_refused_by_fold() -> None:
    delta = fd.DeltaModel(MLP(), method(after=lambda self, site, p, y, x: y - y.mean(0) + p["w"]))
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    assert_engines_agree(delta, stack, x, engines=("loop", "vmap"))
    # The rows of one member may be mixed by its own method: fold gives it them alone.
    try:
        assert_engines_agree(delta, stack, x, engines=("fold",))
    except fd.errors.FoldError as error:
        assert "rows" in str(error)  # noqa: PT017  (either outcome is right)
