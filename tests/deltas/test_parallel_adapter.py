"""Parallel adapters against OpenDelta's own numbers and against adapters written by hand, beside modules and spans."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, logits, raises_saying, random_params
from opendelta_saved import saved_backbone, saved_delta
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

import funcdelta as fd


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_opendeltas_logits(opendelta_fixtures: Path, name: str) -> None:
    model, inputs = saved_backbone(opendelta_fixtures / name)
    config, params, expected = saved_delta(opendelta_fixtures / name / "parallel_adapter")
    delta = fd.ParallelAdapterModel(
        model,
        bottleneck_dim=config["bottleneck_dim"],
        scaled=config["scaled"],  # null: it was never set
        example=inputs,
    )
    params = {key: params.get(key, leaf) for key, leaf in delta.init(0).items()} | params
    assert [key for key in params if not key.endswith(".scaled")] == [
        key for key in delta.names if not key.endswith(".scaled")
    ]
    assert_acts(expected, logits(model(**inputs)))
    assert float((logits(delta.apply(params, **inputs)) - expected).abs().max()) < 1e-5


class Bottleneck(nn.Module):
    """s (U gelu(D x + d) + u), a module with the leaves of one span."""

    def __init__(self, p: dict[str, Tensor], entry: str) -> None:
        super().__init__()
        self.p = {key.partition(".parallel_adapter.")[2]: leaf for key, leaf in p.items() if key.startswith(entry)}

    def forward(self, x: Tensor) -> Tensor:
        p = self.p
        hidden = F.gelu(x @ p["down_proj.weight"].T + p["down_proj.bias"], approximate="tanh")
        return p["scaled"] * (hidden @ p["up_proj.weight"].T + p["up_proj.bias"])


def by_hand(model: nn.Module, params: dict[str, Tensor], spans: dict[str, str]) -> nn.Module:
    """A copy of ``model`` with bottlenecks from what enters each key of ``spans`` to what leaves its value."""
    other = copy.deepcopy(model)
    for entry, end in spans.items():
        bottleneck, held = Bottleneck(params, f"{entry}.parallel_adapter"), []

        def enter(module: nn.Module, args: Any, kwargs: Any, bottleneck: Any = bottleneck, held: Any = held) -> None:
            held.append(bottleneck(args[0] if args else kwargs["hidden_states"]))

        def leave(module: nn.Module, args: Any, output: Any, held: Any = held) -> Any:
            change = held.pop()
            return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

        other.get_submodule(entry).register_forward_pre_hook(enter, with_kwargs=True)
        other.get_submodule(end).register_forward_hook(leave)
    return other


def gated_t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    more = {"relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **more)).eval()


PLACES: dict[str, dict[str, str]] = {
    "opt": {f"model.decoder.layers.{i}.fc1": f"model.decoder.layers.{i}.fc2" for i in range(2)}
    | {f"model.decoder.layers.{i}.self_attn": f"model.decoder.layers.{i}.self_attn" for i in range(2)},
    "llama": {f"model.layers.{i}.mlp.gate_proj": f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    | {f"model.layers.{i}.self_attn": f"model.layers.{i}.self_attn" for i in range(2)},
    "bert": {f"bert.encoder.layer.{i}.intermediate.dense": f"bert.encoder.layer.{i}.output.dense" for i in range(2)}
    | {f"bert.encoder.layer.{i}.attention": f"bert.encoder.layer.{i}.attention" for i in range(2)},
    "gated t5": {
        **{
            f"{stack}.block.{i}.layer.{at}.DenseReluDense.wi_0": f"{stack}.block.{i}.layer.{at}.DenseReluDense.wo"
            for stack, at in (("encoder", 1), ("decoder", 2))
            for i in range(2)
        },
        **dict.fromkeys([f"{stack}.block.{i}.layer.0" for stack in ("encoder", "decoder") for i in (0, 1)]),
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_its_own_sites_are_the_hand_written_modules(name: str) -> None:
    """Hidden states by keyword (OPT), two entries of a gated feed-forward, and ends paired within their block."""
    model = gated_t5() if name == "gated t5" else ZOO[name].build()
    inputs = ZOO["t5" if name == "gated t5" else name].inputs(3)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, example=inputs)
    spans = {entry: end or entry for entry, end in PLACES[name].items()}
    assert {key.partition(".parallel_adapter.")[0] for key in delta.names} == set(spans) == set(delta.sites)
    params = random_params(delta)
    expected = logits(by_hand(model, params, spans)(**inputs))
    assert_acts(expected, logits(model(**inputs)))
    assert_close(logits(delta.apply(params, **inputs)), expected)


class TwoBlocks(nn.Module):
    """Two blocks of up, act, down, and a head: (b, 4) to (b, 3)."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        parts = {"up": (4, 6), "mid": (6, 6), "down": (6, 4)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in parts.items()}) for _ in range(2)
        )
        self.act, self.head = act or nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](self.act(block["mid"](self.act(block["up"](x)))))
        return self.head(x)


