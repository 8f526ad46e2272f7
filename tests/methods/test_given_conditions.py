"""Conditions that a caller gives, row by row through every engine, view and composition."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from custom_methods import LoreftConfig
from handmade import raises_saying
from told_texts import (
    GATES,
    MASKS,
    OPTIONS,
    GatedConfig,
    SeenConfig,
    bert,
    close,
    gated,
    gpt2,
    llama,
    random_stack,
    row_by_row,
    t5,
    text,
    told,
)
from torch import Tensor

import funcdelta as fd

# -- what a caller gives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_gates_go_by_rows(name: str) -> None:
    makes = {"llama": llama, "bert": bert, "t5": t5}
    sites = {"bert": ("layer.0",), "t5": ("encoder.block.0", "decoder.block.1.layer.1")}
    delta, stack = gated(makes[name], sites.get(name, ("layers.0", "layers.1.mlp")))
    batch = text(MASKS["left"]) | ({"decoder_input_ids": text(None, 3)["input_ids"]} if name == "t5" else {})
    with torch.no_grad():
        expected = [row_by_row(delta, params, batch, GATES) for params in fd.unstack(stack)]
        given: Any = {**batch, "conditions": {"gate": GATES}}
        close(delta.apply(fd.take(stack, 1), **given)[0], expected[1])
        close(delta.apply(fd.take(stack, 1), **batch, inputs={"conditions": {"gate": GATES}})[0], expected[1])
        close(delta.bind(fd.take(stack, 1))(**given)[0], expected[1])
        for engine in ("loop", "fold", "trunk", "vmap", "auto"):
            close(delta.apply_many(stack, **given, engine=engine)[0], torch.stack(expected))
        bare = delta.apply({}, **given)[0]
        routed = torch.stack([expected[2][0], bare[1], expected[0][2], expected[1][3]])
        close(delta.apply_rows(stack, [2, -1, 0, 1], **given)[0], routed)
        close(delta.bind_rows(stack, [2, -1, 0, 1])(**given)[0], routed)
        # Of each member's own; one for all rows; a number.
        scales = torch.tensor([1.0, 2.0, -1.0])
        own: Any = {**batch, "conditions": {"gate": scales[:, None] * GATES}, "in_dims": {"conditions": 0}}
        for engine in ("loop", "fold", "vmap"):
            found = delta.apply_many(stack, **own, engine=engine)[0]
            close(found[2], row_by_row(delta, fd.take(stack, 2), batch, scales[2] * GATES))
            for one in (torch.tensor(0.5), torch.tensor([0.5])):
                found = delta.apply_many(stack, **batch, conditions={"gate": one}, engine=engine)[0]
                close(found[0], row_by_row(delta, fd.take(stack, 0), batch, torch.full((4,), 0.5)))


def test_gates_have_gradients_and_compile() -> None:
    delta, stack = gated(gpt2, ("transformer.h.1",))
    params, ids = fd.take(stack, 0), text(None)["input_ids"]

    def rows(gates: Tensor) -> Tensor:
        return delta.apply(params, input_ids=ids, use_cache=False, conditions={"gate": gates})[0].square().mean((1, 2))

    gradient = torch.func.grad(lambda gates: rows(gates).sum())(GATES)
    for row, slope in enumerate(gradient):
        step = 1e-3 * torch.nn.functional.one_hot(torch.tensor(row), 4)
        torch.testing.assert_close((rows(GATES + step) - rows(GATES - step))[row] / 2e-3, slope, rtol=2e-2, atol=1e-3)
    with torch.no_grad():
        close(torch.compile(rows, backend="eager", fullgraph=True)(GATES), rows(GATES))
        close(torch.vmap(rows)(torch.stack([GATES, 2 * GATES]))[1], rows(2 * GATES))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_gives_every_call_the_gates(name: str, options: dict[str, Any]) -> None:
    sites = ("layers.0", "layers.1.mlp") if name == "llama" else ("encoder.block.0", "decoder.block.1.layer.1")
    delta, stack = gated({"llama": llama, "t5": t5}[name], sites)
    prompt, index = text(MASKS["left"]), [2, 1, 0, 1]
    view = delta.bind_rows(stack, index)
    found = view.generate(**prompt, conditions={"gate": GATES}, **OPTIONS, **options)
    for row, i in enumerate(index):
        own = {key: value[row : row + 1] for key, value in prompt.items()}
        one = delta.bind({key: leaf * GATES[row] for key, leaf in fd.take(stack, i).items()})
        alone = one.generate(**own, conditions={"gate": torch.ones(1)}, **OPTIONS, **options)
        k, length = len(alone), min(alone.shape[1], found.shape[1])
        assert torch.equal(found[row * k : row * k + k, :length], alone[:, :length])
    with raises_saying(fd.errors.ParamsError, "gate", "did not give"):
        view.generate(**prompt, **OPTIONS)  # nothing is left of what another generate was given


def test_threads_that_share_a_view_give_their_own() -> None:
    delta, stack = gated()
    view, prompt = delta.bind_rows(stack, [0, 1, 2, 0]), text(MASKS["left"])
    expected = [view.generate(**prompt, conditions={"gate": c * GATES}, **OPTIONS) for c in (1, 3)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        gates = [c * GATES for c in (1, 3)] * 3
        found = list(pool.map(lambda g: view.generate(**prompt, conditions={"gate": g}, **OPTIONS), gates))
    assert all(torch.equal(one, expected[i % 2]) for i, one in enumerate(found))


# -- together with other methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", [fd.chain, fd.parallel, fd.average, fd.mixture])
def test_compositions_hand_on_what_their_parts_want(compose: Callable[..., fd.BaseDeltaConfig]) -> None:
    torch.manual_seed(0)
    parts = LoreftConfig(), GatedConfig(), fd.LoraConfig(lora_r=2)
    delta = fd.DeltaModel(llama(), compose(*parts, modified_modules=["down_proj"]))
    assert delta.plan.conditions == ("mask", "positions", "lengths", "cached", "gate")
    stack, batch = random_stack(delta), text(MASKS["left"])
    with torch.no_grad():
        alone = [
            delta.apply(p, **{key: value[row : row + 1] for key, value in batch.items()}, conditions={"gate": gate})[0]
            for p in fd.unstack(stack)
            for row, gate in enumerate(GATES)
        ]
        expected = torch.cat(alone).unflatten(0, (3, 4))
        for engine in ("loop", "fold", "vmap"):
            close(delta.apply_many(stack, **batch, conditions={"gate": GATES}, engine=engine)[0], expected)
        routed = delta.apply_rows(stack, [0, 1, 2, 0], **batch, conditions={"gate": GATES})[0]
    close(routed, torch.stack([expected[i, row] for row, i in enumerate([0, 1, 2, 0])]))
    with raises_saying(fd.errors.MergeError, "cannot be merged"):
        delta.merge(fd.take(stack, 0))


def test_packed_members_get_what_each_wants() -> None:
    torch.manual_seed(0)
    model, batch = llama(), text(MASKS["ragged"])
    deltas = [
        fd.DeltaModel(model, LoreftConfig(modified_modules=("layers.0",))),
        fd.DeltaModel(model, LoreftConfig(modified_modules=("layers.1.mlp",), first=2)),
        fd.DeltaModel(model, GatedConfig(modified_modules=("layers.1",))),
        fd.LoraModel(model, modified_modules=["q_proj"]),
    ]
    pairs = [(one, fd.tree.randn_like(one.init(0), seed=4)) for one in deltas]
    delta, stack = fd.pack(pairs)
    with torch.no_grad():
        expected = [
            one.apply(params, **batch, **({"conditions": {"gate": GATES}} if "gate" in one.plan.conditions else {}))[0]
            for one, params in pairs
        ]
        for engine in ("loop", "fold", "vmap", "auto"):
            found = delta.apply_many(stack, **batch, conditions={"gate": GATES}, engine=engine)[0]
            close(found, torch.stack(expected))
        found = delta.apply_rows(stack, [0, 1, 2, 3], **batch, conditions={"gate": GATES})[0]
        close(found, torch.stack([expected[row][row] for row in range(4)]))


def test_the_rows_of_a_prompt_are_a_part_of_the_text() -> None:
    torch.manual_seed(0)
    prompt, seen = fd.SoftPromptConfig(soft_token_num=2), SeenConfig(modified_modules=("h.1",))
    delta, batch = fd.DeltaModel(gpt2(), prompt, seen), text(MASKS["left"])
    found = told(delta, **batch)
    assert found["positions"][1].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert found["lengths"].tolist() == [8, 5, 3, 4]
    SeenConfig.seen.clear()
    delta.bind(delta.init(0)).generate(**batch, max_new_tokens=2, do_sample=False)
    assert [int(one["cached"]) for one in SeenConfig.seen] == [0, 8]
    assert SeenConfig.seen[-1]["positions"].flatten().tolist() == [8, 5, 3, 4]
    both = fd.DeltaModel(delta.backbone, prompt, LoreftConfig(modified_modules=("h.1",)))
    stack = random_stack(both)
    with torch.no_grad():
        expected = torch.stack([both.apply(p, **batch).logits for p in fd.unstack(stack)])
        close(both.apply_many(stack, **batch, engine="fold").logits, expected)


class RowMixtureConfig(fd.methods.MixtureConfig):
    """Parts mixed by gates (rows, parts) that the caller gives, as a router outside of the model does."""

    delta_type: ClassVar[str] = "told_mixture"
    conditions: ClassVar[tuple[str, ...]] = ("gate",)

    def shares_of(self, site: fd.Site, p: dict[str, Tensor], y: Tensor | None) -> Any:
        assert y is not None
        return [one.view(-1, *[1] * (y.ndim - 1)) for one in p["call.gate"].unbind(-1)]


def test_a_mixture_whose_gates_a_caller_gives() -> None:
    torch.manual_seed(0)
    parts, batch = (fd.LoraConfig(lora_r=2), fd.LoraConfig(lora_r=3, name="other")), text(MASKS["left"])
    delta = fd.DeltaModel(llama(), RowMixtureConfig(parts=parts, modified_modules=("down_proj",), gate="call"))
    assert delta.plan.conditions == ("gate",)
    stack, gates = random_stack(delta), torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = []
        for params in fd.unstack(stack):
            rows = []
            for row, shares in enumerate(gates):
                average = fd.average(*parts, shares=tuple(shares.tolist()), modified_modules=("down_proj",))
                one = fd.DeltaModel(delta.backbone, average)
                fresh = one.init(0)
                own = {name.replace("average", "mixture"): name for name in fresh}
                given = {name: params.get(at, fresh[name]) for at, name in own.items()}
                rows.append(one.apply(given, **{key: value[row : row + 1] for key, value in batch.items()})[0])
            expected.append(torch.cat(rows))
        for engine in ("loop", "fold", "vmap"):
            found = delta.apply_many(stack, **batch, conditions={"gate": gates}, engine=engine)[0]
            close(found, torch.stack(expected))
    with raises_saying(fd.errors.MergeError, "depends on the call (gate)"):
        delta.merge(fd.take(stack, 0))
