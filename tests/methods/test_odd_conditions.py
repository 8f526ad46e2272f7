"""Conditions of texts that no zoo has, and what is refused because a call does not tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from custom_methods import LoreftConfig
from handmade import raises_saying
from subjects import WITHOUT_TEXT, config_for, subject
from told_texts import (
    GATES,
    MASKS,
    READERS,
    SIZES,
    GatedConfig,
    SeenConfig,
    bart,
    bert,
    built,
    by_hand,
    close,
    ends,
    gated,
    gpt2,
    llama,
    random_stack,
    seeing,
    t5,
    text,
    told,
)
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

# -- texts of other kinds ----------------------------------------------------------------------------------------------


def test_texts_that_the_zoo_lacks() -> None:
    encoder, decoder, ids = seeing(bert, "layer.1"), seeing(llama, "layers.1"), text(None)["input_ids"]
    one = told(encoder, input_ids=ids[:1, :1])
    assert [one[name].tolist() for name in ("mask", "positions", "lengths", "cached")] == [[[True]], [[0]], [1], 0]
    nothing = told(encoder, input_ids=ids[:2], attention_mask=torch.tensor([[0] * 6, [1] * 6]))
    assert nothing["lengths"].tolist() == [0, 6]
    assert nothing["positions"][0].tolist() == [-1] * 6
    embedded = told(encoder, inputs_embeds=torch.randn(2, 3, 16))
    assert embedded["mask"].all()
    assert embedded["positions"].tolist() == [[0, 1, 2]] * 2
    mask = torch.tensor(MASKS["ragged"])
    for kind in (torch.float32, torch.bool, torch.int32):
        assert told(encoder, input_ids=ids, attention_mask=mask.to(kind))["lengths"].tolist() == [4, 2, 4, 1]
    numbers = (mask.cumsum(1) - 1).clamp(min=0)
    by_hand = told(decoder, input_ids=ids, attention_mask=mask, position_ids=numbers)
    assert all(torch.equal(by_hand[key], one) for key, one in told(decoder, input_ids=ids, attention_mask=mask).items())
    assert told(encoder, input_ids=ids, token_type_ids=torch.zeros_like(ids))["mask"].all()


class PlacedConfig(SeenConfig):
    conditions: ClassVar[tuple[str, ...]] = ("positions",)


PlacedConfig.delta_type = "told_placed"


def test_packed_texts_have_positions_and_no_length() -> None:
    torch.manual_seed(0)
    packed = {"input_ids": text(None)["input_ids"][:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    placed = fd.DeltaModel(llama(), PlacedConfig(modified_modules=("layers.1",)))
    assert told(placed, **packed)["positions"].tolist() == [[0, 1, 2, 0, 1, 2]]
    with raises_saying(fd.errors.ParamsError, "layers.1", "several texts", 'conditions={"lengths"'):
        told(seeing(llama, "layers.1"), **packed)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SIZES, is_decoder=True, eos_token_id=None)
    return transformers.RobertaForCausalLM(config).eval()


def test_positions_that_begin_behind_the_number_of_padding() -> None:
    delta, ids = seeing(roberta, "layer.1"), text(None)["input_ids"]
    mask = torch.tensor(MASKS["left"])
    assert told(delta, input_ids=ids, position_ids=torch.arange(2, 8)[None])["positions"][0].tolist() == [*range(6)]
    SeenConfig.seen.clear()
    # generate counts from 0, whatever the model does.
    delta.bind(delta.init(0)).generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert SeenConfig.seen[0]["positions"][1].tolist() == [-1, -1, -1, 0, 1, 2]
    assert SeenConfig.seen[1]["positions"].flatten().tolist() == [6, 3, 1, 2]


def xlnet() -> nn.Module:
    return transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=16)
    ).eval()


@pytest.mark.parametrize("rows", [2, 6])
def test_tokens_first_is_refused_until_the_config_says_so(rows: int) -> None:
    ids = torch.randint(4, 40, (rows, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with raises_saying(fd.errors.MatchError, "layer.1", "tokens first", "axis_order=(1, 0, 2)"):
        told(seeing(xlnet, "layer.1"), input_ids=ids, attention_mask=mask)
    found = told(seeing(xlnet, "layer.1", axis_order=(1, 0, 2)), input_ids=ids, attention_mask=mask)
    assert found["positions"][1].tolist() == [-1, -1, -1, 0, 1, 2]
    delta = built(xlnet, ("layer.1",), axis_order=(1, 0, 2))
    stack = random_stack(delta)
    with torch.no_grad():
        expected = [delta.apply(p, input_ids=ids, attention_mask=mask)[0] for p in fd.unstack(stack)]
        found = delta.apply_many(stack, input_ids=ids, attention_mask=mask, engine="fold")[0]
        close(found, torch.stack(expected))
        each = [
            delta.apply(fd.take(stack, 0), input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1])[0]
            for row in range(rows)
        ]
    close(torch.cat(each), expected[0])


def test_as_many_rows_as_tokens_change_nothing_else() -> None:
    make, sites = READERS["bert"]
    delta, ids = built(make, sites), torch.randint(4, 40, (6, 6), generator=torch.Generator().manual_seed(0))
    params, mask = fd.take(random_stack(delta), 0), torch.tensor([*MASKS["left"], *MASKS["ragged"][:2]])
    before = torch.get_rng_state()
    with by_hand(delta.backbone, params, dict.fromkeys(sites, ends(mask.tolist()))):
        expected = delta.backbone(input_ids=ids, attention_mask=mask)[0]
    close(delta.apply(params, input_ids=ids, attention_mask=mask)[0], expected)
    close(delta.bind(params)(input_ids=ids, attention_mask=mask)[0], expected)
    assert torch.equal(torch.get_rng_state(), before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def llava() -> nn.Module:
    tower = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    words = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=words, image_token_index=3, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def shown() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 3, 3, 3, 7], [3, 3, 3, 3, 9]])  # as many tokens as the tower has
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}


def pair() -> dict[str, Tensor]:
    ids = text(None)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids}  # of one length, so that no size tells them apart


def opt() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    config = transformers.OPTConfig(vocab_size=40, word_embed_proj_dim=16, **sizes)
    return transformers.OPTForCausalLM(config).eval()


def four_dimensional() -> dict[str, Tensor]:
    return {**text(None), "attention_mask": torch.ones(4, 1, 6, 6)}


def added() -> dict[str, Tensor]:
    return {**text(None), "attention_mask": (torch.tensor(MASKS["left"]) - 1) * 1e9}


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], dict[str, Tensor]], str]] = {
    "keys of an encoder": (t5, "decoder.block.0.layer.1.EncDecAttention.k", pair, "another input"),
    "values of an encoder": (bart, "model.decoder.layers.0.encoder_attn.v_proj", pair, "another input"),
    "a tower of images": (llava, "model.vision_tower.encoder.layers.1", shown, "goes through model.language_model"),
    "a head": (llama, "lm_head", lambda: text(None), "goes through model"),
    "tokens in one axis": (opt, "model.decoder.layers.1.fc1", lambda: text(None), "name a module around it"),
    "one value a row": (bert, "pooler.dense", lambda: text(None), "name a module around it"),
    "no rows": (bert, "embeddings.position_embeddings", lambda: text(None), "name a module around it"),
    "a mask of pairs": (bert, "encoder.layer.1", four_dimensional, 'conditions={"mask"'),
    "a mask to add": (bert, "encoder.layer.1", added, "below 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str) -> None:
    make, site, batch, why = REFUSED[case]
    delta = seeing(make, site, example=batch())
    stack = random_stack(delta)
    for call in (
        lambda: told(delta, **batch()),
        lambda: delta.apply_many(stack, **batch(), engine="fold"),
        lambda: delta.apply_many(stack, **batch()),
        lambda: delta.bind(delta.init(0))(**batch()),
    ):
        with raises_saying(fd.errors.MatchError, site, "condition mask", why, "exclude_modules"):
            call()


def test_a_caller_may_say_what_a_model_does_not() -> None:
    delta, mask = seeing(bert, "layer.1"), torch.tensor(MASKS["left"])
    found = told(delta, **four_dimensional(), conditions={"mask": mask})
    assert all(torch.equal(found[key], one) for key, one in told(delta, **text(MASKS["left"])).items())
    plain = built(lambda: nn.Sequential(nn.Linear(4, 4)), ("0",))
    say = {"mask": mask[:, :3], "positions": torch.arange(3).expand(4, 3), "lengths": torch.full((4,), 3)}
    x, stack = torch.randn(4, 3, 4), random_stack(plain)
    given: dict[str, Tensor] = {**say, "cached": torch.tensor(0)}
    expected = torch.stack([plain.apply(p, x, conditions=given) for p in fd.unstack(stack)])
    close(plain.apply_many(stack, x, conditions=given, engine="fold"), expected)
    close(plain.apply_many(stack, x, conditions=given, engine="vmap"), expected)


@dataclasses.dataclass(frozen=True)
class ShiftedInputConfig(fd.BaseDeltaConfig):
    """x + s: what enters a site is another tensor."""

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"shift": torch.zeros(site.in_features or site.width)}

    def before(self, site: fd.Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + p["shift"]


@pytest.mark.parametrize("engine", ["apply", "loop", "fold"])
def test_what_another_method_changed_is_still_the_encoders(engine: str) -> None:
    site = ["decoder.layers.0.encoder_attn.k_proj"]
    configs = ShiftedInputConfig(modified_modules=site), LoreftConfig(modified_modules=site)
    delta = fd.DeltaModel(bart(), *configs)
    batch = {**text(MASKS["left"]), "decoder_input_ids": text(MASKS["left"])["input_ids"]}
    with raises_saying(fd.errors.MatchError, site[0], "not the text"):
        if engine == "apply":
            delta.apply(delta.init(0), **batch)
        else:
            delta.apply_many(delta.init(0, n=2), **batch, engine=engine)


def test_positions_that_begin_later_tell_no_lengths() -> None:
    delta = built(llama, ("layers.0",))
    batch = text(MASKS["whole"])
    ids = batch["input_ids"]
    at = torch.arange(ids.shape[1]).expand(ids.shape)
    params = random_stack(delta)
    one = fd.take(params, 0)
    close(delta.apply(one, input_ids=ids, position_ids=at).logits, delta.apply(one, input_ids=ids).logits)
    with raises_saying(fd.errors.ParamsError, "layers.0", "do not begin with 0"):
        delta.apply(one, input_ids=ids, position_ids=at + 7)


def test_a_mask_that_is_added_is_refused_in_compiled_code_too() -> None:
    delta = built(llama, ("layers.0",))
    one, batch = fd.take(random_stack(delta), 0), text(MASKS["left"])
    added = (1.0 - batch["attention_mask"].float()) * -1e9
    compiled = torch.compile(
        lambda p, ids, mask: delta.apply(p, input_ids=ids, attention_mask=mask).logits, backend="eager"
    )
    with pytest.raises(Exception, match="attention_mask"):
        compiled(one, batch["input_ids"], added)


def test_a_prompt_is_not_read_in_pieces() -> None:
    delta = built(llama, ("layers.0",))
    view = delta.bind(fd.take(random_stack(delta), 0))
    with raises_saying(fd.errors.EngineError, "prefill_chunk_size"):
        view.generate(**text(MASKS["left"]), prefill_chunk_size=3, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(("method", "name"), WITHOUT_TEXT)
def test_where_there_is_no_text(method: str, name: str) -> None:
    architecture = ZOO[name]
    inputs = architecture.inputs(2)
    delta = fd.DeltaModel(architecture.build(), config_for(method, architecture), example=inputs.get("args", inputs))
    with raises_saying(fd.errors.MatchError, "condition mask", WITHOUT_TEXT[method, name], "exclude_modules"):
        architecture.call(lambda *args, **kwargs: delta.apply(delta.init(0), *args, **kwargs), inputs)


def test_what_a_caller_gives_has_to_fit() -> None:
    delta, stack = gated()
    params, batch = fd.take(stack, 0), text(MASKS["left"])
    with raises_saying(fd.errors.ParamsError, "model.layers.0", "gate", "conditions={"):
        delta.apply(params, **batch)
    for call in (delta.apply, delta.bind(params)):
        given = (params,) if call == delta.apply else ()
        with raises_saying(fd.errors.ParamsError, "'gat'", "gate"):
            call(*given, **batch, conditions={"gat": GATES})
        with raises_saying(fd.errors.ParamsError, "dict of tensors", "Tensor"):
            call(*given, **batch, conditions=GATES)
        with raises_saying(fd.errors.ParamsError, "gate", "found float"):
            call(*given, **batch, conditions={"gate": 0.5})
        with raises_saying(fd.errors.MatchError, "model.layers.0", "(3,)", "one entry a row"):
            call(*given, **batch, conditions={"gate": GATES[:3]})
    for engine in ("loop", "auto"):
        with raises_saying(fd.errors.MatchError, "model.layers.0", "(3,)", "one entry a row"):
            delta.apply_many(stack, **batch, conditions={"gate": GATES[:3]}, engine=engine)
    with raises_saying(fd.errors.MatchError, "(3,)"):
        delta.apply_rows(stack, [0, 1, 2, 0], **batch, conditions={"gate": GATES[:3]})
    lora = fd.LoraModel(delta.backbone, modified_modules=["q_proj"])
    with raises_saying(fd.errors.ParamsError, "no method of this delta wants conditions", "leave them out"):
        lora.apply(lora.init(0), **batch, conditions={"gate": GATES})


def test_parts_of_a_view_do_not_remember_what_a_call_told() -> None:
    delta = seeing(gpt2, "h.1")
    view, batch = delta.bind(delta.init(0)), text(MASKS["left"])
    view.transformer(**batch)
    for _ in range(2):
        with raises_saying(fd.errors.EngineError, "transformer.h.1", "runs by itself"):
            view.transformer.h[1](torch.randn(4, 6, 16))
        view(**batch)


class GatedLoraConfig(fd.Additive):
    """A product of low rank, times a gate; ``said``: that a merge is meant with the gate at 1."""

    conditions: ClassVar[tuple[str, ...]] = ("gate",)
    said: ClassVar[bool] = False

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"b": torch.zeros(site.width, 2), "a": torch.randn(2, site.input_width, generator=rng)}

    def low_rank(self, site: fd.Site, p: dict[str, Tensor]) -> fd.LowRank:
        return fd.LowRank(p["b"], p["a"], p["call.gate"] if "call.gate" in p else p["b"].new_ones(()))

    def acts(self, site: fd.Site) -> fd.Acts:
        acts = super().acts(site)
        return dataclasses.replace(acts, unmergeable=None) if self.said else acts


class SaidConfig(GatedLoraConfig):
    said: ClassVar[bool] = True


GatedLoraConfig.delta_type, SaidConfig.delta_type = "told_lora", "told_said"


def test_merging_what_depends_on_the_call() -> None:
    torch.manual_seed(0)
    model, batch = llama(), text(MASKS["left"])
    delta = fd.DeltaModel(model, GatedLoraConfig(modified_modules=("q_proj",)))
    params = fd.tree.randn_like(delta.init(0), seed=1)
    with raises_saying(fd.errors.MergeError, "q_proj", "depends on the call (gate)", "delta.bind(params)"):
        delta.merge(params)
    with raises_saying(fd.errors.MergeError, "depends on the call"):
        fd.algebra.scale(delta, params, 2.0)
    said = fd.DeltaModel(model, SaidConfig(modified_modules=("q_proj",)))
    params = fd.tree.randn_like(said.init(0), seed=1)
    with torch.no_grad():
        close(said.merged(params)(**batch)[0], said.apply(params, **batch, conditions={"gate": torch.ones(())})[0])


class WeightsConfig(GatedLoraConfig):
    before = fd.BaseDeltaConfig.before
    after = fd.BaseDeltaConfig.after


WeightsConfig.delta_type = "told_weights"


def test_conditions_of_what_acts_on_no_hidden_value_are_refused() -> None:
    with raises_saying(fd.errors.ConfigError, "WeightsConfig", "before and after get", "gate"):
        fd.DeltaModel(llama(), WeightsConfig(modified_modules=("q_proj",)))


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        return self.layer(x) + conditions


def test_a_model_with_an_input_of_that_name() -> None:
    x = torch.randn(4, 3, 4)
    lora = fd.LoraModel(Conditioned(), modified_modules=["layer"])
    close(lora.apply(lora.init(0), x, conditions=x), lora.backbone(x, x))
    with raises_saying(fd.errors.MatchError, "Conditioned.forward", "conditions"):
        fd.DeltaModel(Conditioned(), GatedConfig(modified_modules=("layer",)))


def test_a_part_may_not_be_called_as_what_calls_tell() -> None:
    with raises_saying(fd.errors.ConfigError, '"call"', "another name="):
        fd.chain(fd.LoraConfig(name="call"), fd.AdapterConfig())


def test_every_site_of_the_zoo_is_one_where_loreft_can_act() -> None:
    delta = subject("test_loreft", "bart").delta
    assert delta.plan.conditions == LoreftConfig.conditions