def test_scales_may_differ_by_member() -> None:
    model, x = TwoBlocks().eval(), torch.randn(5, 4)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, scaled=0.5, modified_modules=["up", "down"])
    assert delta.shapes["blocks.0.up.parallel_adapter.down_proj.weight"] == (3, 4)
    assert delta.shapes["blocks.0.up.parallel_adapter.up_proj.weight"] == (4, 3)
    assert list(delta.constants) == [f"blocks.{i}.up.parallel_adapter.scaled" for i in range(2)]
    one = random_params(delta)
    assert all(float(one[key]) == 0.5 for key in delta.constants)
    stack = fd.broadcast(one, 3) | {key: torch.tensor([0.0, 1.0, -2.0]) for key in delta.constants}
    found = assert_engines_agree(delta, stack, x)
    assert_close(found[0], model(x))
    for i, scale in enumerate((0.0, 1.0, -2.0)):
        scaled = one | dict.fromkeys(delta.constants, torch.tensor(scale))
        assert_close(found[i], by_hand(model, scaled, {f"blocks.{k}.up": f"blocks.{k}.down" for k in range(2)})(x))
    assert_close(delta.apply_rows(stack, [2, -1, 1, 0, 2], x)[[0, 2]], torch.stack([found[2][0], found[1][2]]))


def test_one_name_stands_for_a_pair_with_itself() -> None:
    model, x = TwoBlocks().eval(), torch.randn(5, 4)
    one, two = (fd.ParallelAdapterModel(model, modified_modules=["mid"] * n) for n in (1, 2))
    params = random_params(one)
    assert torch.equal(one.apply(params, x), two.apply(params, x))
    assert_close(
        one.apply(params, x), by_hand(model, params, {f"blocks.{i}.mid": f"blocks.{i}.mid" for i in range(2)})(x)
    )


@pytest.mark.parametrize(("begin", "end"), [("attention", "attention.output.dense"), ("intermediate.dense", "layer.0")])
def test_one_end_may_stand_inside_the_other(begin: str, end: str) -> None:
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(3)
    names = [f"layer.0.{begin}", end if end == "layer.0" else f"layer.0.{end}"]
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=names, example=inputs)
    params = random_params(delta)
    spans = {f"bert.encoder.{names[0]}": f"bert.encoder.{names[1]}"}
    assert_close(logits(delta.apply(params, **inputs)), logits(by_hand(model, params, spans)(**inputs)))
    stack = random_params(delta, 2)
    assert_engines_agree(delta, stack, engines=("fold", "loop"), pick=logits, **inputs)


