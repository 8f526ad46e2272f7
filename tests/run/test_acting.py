"""Which delta acts where: several on one site, tied tensors, shared modules, layers that are never called."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from handmade import (
    ENGINES,
    MLP,
    Block,
    Dead,
    ReadsWeights,
    Tied,
    Twice,
    assert_acts,
    assert_close,
    assert_engines_agree,
    low_rank,
    raises_saying,
    random_params,
)
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd
from funcdelta.errors import UnreachedWarning


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model, lora_r=2, modified_modules=list(names), **fields)


# -- several deltas on one site ------------------------------------------------------------------------------------


def test_several_configs_act_in_the_order_given(x: Tensor) -> None:
    model = MLP().eval()
    delta = fd.DeltaModel(
        model,
        fd.LoraConfig(lora_r=2, name="slow", modified_modules=["a"]),
        fd.AdapterConfig(bottleneck_dim=3, modified_modules=["a"]),
        fd.LoraConfig(lora_r=2, modified_modules=["a", "b"]),
    )
    assert delta.delta_type == "union"
    params = random_params(delta)
    assert {name.split(".")[1] for name in params} == {"slow", "adapter", "lora"}
    hidden = model.a(x) + x @ low_rank(params, "a.slow").T
    down = F.linear(hidden, params["a.adapter.down_proj.weight"], params["a.adapter.down_proj.bias"])
    hidden = hidden + F.linear(
        F.gelu(down, approximate="tanh"), params["a.adapter.up_proj.weight"], params["a.adapter.up_proj.bias"]
    )
    hidden = torch.tanh(hidden + x @ low_rank(params, "a.lora").T)
    hidden = torch.tanh(model.b(hidden) + hidden @ low_rank(params, "b.lora").T)
    assert_close(delta.apply(params, x), model.head(hidden))
    assert_engines_agree(delta, random_params(delta, 3), x)
    without = {name: leaf for name, leaf in params.items() if ".adapter." not in name}
    assert_acts(delta.apply(without, x), delta.apply(params, x))


def test_an_adapter_before_a_lora_is_another_function(x: Tensor) -> None:
    model = MLP().eval()
    one, two = fd.LoraConfig(modified_modules=["a"]), fd.AdapterConfig(bottleneck_dim=3, modified_modules=["a"])
    first, second = fd.DeltaModel(model, one, two), fd.DeltaModel(model, two, one)
    params = random_params(first)
    assert set(params) == set(second.names)
    assert_acts(first.apply(params, x), second.apply(params, x))


@pytest.mark.parametrize("given", [(None, None), ("lora_1", None, None), (None, None, "lora_1"), (None, "lora")])
def test_deltas_of_one_kind_get_names_of_their_own(given: tuple[str | None, ...]) -> None:
    configs = [fd.LoraConfig(lora_r=2, modified_modules=["a"], name=name) for name in given]
    delta = fd.DeltaModel(MLP(), *configs)
    assert len(delta.names) == len(set(delta.names)) == 3 * len(given)
    assert len(delta.init(0)) == 3 * len(given)
    assert {name for name in given if name} <= {name.split(".")[1] for name in delta.names}


def test_a_delta_cannot_take_the_name_of_a_child() -> None:
    with raises_saying(fd.errors.MatchError, "inner", "name="):
        fd.DeltaModel(Block(), fd.LoraConfig(modified_modules=["inner"], name="weight"))
    with raises_saying(fd.errors.ConfigError, "x", "name="):
        fd.DeltaModel(
            MLP(),
            fd.LoraConfig(name="x", modified_modules=["a"]),
            fd.LoraConfig(name="x", modified_modules=["b"]),
        )


# -- tied tensors and shared modules -------------------------------------------------------------------------------


def test_a_delta_on_one_end_of_a_tied_pair_changes_that_end_alone() -> None:
    model = Tied().eval()
    tokens = torch.randint(11, (5, 6))
    weight = model.embedding.weight
    for name in ("embedding", "head"):
        delta = lora(model, name)
        params = random_params(delta)
        change = low_rank(params, f"{name}.lora")
        embedding = weight + (change.T if name == "embedding" else 0)
        head = weight + (change if name == "head" else 0)
        expected = torch.tanh(model.body(F.embedding(tokens, embedding))) @ head.T
        assert_close(delta.apply(params, tokens), expected)
        assert_engines_agree(delta, random_params(delta, 3), tokens)


@pytest.mark.parametrize("end", ["embedding", "head"])
def test_a_trained_tied_tensor_acts_on_all_its_ends(end: str) -> None:
    model = Tied().eval()
    tokens = torch.randint(11, (5, 6))
    delta = lora(model, "body", unfrozen_modules=["deltas", end])
    (name,) = [name for name in delta.names if ".lora." not in name]
    params = random_params(delta)
    tensor = params[name]
    hidden = F.embedding(tokens, tensor)
    expected = torch.tanh(model.body(hidden) + hidden @ low_rank(params, "body.lora").T) @ tensor.T
    assert_close(delta.apply(params, tokens), expected)
    assert_engines_agree(delta, random_params(delta, 3), tokens)
    assert_close(delta.bind(params)(tokens), expected)


def test_both_ends_may_have_deltas_of_their_own_while_the_tensor_trains() -> None:
    model = Tied().eval()
    delta = lora(model, "embedding", "head", unfrozen_modules=["deltas", "head"])
    assert_engines_agree(delta, random_params(delta, 3), torch.randint(11, (5, 6)))


def test_a_module_under_two_names_has_one_delta_for_both(x: Tensor) -> None:
    model = Twice().eval()
    delta = lora(model, "first")
    params = random_params(delta)

    def layer(value: Tensor) -> Tensor:
        return model.first(value) + value @ low_rank(params, "first.lora").T

    assert_close(delta.apply(params, x), layer(torch.tanh(layer(x))))
    assert_engines_agree(delta, random_params(delta, 3), x)


# -- sites that a call does not pass through -----------------------------------------------------------------------

ENTRIES = (*ENGINES, "auto", "apply", "apply_rows", "vmap", "grad", "value_and_grad", "bind", "compile")


def enter(entry: str, delta: fd.DeltaModel, stack: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output of member 0 by any way into a delta."""
    params = fd.take(stack, 0)
    if entry == "apply":
        return delta.apply(params, x)
    if entry == "apply_rows":
        return delta.apply_rows(stack, [0] * len(x), x)
    if entry == "vmap":
        return torch.vmap(lambda p: delta.apply(p, x))(stack)[0]
    if entry == "grad":
        return torch.func.grad(lambda p: (delta.apply(p, x), delta.apply(p, x))[0].sum(), has_aux=False)(params) and (
            delta.apply(params, x)
        )
    if entry == "value_and_grad":
        (_, output), _ = fd.value_and_grad(lambda p: (delta.apply(p, x).sum(), delta.apply(p, x)), has_aux=True)(params)
        return output
    if entry == "bind":
        return delta.bind(params)(x)
    if entry == "compile":
        torch._dynamo.reset()
        return torch.compile(lambda p, x: delta.apply(p, x), backend="eager")(params, x)
    return delta.apply_many(stack, x, engine=entry)[0]


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in ("compile", "bind")])
def test_a_site_that_no_call_reaches_is_told_once(entry: str, x: Tensor) -> None:
    delta = lora(Dead().eval(), "live", "dead")
    stack = random_params(delta, 2)
    with pytest.warns(UnreachedWarning, match=r"dead of 2 sites.*exclude_modules=\[\"dead\"\]"):
        found = enter(entry, delta, stack, x)
    alone = {name: leaf for name, leaf in stack.items() if name.startswith("live.")}
    assert_close(found, enter(entry, lora(delta.backbone, "live"), alone, x))
    enter(entry, delta, stack, x)  # warnings are errors


