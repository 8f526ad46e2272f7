"""Fold learns where the batch is: in hidden values, in outputs, in neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from handmade import ENGINES, MLP, Block, assert_close, assert_engines_agree, logits, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model.eval(), lora_r=2, modified_modules=list(names), **fields)


# -- where the rows are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "torch_transformer"])
def test_lengths_that_n_divides_are_not_taken_for_rows(name: str) -> None:
    """The zoo's sequences are 6 long."""
    architecture = ZOO[name]
    delta = lora(architecture.build(), architecture.default_target)
    with torch.no_grad():
        for n in (2, 3, 6):
            for b in (1, 2, 5):
                inputs, stack = architecture.inputs(b), random_params(delta, n)
                assert_engines_agree(delta, stack, engines=("fold",), pick=architecture.output, **inputs)


def test_a_layout_serves_other_sizes() -> None:
    delta = lora(ZOO["bert"].build(), "query")
    stack = random_params(delta, 3)
    for length, rows in ((4, 3), (1, 3), (7, 1)):
        tokens = torch.randint(4, 60, (rows, length))
        for inputs in ({"attention_mask": torch.ones_like(tokens)}, {}):
            assert_engines_agree(delta, stack, engines=("fold",), pick=logits, input_ids=tokens, **inputs)


@pytest.mark.parametrize(("n", "b"), [(1, 1), (1, 3), (3, 1)])
def test_one_member_or_one_row(n: int, b: int) -> None:
    delta = lora(MLP(), "a")
    assert_engines_agree(delta, random_params(delta, n), torch.randn(b, 4))


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_no_rows(engine: str) -> None:
    delta = lora(MLP(), "a")
    assert delta.apply_many(random_params(delta, 3), torch.randn(0, 4), engine=engine).shape == (3, 0, 3)


class TokenRows(nn.Module):
    """Its middle layer sees (b s, 8), so that rows are not its leading axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        return self.middle(self.first(x).reshape(b * s, 8)).reshape(b, s, 8)


@pytest.mark.parametrize("trained", [(), ("middle",)])
def test_sites_that_see_tokens_as_rows(trained: tuple[str, ...]) -> None:
    delta = lora(TokenRows(), "first", "middle", unfrozen_modules=["deltas", *trained])
    assert_engines_agree(delta, random_params(delta, 3), torch.randn(5, 6, 4))


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("n", [2, 3])
def test_what_mixes_rows_in_a_sequence_first_model_runs_once_per_member(n: int) -> None:
    """Without batch_dim=1 the first axis counts rows, over which its attention goes."""
    delta = lora(encoder(batch_first=False), "linear1")
    inputs, stack = torch.randn(6, 4, 8), random_params(delta, n)
    assert_engines_agree(delta, stack, inputs, engines=("fold", "auto"))
    assert list(delta.explain(stack, inputs).once_per_member) == ["layers.0.self_attn"]


def test_a_sequence_first_model_folds_with_its_batch_dim() -> None:
    delta = lora(encoder(batch_first=False), "linear1", batch_dim=1)
    stack, inputs = random_params(delta, 3), torch.randn(6, 4, 8)
    assert_engines_agree(delta, stack, inputs)
    each = torch.randn(3, 6, 4, 8)
    expected = torch.stack([delta.apply(fd.take(stack, i), each[i]) for i in range(3)])
    for engine in ENGINES:
        assert_close(delta.apply_many(stack, each, in_dims=0, engine=engine), expected)
    routed = delta.apply_rows(stack, [2, 0, -1, 1], inputs)
    assert_close(routed[:, :1], delta.apply(fd.take(stack, 2), inputs[:, :1]))
    assert_close(routed[:, 2:3], delta.backbone(inputs[:, 2:3]))


class Recurrent(nn.Module):
    """Turns (b, s, 4) around, so that two of its sites are sequence-first and two are not."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 8)
        self.recurrent = nn.GRU(8, 8)
        self.inside = nn.Linear(8, 8)
        self.after = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.before(x).transpose(0, 1))
        return self.after(self.inside(hidden).transpose(0, 1))


