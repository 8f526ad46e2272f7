"""The forward decides, not the class: a delta acts as its weights say, by whatever way, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import ENGINES, assert_acts, assert_close, raises_saying, random_params, transposed
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd
from funcdelta.methods.site import site_of
from funcdelta.plan.attachment import Attachment
from funcdelta.structures.modules.forwards import FORWARDS, LAYERS, is_known


def of_transformers(module: str, name: str) -> Any:
    """A class of a model of Transformers."""
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


class Holder(nn.Module):
    """One layer with a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


class Own(nn.Module):
    """A linear layer of one's own, (out, in)."""

    def __init__(self, width: int = 4, out: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = width, out
        self.weight = nn.Parameter(torch.randn(out, width))
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Unnamed(nn.Module):
    """A linear layer that tells no widths, (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.weight)


class Gain(Own):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x @ self.weight.T) + self.bias


class Clipped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clamp(-50, 50), self.weight, self.bias)


class Dropping(Own):
    """Linear where it evaluates, and where it trains not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class Gated(Own):
    """Linear where it evaluates, and where it trains not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.tanh() if self.training else x, self.weight, self.bias)


class GraphConv(nn.Module):
    """``A (x W) + b`` with W (in, out), which in_features and out_features do not tell from a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class Packed(nn.Module):
    """A linear layer whose weight is whole numbers of four bits, two in each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.weight = nn.Parameter(torch.randint(0, 255, (6, 2), dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([self.weight % 16, self.weight // 16], -1).flatten(1)
        return F.linear(x, (pairs.to(x.dtype) - 8) / 4)


class Curved(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ReturnsTuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.softmax(-1), y


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * super().forward(tokens)


class Shifted(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens + 2)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class PadsInside(nn.Conv2d):
    """Its forward is torch's own, and what that calls is not."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


def patched(layer: nn.Module) -> nn.Module:
    old = layer.forward
    layer.forward = lambda x: torch.tanh(old(x))  # type: ignore[method-assign]
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def hooked_before(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    return layer


TOKENS = torch.tensor([[1, 2, 0, 2, 5], [3, 0, 0, 7, 1]])
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))

BY_WEIGHTS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "scaled output": (lambda: Doubled(4, 6), X),
    "a tuple": (lambda: ReturnsTuple(4, 6), X),
    "a patched forward": (lambda: patched(nn.Linear(4, 6)), X),
    "a hook after it": (lambda: hooked(nn.Linear(4, 6)), X),
    "a hook before it": (lambda: hooked_before(nn.Linear(4, 6)), X),
    "dropout of one's own": (Dropping, X),
    "another function in training": (Gated, X),
    "Llama 4's router": (lambda: router(), torch.randn(5, 4)),
    "Falcon's linear": (lambda: of_transformers("falcon.modeling_falcon", "FalconLinear")(4, 6), X),
    "scaled table": (lambda: Scaled(11, 4), TOKENS),
    "offset table": (lambda: Shifted(11, 4), TOKENS),
    "Gemma's scaled table": (
        lambda: of_transformers("gemma3.modeling_gemma3", "Gemma3TextScaledWordEmbedding")(11, 4, 0, embed_scale=2.0),
        TOKENS,
    ),
    "BART's positions": (
        lambda: of_transformers("bart.modeling_bart", "BartLearnedPositionalEmbedding")(11, 4),
        TOKENS,
    ),
    "a table that shortens its rows": (lambda: nn.Embedding(11, 4, max_norm=0.7), TOKENS),
    "gradients by frequency": (lambda: nn.Embedding(11, 4, scale_grad_by_freq=True), TOKENS),
    "reflecting pads": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "circular pads": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), SIGNAL),
    "trimmed output": (lambda: Causal(4, 6, 3, padding=2), SIGNAL),
    "pads below its forward": (lambda: PadsInside(3, 6, 3), IMAGE),
    "BiT's convolution": (
        lambda: of_transformers("bit.modeling_bit", "WeightStandardizedConv2d")(3, 6, 3, padding=1),
        IMAGE,
    ),
    "Perceiver's convolution": (
        lambda: of_transformers("perceiver.modeling_perceiver", "Conv2dSamePadding")(3, 6, 3),
        IMAGE,
    ),
}

