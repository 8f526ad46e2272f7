"""funcdelta plan: its counts are those of real tensors and of torch's own counter; its answers and its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import funcdelta as fd
from funcdelta import cli, costs
from funcdelta.costs.sizes import count_backbone, count_member

ROWS, LENGTH, MEMBERS = 2, 24, 3
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)
H100 = costs.DEVICES["h100"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def delta(model: LlamaForCausalLM) -> fd.DeltaModel:
    return fd.LoraModel(model, lora_r=4, modified_modules=["q_proj", "v_proj", "down_proj"])


def nbytes(tree: object) -> int:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))


def test_memory_of_backbone_members_gradients_and_optimiser_is_exact(
    model: LlamaForCausalLM, delta: fd.DeltaModel
) -> None:
    device = dataclasses.replace(H100, weight_bytes=4)
    job = costs.Job(MEMBERS, ROWS, LENGTH)
    memory = costs.training_cost(count_backbone(model, CONFIG), count_member(delta), job, device).memory
    stack = delta.init(0, n=MEMBERS)
    state = fd.optim.adamw(lr=torch.full((MEMBERS,), 1e-3)).init(stack)
    ids = torch.zeros(MEMBERS, ROWS, LENGTH, dtype=torch.long)
    _, grads = fd.value_and_grad(lambda s: delta.apply_many(s, ids, in_dims=0).logits.square().mean((1, 2, 3)))(stack)
    assert memory["backbone"] == nbytes(dict(model.named_parameters()))
    assert memory["members"] == nbytes(stack)
    assert memory["gradients"] == nbytes(grads)
    assert memory["optimiser"] == nbytes(state)


def test_operations_are_those_of_torchs_counter(model: LlamaForCausalLM, delta: fd.DeltaModel) -> None:
    backbone, member = count_backbone(model, CONFIG), count_member(delta)
    job = costs.Job(MEMBERS, ROWS, LENGTH)
    stack = delta.init(0, n=MEMBERS)
    ids = torch.zeros(MEMBERS, ROWS, LENGTH, dtype=torch.long)

    def losses(stack: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = delta.apply_many(stack, ids, in_dims=0, engine="fold").logits
        return torch.vmap(F.cross_entropy)(logits.flatten(1, 2), ids.flatten(1))

    with torch.no_grad():
        losses(stack)  # the first call also probes, once with gradients and once without
    losses(stack)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        losses(stack)
    forward = job.tokens * (
        2 * backbone.linear + 4 * backbone.layers * LENGTH * backbone.attended + 2 * member.multiplied
    )
    # The rotary angles, one product a position and row, are all that the formula leaves out.
    assert forward <= counter.get_total_flops() <= 1.001 * forward
    with FlopCounterMode(display=False) as counter:
        fd.value_and_grad(losses)(stack)
    step = costs.training_cost(backbone, member, job, H100).operations
    # Below the first site nothing is differentiated: less than half of one layer of six, forward and backward.
    assert (1 - 0.5 / backbone.layers) * step <= counter.get_total_flops() <= step


def test_activations_are_near_what_autograd_keeps(model: LlamaForCausalLM, delta: fd.DeltaModel) -> None:
    backbone, member = count_backbone(model, CONFIG), count_member(delta)
    long = 256
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    fused = fd.LoraModel(_with_sdpa(), lora_r=4, modified_modules=["q_proj", "v_proj", "down_proj"])
    stack = {name: leaf.requires_grad_() for name, leaf in fused.init(0, n=MEMBERS).items()}
    ids = torch.zeros(MEMBERS, 1, long, dtype=torch.long)
    fused.apply_many(stack, ids, in_dims=0, engine="fold")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = fused.apply_many(stack, ids, in_dims=0, engine="fold").logits
        torch.vmap(F.cross_entropy)(logits.flatten(1, 2), ids.flatten(1)).sum()
    parameters = {p.untyped_storage().data_ptr() for p in fused.backbone.parameters()}
    found = sum(size for pointer, size in kept.items() if pointer not in parameters)
    device = dataclasses.replace(H100, weight_bytes=4)
    estimate = costs.training_cost(backbone, member, costs.Job(MEMBERS, 1, long), device).memory["activations"]
    assert 0.5 < found / estimate < 1.5


def _with_sdpa() -> LlamaForCausalLM:
    config = LlamaConfig(**CONFIG.to_dict())
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


def test_a_batch_costs_more_only_once_arithmetic_is_the_limit() -> None:
    """Speed-up of n members together over one after the other: near min(n, T* / t), and 1 beyond."""
    backbone, member = costs.from_numbers(layers=32, width=4096, rank=1)
    for tokens, least, most in ((1, 30, 32), (74, 3.2, 4.2), (4096, 1.0, 1.01)):
        together, alone = (
            costs.training_cost(backbone, member, costs.Job(n, 1, tokens), H100).seconds for n in (32, 1)
        )
        assert least <= 32 * alone / together <= most
    assert round(H100.balance) == 295


def test_layouts_follow_memory() -> None:
    small, member = costs.from_numbers(layers=4, width=512)
    job = costs.Job(8, 1, 128)
    assert [one.fits for one in costs.layouts(small, member, job, H100, 4)] == [True] * 4
    large, member = costs.from_numbers(layers=80, width=8192)
    found = {one.layout: one for one in costs.layouts(large, member, job, H100, 8)}
    assert [name for name, one in found.items() if one.fits] == ["both", "backbone sharded"]
    assert found["both"].shards == 2 * found["both"].devices // 8 or found["both"].cost.total <= H100.memory
    one, eight = found["one device"].cost.memory["backbone"], found["backbone sharded"].cost.memory["backbone"]
    assert eight == one / 8 + 2 * one / 80
    few = costs.layouts(small, member, costs.Job(2, rows=4), H100, 8)[-1]
    assert (few.members, few.why_not) == (1, "")
    assert "without work" in costs.layouts(small, member, costs.Job(2, rows=1), H100, 8)[-1].why_not


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", "--backbone", str(tmp_path), "--modules", "q_proj,v_proj,down_proj", "--rank", "4"]
    words += ["--members", "64", "--device", "a100", "--devices", "4"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for word in ("one device", "members sharded", "both", "backbone sharded", "2 x 2", "fits", "optimiser"):
        assert word in printed
    assert "lower bound" not in printed
    assert cli.main([*words, "--decode"]) == 0
    assert "A step of generation is a lower bound" in capsys.readouterr().out
    assert cli.main([*words, "--json", "--decode"]) == 0
    data = json.loads(capsys.readouterr().out)
    delta = fd.LoraModel(LlamaForCausalLM(CONFIG), lora_r=4, modified_modules=["q_proj", "v_proj", "down_proj"])
    numbers = sum(leaf.numel() for name, leaf in delta.init(0).items() if delta.trainable(name))
    assert data["member"]["trained"] == numbers
    assert data["backbone"]["parameters"] == sum(p.numel() for p in delta.backbone.parameters())
    assert [row["layout"] for row in data["layouts"]] == ["one device", "members sharded", "both", "backbone sharded"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a config folder, or --layers and --width, or --parameters"),
        (["--layers", "4"], "give --layers and --width together"),
        (["--parameters", "many"], "argument --parameters: write a positive number such as 7e9, 7B or 80G"),
        (["--parameters", "7B", "--device", "tpu"], "--device tpu: it is none of cpu, a100, h100, h200"),
        (["--backbone", "none"], "none has no config.json"),
        (["--parameters", "7B", "--modules", "q"], "--modules and --delta need --backbone"),
        (["--parameters", "7B", "--devices", "4", "--shards", "3", "--device", "h100"], "3 shards do not divide 4"),
        (["--parameters", "7B", "--efficiency", "2", "--device", "h100"], "write a part of the peak"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("funcdelta plan: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