def test_deltas_at_both_ends_act_in_their_order() -> None:
    """What enters a span is what the deltas at its beginning make of it; at its end the first given acts first."""
    model, x = TwoBlocks().eval(), torch.randn(5, 4)
    configs = [
        fd.LoraConfig(lora_r=2, modified_modules=["down"]),
        fd.ParallelAdapterConfig(bottleneck_dim=3, modified_modules=["up", "down"]),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["down"]),
        fd.ParallelAdapterConfig(bottleneck_dim=2, modified_modules=["up", "mid"], name="second"),
    ]
    delta = fd.DeltaModel(model, *configs)
    params = random_params(delta)
    other = copy.deepcopy(model)
    for i in range(2):
        p = {key.removeprefix(f"blocks.{i}."): leaf for key, leaf in params.items() if key.startswith(f"blocks.{i}.")}
        block = other.blocks[i]
        up, mid, down = block["up"], block["mid"], block["down"]
        beside = Bottleneck(p, "up.parallel_adapter")
        second = Bottleneck({k.replace("second", "parallel_adapter"): v for k, v in p.items()}, "up.parallel_adapter")
        second.p = {k.partition("second.")[2]: v for k, v in p.items() if ".second." in k}
        low_rank = p["down.lora.scale"] * p["down.lora.lora_B"] @ p["down.lora.lora_A"]
        names = [f"down.adapter.{part}.{kind}" for part in ("down_proj", "up_proj") for kind in ("weight", "bias")]
        weights = [p[name] for name in names]

        class Block(nn.Module):
            def forward(self, x: Tensor, parts: Any = (up, mid, down, beside, second, low_rank, weights)) -> Tensor:
                up, mid, down, beside, second, low_rank, (dw, db, uw, ub) = parts
                hidden = torch.tanh(mid(torch.tanh(up(x))) + second(x))
                y = down(hidden) + hidden @ low_rank.T + beside(x)
                return y + F.linear(F.gelu(F.linear(y, dw, db), approximate="tanh"), uw, ub)

        model_block = Block()
        other.blocks[i] = nn.ModuleDict({"up": nn.Identity(), "mid": nn.Identity(), "down": model_block})
    other.act = nn.Identity()
    assert_close(delta.apply(params, x), other(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


def test_eight_threads_each_have_their_own_stash() -> None:
    model, x = TwoBlocks().eval(), torch.randn(64, 4)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["up", "down"])
    stack = random_params(delta, 8)
    alone = [delta.apply(fd.take(stack, i), x) for i in range(8)]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(delta.apply(fd.take(stack, i), x), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_in_one_graph_with_a_loss_gradient() -> None:
    model, x = TwoBlocks().eval(), torch.randn(5, 4)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["up", "down"])
    params, stack = random_params(delta), random_params(delta, 3)
    expected = delta.apply(params, x), delta.apply_many(stack, x)
    torch._dynamo.reset()
    one = torch.compile(lambda p, x: delta.apply(p, x), fullgraph=True, backend="aot_eager")
    many = torch.compile(lambda p, x: delta.apply_many(p, x, engine="fold"), fullgraph=True, backend="aot_eager")
    assert_close(one(params, x), expected[0])
    assert_close(many(stack, x), expected[1])
    grads = torch.func.grad(lambda p: delta.apply(p, x).square().sum())(params)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    one(leaves, x).square().sum().backward()
    for key, leaf in leaves.items():
        if key not in delta.constants:
            assert leaf.grad is not None
            assert_close(leaf.grad, grads[key], 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_view_trains_under_gradient_checkpointing(reentrant: bool) -> None:
    architecture = ZOO["bert"]
    model, inputs = architecture.build(), architecture.inputs(3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3)
    params = random_params(delta)
    expected = torch.func.grad(lambda p: logits(delta.apply(p, **inputs)).square().sum())(params)
    view: Any = delta.bind(params)
    for module in view.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    # The reentrant kind needs an input that requires grad.
    view.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    view.train()
    for _ in range(2):
        view.zero_grad()
        logits(view(**inputs)).square().sum().backward()
        for key, leaf in view.named_parameters():
            if key in expected:
                assert leaf.grad is not None
                assert_close(leaf.grad, expected[key], 1e-4)


class StopsHalfWay(TwoBlocks):
    """Raises between the two ends of a span when it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if StopsHalfWay.fails:
            self.blocks[0]["up"](x + 1)
            raise ZeroDivisionError("the model's own error")
        return super().forward(x)


def test_a_call_that_fails_half_way_leaves_nothing_behind() -> None:
    model, x = StopsHalfWay().eval(), torch.randn(5, 4)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["up", "down"])
    params = random_params(delta)
    expected, view = delta.apply(params, x), delta.bind(params)
    assert_close(view(x), expected)
    try:
        StopsHalfWay.fails = True
        for call in (view, lambda x: delta.apply(params, x)):
            with pytest.raises(ZeroDivisionError):
                call(x)
    finally:
        StopsHalfWay.fails = False
    assert_close(view(x), expected)
    assert torch.equal(delta.apply(params, x), expected)


def test_saved_under_where_it_begins(tmp_path: Path) -> None:
    model, x = TwoBlocks().eval(), torch.randn(5, 4)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["up", "down"])
    assert all(".up.parallel_adapter." in key for key in delta.names)
    stack = random_params(delta, 3)
    delta.save_finetuned(stack, tmp_path / "run")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=model)
    assert torch.equal(again.apply_many(loaded, x), delta.apply_many(stack, x))
    double = fd.tree.map(torch.Tensor.double, fd.take(stack, 0))
    model.double()
    assert delta.refresh().apply(double, x.double()).dtype == torch.float64


def test_measured_widths_survive_a_refresh() -> None:
    architecture = ZOO["llama"]
    model, inputs = architecture.build(), architecture.inputs(2)
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, modified_modules=["self_attn"], example=inputs)
    params = random_params(delta)
    expected = logits(delta.apply(params, **inputs))
    model.double().float()
    assert_close(logits(delta.refresh().apply(params, **inputs)), expected)


def test_left_out_with_either_end() -> None:
    for path in ("blocks.0", "blocks.0.up", "blocks.0.down"):
        delta = fd.ParallelAdapterModel(TwoBlocks(), modified_modules=["up", "down"], exclude_modules=[path])
        assert delta.sites == ("blocks.1.up",)
    with raises_saying(fd.errors.MatchError, "exclude_modules", "one end of every span"):
        fd.ParallelAdapterModel(
            TwoBlocks(), modified_modules=["up", "down"], exclude_modules=["blocks.0", "blocks.1.up"]
        )


def test_ends_that_do_not_pair_are_named() -> None:
    def build(*names: str, model: nn.Module | None = None, **fields: Any) -> fd.DeltaModel:
        return fd.ParallelAdapterModel(model or TwoBlocks(), modified_modules=names, **fields)

    with raises_saying(fd.errors.ConfigError, "['up', 'down', 'mid'] has 3 names", "pairs", "['up', 'up']"):
        build("up", "down", "mid")
    with raises_saying(fd.errors.MatchError, "ends at blocks.1.down has no entry", "blocks.0.up", "exclude_modules"):
        build("0.up", "down")
    with raises_saying(fd.errors.MatchError, "begins at blocks.1.up has no exit", "blocks.0.down"):
        build("up", "0.down")
    with raises_saying(fd.errors.MatchError, "begins at blocks.0.up could end at blocks.0.mid or blocks.0.down"):
        build("up", r"[r](mid|down)")
    with raises_saying(fd.errors.MatchError, "begin at blocks.0.up twice", "blocks.0.mid", "blocks.0.down", "name="):
        build("up", "mid", "up", "down")
    with raises_saying(fd.errors.MatchError, "'pu' matches no module", "up"):
        build("pu", "down")
    bert = ZOO["bert"].build()
    with raises_saying(
        fd.errors.MatchError, "begins at bert.encoder.layer.0.intermediate.dense could end at", "output.dense"
    ):
        build("intermediate.dense", "output.dense", model=bert)  # attention.output.dense too
    with raises_saying(
        fd.errors.MatchError, "could begin at", "layer.0.attention.self.query", "layer.0.intermediate.dense"
    ):
        build(r"[r](query|intermediate\.dense)", r"[r]layer\.\d+\.output\.dense", model=bert)
    with raises_saying(fd.errors.MatchError, "cannot act at conv1", "stride is (2, 2)"):
        build("conv1", model=ZOO["conv2d"].build())
    with raises_saying(fd.errors.MatchError, "from depthwise (Conv2d) to hidden (Linear)", "axis 1", "axis -1"):
        build("depthwise", "hidden", model=ZOO["conv2d"].build())
    for names in (["tokens"], ["tokens", "project"]):
        with raises_saying(fd.errors.MatchError, "cannot act at tokens", "token ids"):
            build(*names, model=ZOO["embedding"].build())
    with raises_saying(fd.errors.MatchError, "what enters bert.embeddings", "without a tensor of features"):
        build("bert.embeddings", model=bert)
    with raises_saying(fd.errors.MatchError, "self_attn.out_proj is read by the module above"):
        build("linear1", "self_attn.out_proj", model=ZOO["torch_transformer"].build())
    with raises_saying(fd.errors.ConfigError, "scaled='big'", "a number"):
        fd.ParallelAdapterConfig(scaled="big")
    delta = build("up", "down")
    with raises_saying(fd.errors.MergeError, "parallel_adapter at blocks.0.down cannot be merged", "non-linear"):
        delta.merge(delta.init(0))


@pytest.mark.parametrize("call", ["apply", "apply_many", "bind"])
def test_ends_in_the_wrong_order_are_told_at_the_first_call(call: str) -> None:
    delta = fd.ParallelAdapterModel(TwoBlocks().eval(), modified_modules=["down", "up"])
    x = torch.randn(5, 4)
    with raises_saying(fd.errors.MatchError, "blocks.0.up was called before blocks.0.down"):
        {
            "apply": lambda: delta.apply(delta.init(0), x),
            "apply_many": lambda: delta.apply_many(delta.init(0, n=2), x),
            "bind": lambda: delta.bind(delta.init(0))(x),
        }[call]()


class EntersTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + self.a(-x)))


def test_what_a_span_cannot_mean_is_told() -> None:
    x = torch.randn(5, 4)

    def call(model: nn.Module, x: Tensor, *names: str) -> Tensor:
        delta = fd.ParallelAdapterModel(model.eval(), modified_modules=names)
        with torch.no_grad():
            return delta.apply(delta.init(0), x)

    with raises_saying(fd.errors.FuncdeltaError, "a was called twice before b was called once"):
        call(EntersTwice(), x, "a", "b")
    in_place = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    with raises_saying(fd.errors.FuncdeltaError, "at 1 was changed in place before the span ended at 2"):
        fd.DeltaModel(in_place, fd.ParallelAdapterConfig(modified_modules=["1", "2"]), example=(x,))
        delta = fd.ParallelAdapterModel(in_place.eval(), modified_modules=["1", "2"], example=(x,))
        with torch.no_grad():
            delta.apply(delta.init(0), x)
    pooled = nn.Sequential(nn.Linear(4, 4), nn.AdaptiveAvgPool1d(4), nn.Flatten(1), nn.Linear(20, 3))
    with raises_saying(
        fd.errors.MatchError, "from 0 to 3", "(2, 5, 4)", "(2, 5, 3)", "output (2, 3)", "positions stay"
    ):
        call(pooled, torch.randn(2, 5, 4), "0", "3")


def test_a_span_is_acted_on_by_after_alone() -> None:
    functions: dict[str, Any] = {
        "init": lambda self, site, rng: {"w": torch.zeros(())},
        "before": lambda self, site, p, x: x,
        "spans": lambda self, names: ((names[0], names[1]),),
    }
    own = dataclass(frozen=True)(type("Own", (fd.BaseDeltaConfig,), functions))
    with raises_saying(fd.errors.ConfigError, "Own gives spans", "after"):
        fd.DeltaModel(TwoBlocks(), own(modified_modules=["up", "down"]))


class ReadsInner(nn.Module):
    """A block that reads the weight of a layer which it never calls, around one that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.inner = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.read.weight.T)


def test_a_span_into_a_module_that_runs_once_per_member() -> None:
    """The block runs once per member for its trained weight; with one end in it the members cannot be folded."""
    model, x = nn.Sequential(nn.Linear(4, 4), ReadsInner()).eval(), torch.randn(5, 4)
    for names, folds in ((["0", "1.inner"], False), (["0", "1"], True), (["1.inner", "1.inner"], True)):
        config = fd.ParallelAdapterConfig(
            bottleneck_dim=2, modified_modules=names, unfrozen_modules=("deltas", "read.weight")
        )
        delta = fd.DeltaModel(model, config, example=(x,))
        stack = random_params(delta, 3)
        expected = assert_engines_agree(delta, stack, x, engines=("loop", "vmap", "auto", *(["fold"] if folds else [])))
        if not folds:
            with raises_saying(fd.errors.FoldError, "1 runs once per member", "from 0 to 1.inner", "engine="):
                delta.apply_many(stack, x, engine="fold")
        assert_close(delta.bind(fd.take(stack, 1))(x), expected[1])