BY_VALUES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), X),
    "linear of one's own": (Own, X),
    "zeros in a linear of one's own": (lambda: zeroed(Own()), X),
    "(in, out) without widths": (Unnamed, X),
    "transposed": (lambda: transposed(4, 6), X),
    "its own method, set again": (lambda: set_again(nn.Linear(4, 6)), X),
    "a table": (lambda: nn.Embedding(11, 4), TOKENS),
    "a table with padding": (lambda: nn.Embedding(11, 4, padding_idx=0), TOKENS),
    "a table with padding counted from the end": (lambda: nn.Embedding(8, 4, padding_idx=-1), TOKENS),
    "a convolution": (lambda: nn.Conv2d(3, 6, 3, padding=1, stride=2), IMAGE),
}


def router() -> nn.Module:
    config = of_transformers("llama4.configuration_llama4", "Llama4TextConfig")
    made = of_transformers("llama4.modeling_llama4", "Llama4Router")(
        config(hidden_size=4, num_local_experts=6, num_experts_per_tok=2)
    )
    nn.init.normal_(made.weight)
    return made


def zeroed(layer: Own) -> nn.Module:
    nn.init.zeros_(layer.weight)
    return layer


def set_again(layer: nn.Module) -> nn.Module:
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def flat(output: Any) -> Tensor:
    """All tensors of an output as one."""
    leaves = output if isinstance(output, tuple) else (output,)
    return torch.cat([leaf.flatten(1) for leaf in leaves], 1)


def by_hand(model: nn.Module, params: dict[str, Tensor], *args: Tensor) -> Tensor:
    """The backbone itself with s B A added to the layer's weight for one call, and the gradient of it."""
    layer = model.layer
    weight = layer._parameters["weight"]
    change = params["layer.lora.scale"] * params["layer.lora.lora_B"] @ params["layer.lora.lora_A"].flatten(1)
    # As it is laid out is seen from the factors: A has the input's width.
    turned = change.shape != weight.flatten(1).shape or isinstance(layer, nn.Embedding)
    layer._parameters["weight"] = weight.detach() + (change.T if turned else change).reshape(weight.shape)
    try:
        return flat(model(*args))
    finally:
        layer._parameters["weight"] = weight


def gradients(function: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items() if not name.endswith("scale")}
    loss = (function({**params, **leaves}) * torch.arange(1.0, 4.0).repeat(999)[: flat_size(function, params)]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def flat_size(function: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> int:
    with torch.no_grad():
        return function(params).shape[1]


def attachment(delta: fd.DeltaModel) -> Attachment:
    (only,) = delta.plan.all()
    return only


@pytest.mark.parametrize("name", [*BY_WEIGHTS, *BY_VALUES])
def test_lora_is_its_change_of_the_weight(name: str) -> None:
    make, x = {**BY_WEIGHTS, **BY_VALUES}[name]
    model = Holder(make()).eval()
    delta = fd.LoraModel(model, lora_r=2, lora_alpha=3, modified_modules=["layer"])
    assert attachment(delta).by_weights is (name in BY_WEIGHTS)
    assert attachment(delta).by_values is (name in BY_VALUES)
    params, weight = random_params(delta), model.layer.weight.detach().clone()
    with torch.no_grad():
        bare = flat(copy.deepcopy(model)(x)) if "patched" not in name else flat(model(x))
        model.layer.weight.copy_(weight)
        expected = by_hand(model, params, x)
        assert_acts(expected, bare)
        assert_close(flat(delta.apply(params, x)), expected)
        assert_close(flat(delta.merged(params)(x)), expected)
        stack = random_params(delta, 3)
        each = torch.stack([by_hand(model, fd.take(stack, i), x) for i in range(3)])
        for engine in ENGINES:
            found = delta.apply_many(stack, x, engine=engine)
            assert_close(torch.stack([flat(fd.take(found, i)) for i in range(3)]), each)
    assert torch.equal(model.layer.weight, weight)


@pytest.mark.parametrize("name", [*BY_WEIGHTS, *BY_VALUES])
def test_gradients_are_those_of_the_weight(name: str) -> None:
    make, x = {**BY_WEIGHTS, **BY_VALUES}[name]
    model = Holder(make()).eval()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["layer"])
    params = random_params(delta)
    expected = gradients(lambda p: by_hand(model, p, x), params)
    found = gradients(lambda p: flat(delta.apply(p, x)), params)
    for leaf, gradient in expected.items():
        assert gradient.any()
        assert_close(found[leaf], gradient, 1e-4)


def test_a_table_with_sparse_gradients_is_the_dense_one() -> None:
    sparse, dense = nn.Embedding(11, 4, sparse=True), nn.Embedding(11, 4)
    dense.load_state_dict(sparse.state_dict())
    deltas = [fd.LoraModel(Holder(table).eval(), lora_r=2, modified_modules=["layer"]) for table in (sparse, dense)]
    params = random_params(deltas[0])
    found, expected = (gradients(lambda p, d=delta: flat(d.apply(p, TOKENS)), params) for delta in deltas)
    assert torch.equal(deltas[0].apply(params, TOKENS), deltas[1].apply(params, TOKENS))
    assert all(torch.equal(found[leaf], expected[leaf]) for leaf in expected)


@pytest.mark.parametrize("name", ["dropout of one's own", "another function in training"])
def test_what_differs_in_training_is_right_there(name: str) -> None:
    make, x = BY_WEIGHTS[name]
    model = Holder(make()).train()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["layer"])
    params = random_params(delta)
    torch.manual_seed(3)
    expected = by_hand(model, params, x)
    torch.manual_seed(3)
    assert_close(flat(delta.apply(params, x)), expected)


