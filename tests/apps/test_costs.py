"""funcdelta plan: each figure is that of real tensors in a real run; its answers and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

import funcdelta as fd
from funcdelta.apps import cli
from funcdelta.apps.costs import backbone_of, measure
from funcdelta.apps.train.options import parse_fields
from funcdelta.errors import ConfigError

ROWS, LENGTH, MEMBERS = 2, 24, 3
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)
BACKBONES = {
    "llama": LLAMA,
    "bert": BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]),
    "t5": T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        architectures=["T5ForConditionalGeneration"],
    ),
}
METHODS = {
    "lora": ["lora_r=4"],
    "adapter": ["bottleneck_dim=4"],
    "compacter": ["reduction_factor=8"],
    "prefix": ["mid_dim=16", "embed_dim=16"],
    "soft_prompt": ["soft_token_num=5"],
    "bitfit": [],
}


def pair(folder: Path, backbone: str, method: str, attention: str) -> tuple[fd.DeltaModel, fd.DeltaModel]:
    """The same delta on meta and on the CPU."""
    config = BACKBONES[backbone]
    config.save_pretrained(folder)
    kind = fd.AutoDeltaConfig.for_type(method)
    chosen = kind(**parse_fields(kind, METHODS[method]))
    empty: Any = backbone_of(str(folder))
    empty.set_attn_implementation(attention)
    real = type(empty)(empty.config).eval()
    return fd.DeltaModel(empty, chosen), fd.DeltaModel(real, chosen)


def loss_of(delta: fd.DeltaModel, stack: dict[str, Tensor], n: int) -> Tensor:
    ids = torch.zeros(n, ROWS, LENGTH, dtype=torch.long)
    config: Any = delta.backbone.config
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    logits = delta.apply_many(stack, inputs=inputs, in_dims=0, engine="fold")[0]
    return torch.vmap(F.cross_entropy)(
        logits.flatten(1, -2), torch.zeros(n, logits[0, ..., 0].numel(), dtype=torch.long)
    )


def nbytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_figures_are_those_of_a_real_run(tmp_path: Path, backbone: str, method: str) -> None:
    empty, delta = pair(tmp_path, backbone, method, "eager")
    cost = measure(empty, MEMBERS, ROWS, LENGTH)
    stack = delta.init(0, n=MEMBERS)
    state = fd.optim.adamw(lr=torch.full((MEMBERS,), 1e-3)).init(stack)
    _, grads = fd.value_and_grad(lambda stack: loss_of(delta, stack, MEMBERS))(stack)

    assert cost.parameters == sum(p.numel() for p in delta.backbone.parameters())
    assert cost.backbone == nbytes([*delta.backbone.parameters(), *delta.backbone.buffers()])
    assert cost.trained == sum(leaf[0].numel() for name, leaf in stack.items() if delta.trainable(name))
    assert cost.members == nbytes(stack)
    assert cost.gradients == nbytes(grads)
    assert cost.optimiser == nbytes(state)

    leaves = {name: leaf.requires_grad_() for name, leaf in stack.items()}
    with torch.no_grad():
        loss_of(delta, stack, MEMBERS)  # the first calls also probe, with gradients and without
    loss_of(delta, leaves, MEMBERS)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        loss_of(delta, stack, MEMBERS)
    with FlopCounterMode(display=False) as step:
        loss_of(delta, leaves, MEMBERS).sum().backward()
    assert cost.forward == forward.get_total_flops()
    assert cost.step == step.get_total_flops()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_activations_are_what_autograd_keeps(tmp_path: Path, backbone: str, attention: str) -> None:
    empty, delta = pair(tmp_path, backbone, "lora", attention)
    leaves = {name: leaf.requires_grad_() for name, leaf in delta.init(0, n=MEMBERS).items()}
    loss_of(delta, leaves, MEMBERS)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(delta, leaves, MEMBERS)
    given = [*delta.backbone.parameters(), *delta.backbone.buffers(), *leaves.values()]
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    found = sum(size for pointer, size in kept.items() if pointer not in there)
    assert loss.requires_grad
    # What all rows share, such as the angles of positions, is there once and counted for each member.
    assert measure(empty, MEMBERS, ROWS, LENGTH).activations == pytest.approx(found, rel=0.15)


def test_fused_attention_keeps_no_scores_and_a_chunk_less_than_all(tmp_path: Path) -> None:
    fused, eager = (measure(pair(tmp_path, "llama", "lora", kind)[0], length=512) for kind in ("sdpa", "eager"))
    scores = 6 * 4 * 512 * 512 * 4
    assert eager.activations - fused.activations > 0.95 * scores
    assert (fused.forward, fused.members) == (eager.forward, eager.members)
    empty = pair(tmp_path, "llama", "lora", "sdpa")[0]
    all_at_once, chunked = measure(empty, 8), measure(empty, 8, chunk=2)
    assert all_at_once.activations == 4 * chunked.activations
    assert all_at_once.step == chunked.step == 8 * fused.step


def test_weights_of_half_the_bytes(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    whole, half = (
        measure(fd.LoraModel(backbone_of(str(tmp_path), dtype), modified_modules=["q_proj"]))
        for dtype in ("float32", "bfloat16")
    )
    assert half.activations < 0.75 * whole.activations
    assert (half.members, half.step) == (whole.members, whole.step)
    assert half.backbone < 0.51 * whole.backbone


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLAMA.save_pretrained(tmp_path)
    words = ["plan", "--backbone", str(tmp_path), "--set", "modified_modules=q_proj,v_proj", "--set", "lora_r=4"]
    words += ["--members", "64", "--chunk", "16"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for word in ("64 x 1 x 512", "gradients", "optimiser", "16 members at a time", "total", "FLOP"):
        assert word in printed
    assert cli.main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    delta = fd.LoraModel(backbone_of(str(tmp_path)), lora_r=4, modified_modules=["q_proj", "v_proj"])
    assert data["cost"] == vars(cost := measure(delta, 64, chunk=16)) | {"total": cost.total}
    assert data["job"] == {"members": 64, "rows": 1, "length": 512, "chunk": 16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --backbone"),
        (["--backbone", "none"], "none has no config.json"),
        (["--backbone", "llama", "--members", "many"], "write a whole number of at least 1, not 'many'"),
        (["--backbone", "llama", "--dtype", "int8"], "--dtype int8: write a dtype of floating-point numbers"),
        (["--backbone", "llama", "--set", "lora_rank=4"], "LoraConfig has no field 'lora_rank'"),
        (["--backbone", "llama", "--delta", "lorra"], "lorra"),
        (["--backbone", "pictures", "--set", "modified_modules=q_proj"], "ViTModel reads pixel_values"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    LLAMA.save_pretrained(tmp_path / "llama")
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(
        tmp_path / "pictures"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("funcdelta plan: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_backbone_with_weights_is_refused(tmp_path: Path) -> None:
    delta = pair(tmp_path, "bert", "lora", "sdpa")[1]
    with pytest.raises(ConfigError, match=r"embeddings\.word_embeddings\.weight is on cpu"):
        measure(delta)