def test_sites_may_hold_the_batch_in_different_axes() -> None:
    inputs = torch.randn(6, 6, 4)
    delta = lora(Recurrent(), "before", "inside", "after")
    assert_engines_agree(delta, random_params(delta, 3), inputs, engines=("fold", "auto"))
    tuples = fd.AdapterModel(Recurrent().eval(), modified_modules=["recurrent"], example=(inputs,))
    assert_engines_agree(tuples, random_params(tuples, 3), inputs, engines=("fold", "auto"))


def test_layers_that_torch_cannot_map_run_in_turn() -> None:
    """A trained GRU differs by member, and torch has no batching rule for it."""
    delta = lora(Recurrent(), "after", unfrozen_modules=["deltas", "recurrent"])
    stack, inputs = random_params(delta, 2), torch.randn(5, 6, 4)
    assert_engines_agree(delta, stack, inputs, engines=("fold", "auto"))
    assert "torch.vmap cannot map it" in delta.explain(stack, inputs).once_per_member["recurrent"]


# -- sites and outputs without rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [fd.LoraModel, fd.AdapterModel])
def test_positions_are_a_site_that_all_rows_share(kind: type[fd.DeltaModel]) -> None:
    delta = kind(ZOO["gpt2"].build(), modified_modules=["wpe"])
    inputs = ZOO["gpt2"].inputs(6)
    assert_engines_agree(delta, random_params(delta, 3), pick=logits, **inputs)
    stack = random_params(delta, 3)
    routed = delta.apply_rows(stack, [0, 1, -1, 2, 0, 1], **inputs).logits
    row = {key: value[1:2] for key, value in inputs.items()}
    assert_close(routed[1:2], delta.apply(fd.take(stack, 1), **row).logits)


def test_a_bias_table_without_rows_is_right_or_refused() -> None:
    """T5 adds (1, heads, s, s) made from the table at its first layer only."""
    delta = lora(ZOO["t5"].build(), "relative_attention_bias")
    stack, inputs = random_params(delta, 3), ZOO["t5"].inputs(4)
    assert_engines_agree(delta, stack, engines=("loop", "vmap", "auto"), pick=logits, **inputs)
    try:
        assert_engines_agree(delta, stack, engines=("fold",), pick=logits, **inputs)
    except fd.errors.FoldError as error:
        assert "relative_attention_bias" in str(error)  # noqa: PT017  (either outcome is right)


class Contrast(nn.Module):
    """Logits (b, b) as CLIP's: both axes grow with the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 4)
        self.image = nn.Linear(4, 4)

    def forward(self, texts: Tensor, images: Tensor) -> dict[str, Tensor]:
        text, image = self.text(texts), self.image(images)
        return {"text": text, "logits_per_text": text @ image.T}


def test_an_output_with_two_growing_axes_is_refused_by_name() -> None:
    delta = lora(Contrast(), "text")
    stack, inputs = random_params(delta, 3), (torch.randn(4, 4), torch.randn(4, 4))
    with raises_saying(fd.errors.FoldError, "logits_per_text", "rows", "engine="):
        delta.apply_many(stack, *inputs, engine="fold")
    rows = delta.apply_rows(stack, [0, 1, 2, 0], *inputs)["logits_per_text"]
    alone = [delta.apply(fd.take(stack, m), *(x[i : i + 1] for x in inputs)) for i, m in enumerate([0, 1, 2, 0])]
    assert_close(rows, torch.cat([output["logits_per_text"] for output in alone]))
    assert_engines_agree(
        delta, stack, *inputs, engines=("loop", "vmap", "auto"), pick=lambda output: output["logits_per_text"]
    )


class Point(NamedTuple):
    """A tuple with names, as some models return."""

    y: Tensor
    label: str


class Everything(nn.Module):
    """Returns tensors among things that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {
            "y": y,
            "none": None,
            "number": 1.5,
            "text": "yes",
            "flag": True,
            "nested": [y.mean(-1), None, (2, "a")],
            "named": Point(y, "p"),
            "table": torch.eye(2),
        }


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_is_no_tensor_passes_through(engine: str, chunk_size: int | None) -> None:
    delta = lora(Everything(), "layer")
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    output = delta.apply_many(stack, x, engine=engine, chunk_size=chunk_size)
    expected = delta.apply(fd.take(stack, 2), x)
    assert list(output) == list(expected)
    assert (output["none"], output["number"], output["text"], output["flag"]) == (None, 1.5, "yes", True)
    assert output["nested"][1:] == [None, (2, "a")]
    assert isinstance(output["named"], Point)
    assert output["named"].label == "p"
    assert_close(output["named"].y[2], expected["y"])
    assert_close(output["nested"][0][2], expected["nested"][0])
    assert output["table"].shape == (3, 2, 2)
    assert torch.equal(output["table"][1], torch.eye(2))