def test_no_build_draws_from_torchs_generator() -> None:
    model = nn.ModuleList([Dropping(), Own(), Packed(), of_transformers("t5.modeling_t5", "T5LayerNorm")(4)])
    before = torch.get_rng_state()
    for i in range(4):
        site_of(str(i), model[i])
        site_of(str(i), model[i].train())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (GraphConv, "adj"),
        (Gain, "does not compute F.linear(x, weight, bias)"),
        (Clipped, "does not compute F.linear(x, weight, bias)"),
        (Curved, "is not affine"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_class_of_ones_own_that_computes_something_else_is_refused(layer: type[nn.Module], said: str) -> None:
    with raises_saying(fd.errors.MatchError, "layer", layer.__name__, said):
        fd.LoraModel(Holder(layer()), modified_modules=["layer"])
    # Methods that act on what leaves a module act on any.
    width = layer().out_features
    delta = fd.AdapterModel(Holder(layer()).eval(), bottleneck_dim=2, modified_modules=["layer"])
    assert delta.shapes["layer.adapter.up_proj.bias"] == (width,)


def test_packed_weights_take_the_formula_and_no_change() -> None:
    model = Holder(Packed()).eval()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["layer"])
    params = random_params(delta)
    change = params["layer.lora.scale"] * params["layer.lora.lora_B"] @ params["layer.lora.lora_A"]
    assert_close(delta.apply(params, X), model(X) + X @ change.T)
    with raises_saying(fd.errors.MergeError, "layer", "Packed", "packed", "(6, 4)"):
        delta.merge(params)


def test_dropout_has_no_place_in_a_change_of_weights() -> None:
    for layer in (Doubled(4, 6), nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")):
        with raises_saying(fd.errors.MatchError, "layer", "lora_dropout=0.1", "lora_dropout=0 "):
            fd.LoraModel(Holder(layer), lora_dropout=0.1, modified_modules=["layer"])
    fd.LoraModel(Holder(nn.Linear(4, 6)), lora_dropout=0.1, modified_modules=["layer"])


def test_torchs_forwards_are_known_by_the_function() -> None:
    layers = (nn.Linear(2, 2), nn.Embedding(2, 2), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1))
    norms = (nn.LayerNorm(2), nn.RMSNorm(2), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2))
    for layer in (*layers, *norms, nn.ConvTranspose2d(1, 1, 1), transposed(2, 2)):
        assert is_known(layer)
        assert not site_of("layer", layer).own_forward
        same_name = type(type(layer).__name__, (type(layer),), {"forward": lambda self, x: x})
        layer.__class__ = same_name
        assert not is_known(layer)
    assert len(FORWARDS) == len(LAYERS)


