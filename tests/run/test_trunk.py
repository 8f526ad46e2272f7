"""The trunk of members that see one batch: it runs once, on one member's rows, and the numbers stay what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import assert_close, raises_saying, random_params
from subjects import subject
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import funcdelta as fd
from funcdelta.apps import bench

N, B, S = 3, 2, 5
LAYERS = 4
BERT = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT, num_hidden_layers=LAYERS, **options)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**BERT, num_hidden_layers=LAYERS, num_key_value_heads=1)).eval()


def gpt2() -> nn.Module:
    """Picks the last token of every row by the number of rows of its input."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=LAYERS, n_head=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_decoder_layers": LAYERS, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, decoder_start_token_id=0, **sizes)).eval()


def text(rows: int = B, padded: bool = True) -> dict[str, Tensor]:
    tokens = torch.randint(1, 30, (rows, S), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(tokens)
    if padded:
        mask[-1, 3:] = 0
        tokens = tokens * mask
    return {"input_ids": tokens, "attention_mask": mask}


def pair(rows: int = B) -> dict[str, Tensor]:
    return {**text(rows), "decoder_input_ids": text(rows, padded=False)["input_ids"]}


def watched(build: Callable[[], nn.Module], *configs: fd.BaseDeltaConfig) -> tuple[fd.DeltaModel, dict[str, list[int]]]:
    """A delta, and the rows that every module of its copies of the backbone saw in each call since."""
    rows: dict[str, list[int]] = {}

    def prepare(copy: nn.Module) -> None:
        for path, module in copy.named_modules():

            def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                first = next((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), None)
                if first is not None:
                    rows.setdefault(path, []).append(first.shape[0])

            module.register_forward_hook(note)

    return fd.DeltaModel(build(), *configs, prepare=prepare), rows


def lora(*names: str, trained: tuple[str, ...] = (), **fields: Any) -> fd.LoraConfig:
    return fd.LoraConfig(lora_r=2, modified_modules=names, unfrozen_modules=("deltas", *trained), **fields)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], dict[str, Tensor]], list[str], list[str]]] = {
    # what is built, the delta, the inputs, modules that see B rows, modules that see N · B
    "bert": (
        bert,
        lora("3.attention.self.query", "3.attention.self.value"),
        text,
        ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "bert.encoder.layer.3.attention.self.key"],
        ["bert.encoder.layer.3.attention.self.query", "bert.encoder.layer.3", "classifier"],
    ),
    "several sites and a trained head": (
        bert,
        lora("1.output.dense", "3.attention.self.query", trained=("classifier",)),
        text,
        ["bert.encoder.layer.0", "bert.encoder.layer.1.attention"],
        ["bert.encoder.layer.1", "bert.encoder.layer.2", "bert.pooler"],
    ),
    "a trained head alone": (bert, lora("classifier", trained=("classifier",)), text, ["bert"], []),
    "llama": (llama, lora("3.mlp.down_proj"), text, ["model.layers.2", "model.layers.3.self_attn"], ["model.norm"]),
    "gpt2": (gpt2, lora("h.2.mlp.c_fc"), text, ["transformer.h.0", "transformer.h.1"], ["transformer.h.3", "score"]),
    "t5, deltas in the decoder": (
        t5,
        lora("decoder.block.1.layer.0.SelfAttention.q"),
        pair,
        [
            "encoder",
            "decoder.block.0",
            "decoder.block.1.layer.1.EncDecAttention.k",
            "decoder.block.3.layer.1.EncDecAttention.v",
        ],
        ["decoder.block.1", "decoder.block.3.layer.1.EncDecAttention.q"],
    ),
    "bitfit": (
        bert,
        fd.BitFitConfig(modified_modules=["3.output.dense"]),
        text,
        ["bert.encoder.layer.2", "bert.encoder.layer.3.attention"],
        ["bert.encoder.layer.3"],
    ),
    "prefix": (
        llama,
        fd.PrefixConfig(prefix_token_num=2, reparameterize=False, modified_modules=["3.self_attn"]),
        text,
        ["model.layers.2", "model.layers.3.input_layernorm"],
        ["model.layers.3"],
    ),
    "parallel adapter": (
        bert,
        fd.ParallelAdapterConfig(bottleneck_dim=2, modified_modules=["3.intermediate.dense", "[r]3.output.dense"]),
        text,
        ["bert.encoder.layer.2", "bert.encoder.layer.3.attention"],
        ["bert.encoder.layer.3"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trunk_runs_once_and_members_give_what_they_give_alone(case: str) -> None:
    build, config, inputs, shared, folded = CASES[case]
    delta, rows = watched(build, config)
    stack, given = random_params(delta, N), inputs()
    expected = torch.stack([delta.apply(fd.take(stack, i), **given).logits for i in range(N)])
    assert not torch.allclose(expected[0], expected[1])
    assert_close(delta.apply_many(stack, **given, engine="trunk").logits, expected)
    rows.clear()
    assert_close(delta.apply_many(stack, **given).logits, expected)  # engine="auto"
    assert {path: rows[path] for path in shared} == {path: [B] for path in shared}
    assert {path: rows[path] for path in folded} == {path: [N * B] for path in folded}
    rows.clear()
    assert_close(delta.apply_many(stack, **given, engine="fold").logits, expected)
    assert all(B not in rows[path] for path in shared)


@pytest.mark.parametrize("case", ["several sites and a trained head", "t5, deltas in the decoder"])
def test_gradients_are_those_of_a_loop(case: str) -> None:
    build, config, inputs, *_ = CASES[case]
    delta, given = fd.DeltaModel(build(), config), inputs()
    stack = random_params(delta, N)

    def losses(engine: str) -> Any:
        def loss(stack: dict[str, Tensor]) -> Tensor:
            return delta.apply_many(stack, **given, engine=engine).logits.square().flatten(1).sum(1)

        return loss

    expected, slow = fd.value_and_grad(losses("loop"))(stack)
    found, fast = fd.value_and_grad(losses("trunk"))(stack)
    assert_close(found, expected)
    for name in slow:
        assert_close(fast[name], slow[name])
    curvature = torch.func.jvp(torch.func.grad(lambda s: losses("trunk")(s).sum()), (stack,), (stack,))[1]
    straight = torch.func.jvp(torch.func.grad(lambda s: losses("fold")(s).sum()), (stack,), (stack,))[1]
    for name in slow:
        assert_close(curvature[name], straight[name])


def test_inputs_that_require_grad_get_it() -> None:
    delta = fd.DeltaModel(llama(), lora("3.mlp.down_proj"))
    stack, grads = random_params(delta, N), []
    for engine in ("trunk", "loop"):
        embedded = torch.randn(B, S, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        outs = delta.apply_many(stack, inputs_embeds=embedded, engine=engine).logits
        grads.append(torch.autograd.grad(outs.square().sum(), embedded)[0])
    assert_close(*grads)


def test_other_sizes_and_a_mask_that_comes_later() -> None:
    """Transformers leaves out a mask that hides nothing: the first call's blocks then get none."""
    delta, rows = watched(bert, lora("3.attention.self.query"))
    stack = random_params(delta, N)
    for given in (text(3, padded=False), text(3), text(1), text(5), {"input_ids": torch.arange(1, 9).view(4, 2)}):
        expected = torch.stack([delta.apply(fd.take(stack, i), **given).logits for i in range(N)])
        rows.clear()
        assert_close(delta.apply_many(stack, **given, engine="trunk", chunk_size=2).logits, expected)
        b = len(given["input_ids"])
        if b > 1:
            assert rows["bert.encoder.layer.0"][-1] == b


def test_states_and_attentions_of_shared_blocks_are_every_members() -> None:
    delta = fd.DeltaModel(bert(attn_implementation="eager"), lora("3.attention.self.query"))
    stack, wanted = random_params(delta, N), {"output_hidden_states": True, "output_attentions": True}
    for _ in range(2):
        loop, trunk = (delta.apply_many(stack, **text(), **wanted, engine=engine) for engine in ("loop", "trunk"))
        assert len(trunk.hidden_states) == LAYERS + 1
        for found, expected in zip(
            (*trunk.hidden_states, *trunk.attentions), (*loop.hidden_states, *loop.attentions), strict=True
        ):
            assert_close(found, expected)


def test_dropout_of_a_shared_block_is_drawn_for_each_members_rows() -> None:
    delta, rows = watched(bert, lora("3.attention.self.query"))
    train = delta.mode(train=True)
    stack = random_params(delta, N)
    train.apply_many(stack, **text(), engine="trunk")
    rows.clear()
    train.apply_many(stack, **text(), engine="trunk")
    assert rows["bert.embeddings.word_embeddings"] == [B]
    # Behind the first dropout every member has rows of its own.
    assert rows["bert.embeddings"] == rows["bert.encoder.layer.0.attention.self.query"] == [N * B]


def test_a_backbone_that_checkpoints_is_folded() -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.activation_checkpointing_enable({"use_reentrant": False})
    delta = fd.DeltaModel(model, lora("3.attention.self.query")).mode(train=True)
    stack = {name: leaf.requires_grad_() for name, leaf in random_params(delta, N).items()}
    with raises_saying(fd.errors.FoldError, 'engine="trunk"', "checkpoints its activations", 'Use engine="fold"'):
        delta.apply_many(stack, **text(), engine="trunk")
    grads = [
        torch.autograd.grad(delta.apply_many(stack, **text(), engine=engine).logits.square().sum(), leaf)[0]
        for engine in ("auto", "loop")
        for leaf in [stack["bert.encoder.layer.3.attention.self.query.lora.lora_A"]]
    ]
    assert_close(*grads)
    with torch.no_grad():  # nothing runs again
        assert_close(*(delta.apply_many(stack, **text(), engine=engine).logits for engine in ("trunk", "loop")))


class Odd(nn.Module):
    """Its first layer ends in something that a shared call would change."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        if self.habit == "in place":
            before = hidden
            hidden = self.act(hidden) + before  # twice the same tensor
        return self.head(hidden)


def test_a_module_that_writes_its_input_is_not_shared() -> None:
    delta = fd.LoraModel(Odd("in place"), lora_r=2, modified_modules=["head"])
    stack, x = random_params(delta, N), torch.randn(B, 4)
    assert_close(delta.apply_many(stack, x, engine="trunk"), delta.apply_many(stack, x, engine="loop"))
    (trunk,) = delta.program.trunks.values()
    assert list(trunk.modules) == ["trunk"]


def test_where_nothing_can_be_shared() -> None:
    delta = fd.LoraModel(Odd(""), lora_r=2, modified_modules=["trunk.0"])
    stack, x = random_params(delta, N), torch.randn(B, 4)
    with raises_saying(fd.errors.FoldError, 'engine="trunk"', "in common", 'Use engine="fold"'):
        delta.apply_many(stack, x, engine="trunk")
    assert_close(delta.apply_many(stack, x), delta.apply_many(stack, x, engine="loop"))
    late = fd.LoraModel(Odd(""), lora_r=2, modified_modules=["head"])
    each = torch.randn(N, B, 4)
    stack = random_params(late, N)
    with raises_saying(fd.errors.FoldError, "members share no work", "its own x", 'engine="fold"'):
        late.apply_many(stack, each, in_dims=0, engine="trunk")
    assert_close(late.apply_many(stack, each, in_dims=0), late.apply_many(stack, each, in_dims=0, engine="loop"))


class Remembers(nn.Module):
    """Counts its calls, and answers by their number; the rows that it is asked about decide how often it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 if bool((x > -100).all()) else 2):
            x = self.layer(x)
        return self.head(x)


def test_a_model_whose_calls_depend_on_the_rows_is_folded_then() -> None:
    delta = fd.LoraModel(Remembers(), lora_r=2, modified_modules=["head"])
    stack, usual = random_params(delta, N), torch.randn(B, 4)
    assert_close(delta.apply_many(stack, usual), delta.apply_many(stack, usual, engine="loop"))
    odd = usual - 200
    with raises_saying(fd.errors.FoldError, "rows of several members", "engine="):
        delta.apply_many(stack, odd, engine="trunk")
    assert_close(delta.apply_many(stack, odd), delta.apply_many(stack, odd, engine="loop"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "mixtral_grouped", "conv2d", "torch_transformer"])
@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit"])
def test_law_4_holds_for_the_trunk(method: str, name: str) -> None:
    """With the last of the sites alone, so that there is a trunk."""
    s = subject(method, name)
    example = s.inputs()
    config = s.delta.configs[0].replace(modified_modules=(s.delta.sites[-1],), unfrozen_modules=("deltas",))
    delta = fd.DeltaModel(s.model, config, example=example.get("args", example))
    stack = random_params(delta, N)
    with torch.no_grad():
        loop, auto = (
            s.architecture.call(lambda *a, e=engine, **k: delta.apply_many(stack, *a, engine=e, **k), example)
            for engine in ("loop", "auto")
        )
    assert_close(auto, loop)


def test_the_cost_curve_is_measured_and_written(tmp_path: Any) -> None:
    file = tmp_path / "curve.json"
    arguments = ["--table", "trunk", "--model", "tiny", "--repeats", "1", "--attempts", "1", "--json", str(file)]
    assert bench.main(arguments) == 0
    tables = json.loads(file.read_text())["tables"]
    assert [table["title"].rpartition(", ")[2] for table in tables] == [
        "the last 1 of 2 layers",
        "the last 2 of 2 layers",
    ]
    assert [row["label"] for row in tables[0]["rows"]][1:] == ["trunk", "fold", "vmap", "(1 - q) + q n"]
    assert tables[0]["rows"][-1]["to_yardstick"]["median"] == 16.5