def test_what_is_no_tensor_passes_through_rows() -> None:
    delta = lora(Everything(), "layer")
    stack, x = random_params(delta, 3), torch.randn(4, 4)
    output = delta.apply_rows(stack, [0, -1, 2, 1], x)
    assert_close(output["y"][1], delta.backbone(x)["y"][1])
    assert_close(output["y"][2], delta.apply(fd.take(stack, 2), x)["y"][2])
    assert (output["none"], output["text"]) == (None, "yes")


@dataclass
class Record:
    """What torch's pytree takes for a leaf."""

    y: Tensor
    label: str


class Records(nn.Linear):
    """A linear layer that wraps what it gives, and unwraps what it is given: (b, 4) to (b, 4)."""

    def forward(self, x: Any) -> Any:
        return Record(super().forward(x.y if isinstance(x, Record) else x), "p")


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_tensors_in_a_dataclass_are_split_by_member(engine: str) -> None:
    delta = lora(nn.Sequential(Block(), Records(4, 4)), "0.inner")
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    with torch.no_grad():
        alone = torch.stack([delta.apply(fd.take(stack, i), x).y for i in range(3)])
        found = delta.apply_many(stack, x, engine=engine)
        assert isinstance(found, Record)
        assert_close(found.y, alone)
        assert delta.apply_rows(stack, [0, -1, 2, 1, 0], x).y.shape == (5, 4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_labels_under_fold_name_the_loss_to_use(name: str) -> None:
    delta = lora(ZOO[name].build(), ZOO[name].default_target)
    inputs = ZOO[name].inputs(4)
    labels = torch.tensor([0, 1, 2, 0]) if name == "bert" else inputs["input_ids"]
    stack = random_params(delta, 3)
    with raises_saying(fd.errors.FoldError, "loss", "labels", "torch.vmap(F.cross_entropy)", "engine="):
        delta.apply_many(stack, **inputs, labels=labels, engine="fold")
    assert_engines_agree(
        delta, stack, engines=("loop", "vmap", "auto"), pick=lambda output: output.loss, **inputs, labels=labels
    )


def test_batch_norm_that_refuses_a_single_row_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    delta = lora(model, "0").mode(train=True)
    stack, x = random_params(delta, 3), torch.randn(5, 4)
    assert_engines_agree(delta, stack, x, engines=("loop", "vmap", "fold", "auto"))
    assert "native_batch_norm" in delta.explain(stack, x).once_per_member["1"]
    with raises_saying(fd.errors.FoldError, "1 normalises over the batch", "delta.mode(train=False)"):
        delta.apply_many(stack, x[:1], engine="fold")


@pytest.mark.parametrize("own", [False, True], ids=["one batch", "own batches"])
@pytest.mark.parametrize("places", [slice(0, 1), slice(0, 3), slice(6, 9), slice(-3, None)], ids=str)
def test_every_member_of_a_large_batch_is_compared(places: slice, own: bool) -> None:
    """A model that does something else at some places of a batch, if there are many rows."""

    class Crowded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            factors = torch.ones(len(x), 1)
            factors[places] += len(x) > 10
            return self.a(x) * factors

    delta = fd.LoraModel(Crowded(), modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=7), seed=1)
    x, in_dims = (torch.randn(7, 3, 4), 0) if own else (torch.randn(3, 4), None)
    with raises_saying(fd.FoldError, "depends on how many rows there are"):
        delta.apply_many(stack, x, in_dims=in_dims, engine="fold")
    expected = delta.apply_many(stack, x, in_dims=in_dims, engine="loop")
    with pytest.warns(fd.errors.EngineWarning, match="how many rows"):
        assert_close(delta.apply_many(stack, x, in_dims=in_dims), expected)