def test_a_moving_hook_of_accelerate_is_not_another_forward() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(4, 6)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(layer)
    assert is_known(layer)
    hooks.add_hook_to_module(doubling := nn.Linear(4, 6), type("Doubling", (hooks.ModelHook,), {})())
    assert not is_known(doubling)


# -- BitFit --------------------------------------------------------------------------------------------------------


def with_offset(model: nn.Module, offset: Tensor, x: Tensor) -> Any:
    """The backbone itself with an offset on the bias of its layer for one call."""
    bias = model.layer._parameters["bias"]
    model.layer._parameters["bias"] = offset if bias is None else bias.detach() + offset
    try:
        return flat(model(x))
    finally:
        model.layer._parameters["bias"] = bias


NORMS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "ConvNeXt's norm of channels": (
        lambda: of_transformers("convnext.modeling_convnext", "ConvNextLayerNorm")(5, data_format="channels_first"),
        torch.randn(2, 5, 5, 5),
    ),
    "ConvNeXt's norm of features": (
        lambda: of_transformers("convnext.modeling_convnext", "ConvNextLayerNorm")(5, data_format="channels_last"),
        torch.randn(2, 5, 5, 5),
    ),
    "BiT's norm with an activation": (
        lambda: of_transformers("bit.modeling_bit", "BitGroupNormActivation")(
            of_transformers("bit.configuration_bit", "BitConfig")(num_groups=2), 4
        ),
        torch.randn(2, 4, 4, 4),
    ),
    "a norm over two axes": (lambda: nn.LayerNorm((3, 4)), torch.randn(2, 3, 4)),
    "a norm without a bias": (lambda: nn.LayerNorm(4, bias=False), X),
    "a doubled linear": (lambda: Doubled(4, 6), X),
    "a router without a bias": (router, torch.randn(5, 4)),
    "a linear of one's own": (Own, X),
}


@pytest.mark.parametrize("name", NORMS)
def test_bitfit_is_an_offset_of_the_bias(name: str) -> None:
    make, x = NORMS[name]
    model = Holder(make()).eval()
    delta = fd.BitFitModel(model, modified_modules=["layer"])
    stack = random_params(delta, 3)
    with torch.no_grad():
        each = torch.stack([with_offset(model, stack["layer.bitfit.bias"][i], x) for i in range(3)])
        assert_acts(each[0], flat(model(x)))
        for engine in ENGINES:
            found = delta.apply_many(stack, x, engine=engine)
            assert_close(torch.stack([flat(fd.take(found, i)) for i in range(3)]), each)
        assert_close(flat(delta.merged(fd.take(stack, 1))(x)), each[1])


class IgnoresBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight)


def test_a_bias_that_nothing_would_read_is_refused() -> None:
    with raises_saying(fd.errors.MatchError, "layer", "IgnoresBias", "adds no bias"):
        fd.BitFitModel(Holder(IgnoresBias(4, 6, bias=False)), modified_modules=["layer"])
    own = fd.BitFitModel(Holder(Own(bias=False)).eval(), modified_modules=["layer"])
    params = random_params(own)
    assert_close(own.apply(params, X), own.backbone(X) + params["layer.bitfit.bias"])
    with raises_saying(fd.errors.MergeError, "layer", "Own", "adds no bias"):
        own.merge(params)


@pytest.mark.parametrize("module", ["llama.modeling_llama.LlamaRMSNorm", "t5.modeling_t5.T5LayerNorm"])
def test_norms_of_other_packages_are_known_by_what_they_compute(module: str) -> None:
    norm = of_transformers(module.rpartition(".")[0], module.rpartition(".")[2])(5)
    site = site_of("norm", norm)
    assert (site.kind, site.out_features, site.channel_axis, site.own_forward) == ("norm", 5, -1, False)