def test_each_set_of_sites_is_checked_on_its_first_call(x: Tensor) -> None:
    delta = fd.DeltaModel(
        Dead().eval(),
        fd.LoraConfig(modified_modules=["live"]),
        fd.LoraConfig(modified_modules=["dead"], name="other"),
    )
    params = delta.init(0)
    delta.apply({name: leaf for name, leaf in params.items() if name.startswith("live.")}, x)
    with pytest.warns(UnreachedWarning, match="dead"):
        delta.apply({name: leaf for name, leaf in params.items() if name.startswith("dead.")}, x)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in ("fold", "apply_rows")])
def test_weights_that_are_read_directly_are_rewritten(entry: str, x: Tensor) -> None:
    delta = lora(ReadsWeights().eval(), "read")
    stack = random_params(delta, 2)
    expected = x @ (delta.backbone.read.weight + low_rank(fd.take(stack, 0), "read.lora")).T
    assert_close(enter(entry, delta, stack, x), expected)


def test_weights_that_the_model_itself_reads_cannot_be_folded(x: Tensor) -> None:
    delta = lora(ReadsWeights().eval(), "read")
    with raises_saying(fd.errors.EngineError, "read", "engine="):
        delta.apply_many(random_params(delta, 2), x, engine="fold")


def test_the_projection_that_torchs_attention_reads_is_a_site() -> None:
    architecture = ZOO["torch_transformer"]
    model, inputs = architecture.build(), architecture.inputs(4)
    for config in (
        fd.LoraConfig(modified_modules=["out_proj", "linear1"]),
        fd.BitFitConfig(modified_modules=["out_proj"]),
    ):
        delta = fd.DeltaModel(model, config)
        found = assert_engines_agree(delta, random_params(delta, 3), **inputs)
        assert_acts(found[0], model(**inputs))
        with torch.no_grad():
            assert_engines_agree(delta, random_params(delta, 3), **inputs)
    with raises_saying(fd.errors.MatchError, "out_proj", "self_attn"):
        fd.AdapterModel(model, modified_modules=["out_proj"])


@pytest.mark.parametrize("attempt", range(10))
def test_first_calls_in_many_threads(attempt: int, x: Tensor) -> None:
    """The first call finds out that the weights are read directly; a thread beside it has to know that too."""
    delta = lora(ReadsWeights().eval(), "read")
    stack = random_params(delta, 8, seed=attempt)
    found: dict[int, Tensor] = {}
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        found[i] = delta.apply(fd.take(stack, i), x) if i % 2 else delta.apply_many(stack, x)[i]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert_close(found[i], delta.merged(fd.take(stack, i))(x))
