"""Conditions of a call, against a slow form: the formula written out row by row, in hooks on the bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from custom_methods import LoreftConfig
from told_texts import (
    DECODERS,
    MASKS,
    OPTIONS,
    PAIRS,
    READERS,
    built,
    by_hand,
    close,
    ends,
    llama,
    random_stack,
    text,
)
from torch import Tensor, nn

import funcdelta as fd

# -- the text that a model reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", READERS)
def test_loreft_is_the_formula_row_by_row(name: str, padding: str) -> None:
    make, sites = READERS[name]
    delta, mask = built(make, sites), MASKS[padding]
    stack, batch = random_stack(delta), text(mask)
    expected = []
    for params in fd.unstack(stack):
        with by_hand(delta.backbone, params, dict.fromkeys(sites, ends(mask))):
            expected.append(delta.backbone(**batch)[0])
    assert not torch.allclose(expected[0], delta.backbone(**batch)[0], atol=1e-2)
    with torch.no_grad():
        for i, params in enumerate(fd.unstack(stack)):
            close(delta.apply(params, **batch)[0], expected[i])
            close(delta.bind(params)(**batch)[0], expected[i])
        for engine in ("loop", "fold", "trunk", "vmap"):
            close(delta.apply_many(stack, **batch, engine=engine)[0], torch.stack(expected))
        routed = [expected[2][0], delta.apply({}, **batch)[0][1], expected[0][2], expected[2][3]]
        close(delta.apply_rows(stack, [2, -1, 0, 2], **batch)[0], torch.stack(routed))
        close(delta.bind_rows(stack, [2, -1, 0, 2])(**batch)[0], torch.stack(routed))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
def test_an_encoder_and_its_decoder_have_texts_of_their_own(name: str, side: str) -> None:
    make, encoder, decoder = PAIRS[name]
    sites = (*(encoder if side != "decoder" else ()), *(decoder if side != "encoder" else ()))
    delta = built(make, sites)
    mask, target = MASKS["left"], [[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    batch = text(mask) | {f"decoder_{key}": value for key, value in text(target, seed=5).items()}
    stack = random_stack(delta)
    chosen = {path: ends(mask if path in encoder else target) for path in sites}
    expected = []
    for params in fd.unstack(stack):
        with by_hand(delta.backbone, params, chosen):
            expected.append(delta.backbone(**batch).logits)
    with torch.no_grad():
        close(delta.apply(fd.take(stack, 1), **batch).logits, expected[1])
        for engine in ("loop", "fold", "vmap"):
            close(delta.apply_many(stack, **batch, engine=engine).logits, torch.stack(expected))


def test_batches_of_each_members_own() -> None:
    delta = built(*READERS["bert"])
    stack, masks = random_stack(delta), [MASKS["left"], MASKS["right"], MASKS["ragged"]]
    batches = [text(mask, seed) for seed, mask in enumerate(masks)]
    together = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    with torch.no_grad():
        expected = [delta.apply(p, **b)[0] for p, b in zip(fd.unstack(stack), batches, strict=True)]
        for engine in ("loop", "fold"):
            close(delta.apply_many(stack, **together, in_dims=0, engine=engine)[0], torch.stack(expected))
        found = delta.apply_many(stack, **together, in_dims=0, engine="fold", chunk_size=2)[0]
        close(found, torch.stack(expected))


def loss_of(delta: fd.DeltaModel, **batch: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda params: delta.apply(params, **batch)[0].square().mean()


def test_gradients_are_those_of_the_formula() -> None:
    make, sites = READERS["llama"]
    delta, batch = built(make, sites), text(MASKS["left"])
    stack = random_stack(delta)
    losses, grads = fd.value_and_grad(lambda s: delta.apply_many(s, **batch).logits.square().mean((1, 2, 3)))(stack)
    for i, params in enumerate(fd.unstack(stack)):
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
        with by_hand(delta.backbone, leaves, dict.fromkeys(sites, ends(MASKS["left"]))), torch.enable_grad():
            loss = delta.backbone(**batch).logits.square().mean()
        close(losses[i], loss)
        expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for key, grad in torch.func.grad(loss_of(delta, **batch))(params).items():
            close(grad, expected[key])
            close(grads[key][i], expected[key])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_with_the_same_conditions(reentrant: bool) -> None:
    sites, batch = READERS["llama"][1], text(MASKS["left"])

    def grads(model: nn.Module) -> list[Tensor]:
        delta = fd.DeltaModel(model.train(), LoreftConfig(modified_modules=sites))
        params = {key: leaf.requires_grad_() for key, leaf in fd.tree.randn_like(delta.init(0), seed=1).items()}
        loss_of(delta, **batch, use_cache=False)(params).backward()
        return [leaf.grad for leaf in params.values() if leaf.grad is not None]

    torch.manual_seed(0)
    model = llama()
    expected = grads(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for found, own in zip(grads(model), expected, strict=True):
        close(found, own)


def test_compiled_calls_tell_the_same() -> None:
    make, sites = READERS["gpt2"]
    delta, batch = built(make, sites), text(MASKS["left"])
    stack = random_stack(delta)

    def one(params: dict[str, Tensor], mask: Tensor) -> Tensor:
        return delta.apply(params, input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)[0]

    def many(stack: dict[str, Tensor], mask: Tensor) -> Tensor:
        return delta.apply_many(stack, input_ids=batch["input_ids"], attention_mask=mask, engine="fold")[0]

    for function, params in ((one, fd.take(stack, 0)), (many, stack)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        for padding in ("left", "right"):
            mask = torch.tensor(MASKS[padding])
            with torch.no_grad():
                close(compiled(params, mask), function(params, mask))


# -- going on from a cache ---------------------------------------------------------------------------------------------


def decoded_by_hand(model: nn.Module, params: Any, sites: Any, prompt: dict[str, Tensor], steps: int) -> Any:
    """Greedy decoding without a cache: whole texts, in which the prompt alone is changed."""
    ids, mask, logits = prompt["input_ids"], prompt["attention_mask"], []
    with by_hand(model, params, dict.fromkeys(sites, ends(mask.tolist()))):
        for _ in range(steps):
            numbers = (mask.cumsum(1) - 1).clamp(min=0)
            output = model(input_ids=ids, attention_mask=mask, position_ids=numbers, use_cache=False)
            logits.append(output.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, torch.stack(logits, 1)


TOLD = {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens_stay_as_they_are(name: str) -> None:
    make, sites = DECODERS[name]
    delta, prompt = built(make, sites), text(MASKS["left"])
    stack = random_stack(delta)
    expected = [decoded_by_hand(delta.backbone, p, sites, prompt, 4) for p in fd.unstack(stack)]
    found = delta.bind(fd.take(stack, 1)).generate(**prompt, **OPTIONS, **TOLD)
    assert torch.equal(found.sequences, expected[1][0])
    close(torch.stack(found.logits, 1), expected[1][1])
    index = [2, -1, 0, 1]
    found = delta.bind_rows(stack, index).generate(**prompt, **OPTIONS, **TOLD)
    bare = delta.backbone.generate(**prompt, **OPTIONS)
    for row, i in enumerate(index):
        assert torch.equal(found.sequences[row], bare[row] if i < 0 else expected[i][0][row])
    # A cache by hand, token by token, without position_ids in models that count what is cached.
    params, cache = fd.take(stack, 1), transformers.DynamicCache()
    whole = {key: value[:1] for key, value in prompt.items()}
    logits = [delta.apply(params, **whole, cache=cache, use_cache=True).logits[:, -1]]
    for at in range(3):
        mask = torch.ones(1, 7 + at, dtype=torch.long)
        one = {"input_ids": expected[1][0][:1, 6 + at : 7 + at], "attention_mask": mask}
        logits.append(delta.apply(params, **one, cache=cache, use_cache=True).logits[:, -1])
    close(torch.stack(logits, 1), expected[1][1][:1])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_and_several_sequences_keep_their_rows(options: dict[str, Any]) -> None:
    make, sites = DECODERS["llama"]
    delta, prompt, index = built(make, sites), text(MASKS["left"]), [2, 1, 0, 1]
    stack = random_stack(delta)
    found = delta.bind_rows(stack, index).generate(**prompt, **OPTIONS, **options)
    for row, i in enumerate(index):
        own = {key: value[row : row + 1] for key, value in prompt.items()}
        alone = delta.bind(fd.take(stack, i)).generate(**own, **OPTIONS, **options)
        k = len(alone)
        assert torch.equal(found[row * k : row * k + k], alone)


def test_sampled_tokens_are_those_of_the_formula() -> None:
    make, sites = DECODERS["llama"]
    delta, prompt = built(make, sites), text(MASKS["left"])
    params = fd.take(random_stack(delta), 0)
    with by_hand(delta.backbone, params, dict.fromkeys(sites, ends(MASKS["left"]))):
        torch.manual_seed(3)
        expected = delta.backbone.generate(**prompt, max_new_tokens=1, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(delta.bind(params).generate(**prompt, max_new_tokens=1, do_sample=True), expected)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_generate(name: str) -> None:
    make, encoder, decoder = PAIRS[name]
    delta, source = built(make, (*encoder, *decoder)), text(MASKS["right"])
    stack, index = random_stack(delta), [2, 1, 0, 1]
    found = delta.bind_rows(stack, index).generate(**source, **OPTIONS, **TOLD)
    for row, i in enumerate(index):
        own = {key: value[row : row + 1] for key, value in source.items()}
        chosen = {path: ends(source["attention_mask"].tolist())[row : row + 1] for path in encoder}
        with by_hand(delta.backbone, fd.take(stack, i), chosen | {path: [{0}] for path in decoder}):
            ids, logits = found.sequences[row : row + 1], []
            for at in range(1, ids.shape[1]):  # of the decoder's text the first token alone is the prompt
                logits.append(delta.backbone(**own, decoder_input_ids=ids[:, :at], use_cache=False).logits[:, -1])
        close(torch.stack(found.logits, 1)[row], torch.stack(logits, 1)[0])