class LayerScaleNorm(nn.Module):
    """A norm in name only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_norm_in_name_only_is_not_one() -> None:
    assert site_of("norm", LayerScaleNorm()).kind == "other"


def test_channels_of_a_norm_are_found_where_they_are() -> None:
    norm = of_transformers("convnext.modeling_convnext", "ConvNextLayerNorm")
    assert site_of("n", norm(5, data_format="channels_first")).channel_axis == 1
    assert site_of("n", norm(5, data_format="channels_last")).channel_axis == -1


def test_features_of_a_convolution_without_rows_are_where_they_are() -> None:
    conv, signal = nn.Conv1d(4, 6, 4), SIGNAL[0]
    for kind in (fd.BitFitConfig, fd.AdapterConfig, fd.LowRankAdapterConfig, fd.LoraConfig):
        fields = {"reduction_factor": 2} if kind is fd.LowRankAdapterConfig else {}
        delta = fd.DeltaModel(Holder(conv).eval(), kind(modified_modules=["layer"], **fields))
        params = random_params(delta)
        # As many places as features: a wrong axis would go unnoticed.
        assert conv(signal).shape == (6, 6)
        assert_close(delta.apply(params, signal), delta.apply(params, signal[None])[0])


# -- complex layers, and methods of one's own ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [fd.LoraConfig, fd.BitFitConfig, fd.AdapterConfig, fd.LowRankAdapterConfig])
def test_complex_layers_are_refused_by_name(kind: type[fd.BaseDeltaConfig]) -> None:
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.complex64), nn.Linear(32, 32))
    with raises_saying(fd.errors.MatchError, "0", "torch.complex64", "exclude_modules"):
        fd.DeltaModel(model, kind(modified_modules=["0"]))


def own_method(**functions: Callable[..., Any]) -> fd.BaseDeltaConfig:
    start: dict[str, Callable[..., Any]] = {
        "init": lambda self, site, rng: {"gain": torch.ones(site.out_features)},
        "after": lambda self, site, p, y, x: y * p["gain"],
    }
    made = type("Own", (fd.BaseDeltaConfig,), start | functions)
    return dataclasses.dataclass(frozen=True)(made)(modified_modules=["layer"])


def rows(self: Any, site: fd.Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
    return w | {name: tensor * p["gain"].view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in w.items()}


def test_a_method_of_ones_own_takes_the_form_that_holds() -> None:
    for layer in (nn.Linear(4, 6), ReturnsTuple(4, 6)):
        model = Holder(layer).eval()
        delta = fd.DeltaModel(model, own_method(weights=rows))
        params = random_params(delta)
        gain = next(iter(params.values()))
        hand = copy.deepcopy(model)
        with torch.no_grad():
            hand.layer.weight.mul_(gain[:, None])
            hand.layer.bias.mul_(gain)
        assert attachment(delta).by_weights is (type(layer) is ReturnsTuple)
        assert_close(flat(delta.apply(params, X)), flat(hand(X)))


def test_a_method_whose_two_forms_differ_is_told_when_it_is_built() -> None:
    wrong = own_method(weights=lambda self, site, p, w: w | {"weight": w["weight"] * p["gain"][:, None]})
    with raises_saying(fd.errors.ConfigError, "Own", "layer", "weights", "unmergeable"):
        fd.DeltaModel(Holder(nn.Linear(4, 6)), wrong)
    fd.DeltaModel(Holder(nn.Linear(4, 6, bias=False)), wrong)


def test_a_method_that_cannot_act_by_weights_is_refused_where_it_would_have_to() -> None:
    refusing = own_method(weights=rows, unmergeable=lambda self, site: "its rows are counted")
    fd.DeltaModel(Holder(nn.Linear(4, 6)), refusing)
    with raises_saying(fd.errors.MatchError, "layer", "Doubled", "its rows are counted"):
        fd.DeltaModel(Holder(Doubled(4, 6)), refusing)
    # Where its formula holds all the same, it says so.
    delta = fd.DeltaModel(Holder(Doubled(4, 6)), own_method(weights=rows, holds_on_values=lambda self, site: True))
    assert attachment(delta).by_values
