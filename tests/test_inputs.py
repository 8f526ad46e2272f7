"""Inputs of many members: whose they are, what is shared, and which member a row is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import ENGINES, MLP, assert_close, assert_engines_agree, logits, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model.eval(), lora_r=2, modified_modules=list(names), **fields)


# -- inputs --------------------------------------------------------------------------------------------------------


def test_inputs_of_each_member_by_name() -> None:
    delta = lora(ZOO["bert"].build(), "query", "value")
    stack, inputs = random_params(delta, 3), ZOO["bert"].inputs(4)
    tokens = torch.stack([ZOO["bert"].inputs(4, seed=i)["input_ids"] for i in range(3)])
    expected = torch.stack(
        [delta.apply(fd.take(stack, i), **{**inputs, "input_ids": tokens[i]}).logits for i in range(3)]
    )
    for engine in (*ENGINES, "auto"):
        for in_dims in ({"input_ids": 0}, {"input_ids": 0, "attention_mask": None}):
            found = delta.apply_many(stack, in_dims=in_dims, engine=engine, **{**inputs, "input_ids": tokens})
            assert_close(found.logits, expected)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "gpt2", "opt", "bloom", "llama", "qwen3", "t5", "bart"]
)
def test_a_mask_of_each_members_own(name: str) -> None:
    architecture = ZOO[name]
    delta = lora(architecture.build(), architecture.default_target)
    stack, inputs = random_params(delta, 3), architecture.inputs(4)
    mask = inputs.pop("attention_mask")
    masks = torch.stack([mask, torch.ones_like(mask), mask.flip(0)])
    expected = torch.stack([delta.apply(fd.take(stack, i), **inputs, attention_mask=masks[i]).logits for i in range(3)])
    for engine in ("fold", "auto", "loop"):
        found = delta.apply_many(stack, in_dims={"attention_mask": 0}, engine=engine, **inputs, attention_mask=masks)
        assert_close(found.logits, expected)
    try:
        delta.apply_many(stack, in_dims={"attention_mask": 0}, engine="vmap", **inputs, attention_mask=masks)
    except fd.EngineError as error:
        assert 'engine="fold"' in str(error)  # noqa: PT017  (newer models may be mapped)


def test_a_single_row_stands_for_all() -> None:
    delta = lora(ZOO["gpt2"].build(), "c_attn")
    stack, inputs = random_params(delta, 3), ZOO["gpt2"].inputs(6, mask=False)
    positions = torch.arange(6)[None]
    assert_engines_agree(delta, stack, pick=logits, **inputs, position_ids=positions)
    each = torch.stack([positions, positions + 1, positions + 2])
    expected = torch.stack([delta.apply(fd.take(stack, i), **inputs, position_ids=each[i]).logits for i in range(3)])
    for engine in ("loop", "fold", "auto"):
        found = delta.apply_many(stack, in_dims={"position_ids": 0}, engine=engine, **inputs, position_ids=each)
        assert_close(found.logits, expected)


class Shifted(nn.Module):
    """Takes its offset first: (1, 4) or (b, 4), then x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, offset: Tensor, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        return self.layer(x) * scale + offset


def test_a_single_row_that_comes_first_and_values_without_rows() -> None:
    delta = lora(Shifted(), "layer")
    stack, x = random_params(delta, 3), torch.randn(6, 4)
    for offset in (torch.randn(1, 4), torch.randn(6, 4)):
        for scale in (2.0, torch.tensor(3.0)):
            assert_engines_agree(delta, stack, offset, x, scale)
            assert_engines_agree(delta, stack, offset, x=x, scale=scale)
    scales = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.stack([delta.apply(fd.take(stack, i), x, x, scales[i]) for i in range(3)])
    for engine in ENGINES:
        try:
            assert_close(delta.apply_many(stack, x, x, scales, in_dims={"scale": 0}, engine=engine), expected)
        except fd.EngineError as error:
            assert "scale" in str(error) or engine == "fold"  # noqa: PT017  (one number a member has no rows to fold)


def test_an_input_without_rows_is_passed_on_when_it_is_named() -> None:
    delta = lora(Table(), "layer")
    stack, x, table = random_params(delta, 3), torch.randn(6, 4), torch.randn(4, 2)
    with raises_saying(fd.ParamsError, "table", "(4, 2)", "6", "in_dims={'table': None}"):
        delta.apply_many(stack, x, table)
    expected = torch.stack([delta.apply(fd.take(stack, i), x, table) for i in range(3)])
    for engine in (*ENGINES, "auto"):
        assert_close(delta.apply_many(stack, x, table, in_dims={"table": None}, engine=engine), expected)


class Table(nn.Module):
    """A layer of x, times a table that has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x) @ table


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_a_table_that_has_as_many_entries_as_there_are_rows(engine: str) -> None:
    delta = lora(Table(), "layer")
    stack, x, table = random_params(delta, 3), torch.randn(4, 4), torch.randn(4, 2)
    assert_engines_agree(delta, stack, x, table, engines=(engine,))
    found = delta.apply_many(stack, x, table, in_dims={"table": None}, engine=engine)
    assert_close(found, delta.apply_many(stack, x, table, engine="loop"))


class OfDicts(nn.Module):
    """Takes one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        return {"out": self.layer(batch["x"]) * batch["weight"][:, None] * scale}


def test_inputs_may_be_dicts() -> None:
    delta = lora(OfDicts(), "layer")
    stack, batch = random_params(delta, 3), {"x": torch.randn(5, 4), "weight": torch.rand(5)}
    assert_engines_agree(delta, stack, batch, pick=lambda output: output["out"])
    assert_engines_agree(delta, stack, batch=batch, scale=2.0, pick=lambda output: output["out"])
    each = {key: torch.stack([value, value + 1, value + 2]) for key, value in batch.items()}
    expected = delta.apply(fd.take(stack, 1), {key: value[1] for key, value in each.items()})["out"]
    for in_dims in (0, {"batch": 0}):
        for engine in ENGINES:
            assert_close(delta.apply_many(stack, each, in_dims=in_dims, engine=engine)["out"][1], expected)
    assert_close(delta.apply_rows(stack, [0, 1, 2, -1, 0], batch)["out"][3], delta.backbone(batch)["out"][3])


def test_what_a_tokenizer_returns_is_an_input() -> None:
    from transformers import BatchEncoding

    delta = lora(ZOO["bert"].build(), "query")
    encoding = BatchEncoding(ZOO["bert"].inputs(4))
    assert_engines_agree(delta, random_params(delta, 3), pick=logits, **encoding)
    whole = lora(OfDicts(), "layer")
    batch = BatchEncoding({"x": torch.randn(5, 4), "weight": torch.rand(5)})
    assert_engines_agree(whole, random_params(whole, 3), batch, pick=lambda output: output["out"])


class Names(nn.Module):
    """Its inputs are called like the arguments of apply, apply_many and apply_rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, params: Tensor, **others: Tensor) -> Tensor:
        return self.layer(params) + sum(others.values())


def test_inputs_may_be_called_like_arguments_of_ours() -> None:
    delta = lora(Names(), "layer")
    stack, params = random_params(delta, 3), random_params(delta)
    names = ("params", "stack", "index", "engine", "chunk_size", "in_dims")
    inputs = {name: torch.randn(5, 4) for name in names}
    expected = delta.apply(params, inputs=inputs)
    assert_close(delta.apply(params, **inputs), expected)
    assert_close(delta.apply({}, **inputs), delta.backbone(**inputs))
    many = delta.apply_many(stack, inputs=inputs)
    rows = delta.apply_rows(stack, [1] * 5, inputs=inputs)
    free = {name: inputs[name] for name in ("params", "stack", "index")}
    for i in range(3):
        assert_close(many[i], delta.apply(fd.take(stack, i), inputs=inputs))
        assert_close(delta.apply_many(stack, **free)[i], delta.apply(fd.take(stack, i), **free))
    assert_close(rows, many[1])
    assert_close(delta.apply_rows(stack, [1] * 5, **free), delta.apply_many(stack, **free)[1])


def test_rows_in_any_order() -> None:
    delta = lora(ZOO["bert"].build(), "query", unfrozen_modules=["deltas", "classifier"])
    stack, inputs, index = random_params(delta, 3), ZOO["bert"].inputs(6), [2, 0, -1, 2, 1, -1]
    for given in (index, tuple(index), torch.tensor(index), torch.tensor(index, dtype=torch.int32)):
        routed = delta.apply_rows(stack, given, **inputs).logits
        for row, member in enumerate(index):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            params = fd.take(stack, member) if member >= 0 else {}
            assert_close(routed[row : row + 1], delta.apply(params, **alone).logits)
    assert_close(delta.apply_rows(stack, [-1] * 6, **inputs).logits, delta.backbone(**inputs).logits)
    bytes_, twice = torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.uint8), fd.cat([stack, stack])
    expected = delta.apply_rows(stack, [0, 1, 0, 1, 1, 1], **inputs).logits
    assert_close(delta.apply_rows(twice, bytes_, **inputs).logits, expected)  # as many as members, and no mask
    assert fd.members(fd.take(twice, bytes_)) == 6
    grads = torch.func.grad(lambda s: delta.apply_rows(s, [*index[:4], 0, 0], **inputs).logits.square().sum())(stack)
    for name in delta.names:
        used = [bool(grad.any()) for grad in grads[name]]
        assert used == ([False] * 3 if name in delta.constants else [True, False, True])


def test_chunks_are_the_whole() -> None:
    delta = lora(MLP(), "a", unfrozen_modules=["deltas", "head"])
    stack, x = random_params(delta, 7), torch.randn(7, 5, 4)
    for engine in (*ENGINES, "auto"):
        whole = delta.apply_many(stack, x, in_dims=0, engine=engine)
        for chunk_size in (1, 3, 7, 100):
            assert_close(delta.apply_many(stack, x, in_dims=0, engine=engine, chunk_size=chunk_size), whole)
