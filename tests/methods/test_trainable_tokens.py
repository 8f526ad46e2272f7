"""Rows of its own for some tokens, in an embedding and in the head that is tied to it, against PEFT's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from handmade import MLP, Tied, assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from zoo import padding, tokens
from zoo_architecture import randomise
from zoo_transformers import GPT_SIZES, LLAMA_SIZES

import funcdelta as fd

Params = dict[str, Tensor]
CHOSEN = (5, 1, 40)


@fd.register("test_tokens")
@dataclass(frozen=True)
class TokensConfig(fd.Additive):
    """W with the rows of ``tokens`` replaced by R, or with R added to them; an embedding and its tied heads share R.

    Shapes: ``tokens.rows`` R (k, d). Source: PEFT's TrainableTokens.

    Attributes:
        tokens: numbers of the tokens, each once.
        form: ``"replaced"``, R starts as W's rows; or ``"added"``, R starts at 0.
    """

    default_name: ClassVar[str] = "tokens"
    identity_at_start: ClassVar[bool] = True
    acts_on_parts: ClassVar[bool] = False

    tokens: tuple[int, ...] = CHOSEN
    form: str = "replaced"

    def own_sites(self, backbone: nn.Module) -> list[str] | None:
        modules = dict(backbone.named_modules())
        table = next((one.weight for one in modules.values() if isinstance(one, nn.Embedding)), None)
        return [path for path, one in modules.items() if getattr(one, "weight", None) is table is not None]

    def check(self, site: fd.Site) -> str | None:
        if site.kind not in ("embedding", "linear"):
            return f"it changes rows of an embedding or of a head, not {site.module_type}"
        rows = site.weight[0] if site.weight else 0
        far = next((token for token in self.tokens if not 0 <= token < rows), None)
        return None if far is None else f"tokens has {far}, and {site.module_type} has the rows 0 to {rows - 1}"

    def shared_leaves(self, sites: tuple[fd.Site, ...], own: Mapping[str, Any], rng: torch.Generator) -> fd.Leaves:
        rows = own[sites[0].address]["weight"][list(self.tokens)]
        return {"rows": rows.clone() if self.form == "replaced" else torch.zeros_like(rows)}

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {}

    def low_rank(self, site: fd.Site, p: Params) -> fd.LowRank:
        change = p["rows"] - p["own.weight"][list(self.tokens)] if self.form == "replaced" else p["rows"]
        assert site.weight is not None
        places = F.one_hot(torch.tensor(self.tokens, device=change.device), site.weight[0]).to(change.dtype)
        one = change.new_ones(())
        return fd.LowRank(change.mT, places, one) if site.kind == "embedding" else fd.LowRank(places.mT, change, one)

    def acts(self, site: fd.Site) -> fd.Acts:
        return dataclasses.replace(super().acts(site), reads=("weight",) if self.form == "replaced" else ())


def llama(tied: bool = True, **sizes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**LLAMA_SIZES, "tie_word_embeddings": tied, **sizes})
    return randomise(transformers.LlamaForCausalLM(config), seed=0).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(**GPT_SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return randomise(transformers.GPT2LMHeadModel(config), seed=0).eval()


MODELS: dict[str, Any] = {"llama": llama, "untied": functools.partial(llama, tied=False), "gpt2": gpt2}
every = pytest.mark.parametrize("name", MODELS)
forms = pytest.mark.parametrize("form", ["replaced", "added"])


def batch(rows: int = 3) -> dict[str, Any]:
    ids = tokens(rows).clone()
    ids[:, 1], ids[0, 3] = CHOSEN[0], CHOSEN[2]  # the chosen ones are read
    return {"input_ids": ids, "attention_mask": padding(rows)}


def peft_gives(name: str, rows: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """PEFT's logits and the gradient of ``loss`` by its rows, for the numbers ``rows``."""
    from peft import TrainableTokensConfig, get_peft_model

    model = MODELS[name]()
    target = "wte" if name == "gpt2" else "embed_tokens"
    theirs: Any = get_peft_model(model, TrainableTokensConfig(token_indices=list(CHOSEN), target_modules=[target]))
    (leaf,) = {id(one): one for key, one in theirs.named_parameters() if "trainable_tokens_delta" in key}.values()
    with torch.no_grad():
        leaf.copy_(rows)
    logits = theirs(**batch()).logits
    loss(logits).backward()
    return logits.detach(), leaf.grad


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % logits.shape[-1])


@every
@forms
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:Model has .tie_word:UserWarning"
)
def test_logits_and_gradients_are_pefts(name: str, form: str) -> None:
    delta = fd.DeltaModel(MODELS[name](), TokensConfig(form=form))
    assert len(delta.sites) == (1 if name == "untied" else 2)
    assert delta.names == ("tokens.rows",)
    table = delta.backbone.get_input_embeddings().weight[list(CHOSEN)].detach()
    start = table if form == "replaced" else torch.zeros_like(table)
    assert torch.equal(delta.init(0)["tokens.rows"], start)
    stack, inputs = random_params(delta, 4), batch()
    bare = delta.apply({}, **inputs).logits
    expected, wanted = [], []
    for rows in stack["tokens.rows"]:
        logits, grad = peft_gives(name, rows if form == "replaced" else table + rows, loss_of)
        assert_acts(logits, bare)
        expected.append(logits)
        wanted.append(grad)
    for engine in ("loop", "vmap", "fold"):
        many = functools.partial(delta.apply_many, engine=engine)
        assert_close(many(stack, **inputs).logits, torch.stack(expected), 1e-5)
        _, grads = fd.value_and_grad(lambda p, many=many: torch.vmap(loss_of)(many(p, **inputs).logits))(stack)
        assert_close(grads["tokens.rows"], torch.stack(wanted), 1e-5)
    rows = delta.apply_rows(stack, [3, -1, 0], **inputs).logits
    assert_close(rows, torch.stack([expected[3][0], bare[1], expected[0][2]]), 1e-5)
    assert_close(delta.bind(fd.take(stack, 1))(**inputs).logits, expected[1], 1e-5)


@every
@forms
def test_both_ends_merge_into_one_tensor(name: str, form: str, tmp_path: Any) -> None:
    delta = fd.DeltaModel(MODELS[name](), TokensConfig(form=form))
    params, inputs = random_params(delta), batch()
    expected = delta.apply(params, **inputs).logits
    merged: Any = delta.merged(params)
    assert_close(merged(**inputs).logits, expected, 1e-5)
    table, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (table is head) == (name != "untied")
    others = [i for i in range(len(table)) if i not in CHOSEN]
    assert torch.equal(table[others], delta.backbone.get_input_embeddings().weight[others])
    if form == "replaced":
        assert_close(table[list(CHOSEN)], params["tokens.rows"], 1e-6)
    state = delta.merge(params)
    path = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    assert (state[path] is state["lm_head.weight"]) == (name != "untied")
    again = MODELS[name]()
    again.load_state_dict(state)
    assert_close(again(**inputs).logits, expected, 1e-5)
    loaded, stack = fd.AutoDeltaModel.from_finetuned(delta.save_finetuned(params, tmp_path / "saved"), delta.backbone)
    assert_close(loaded.apply(stack, **inputs).logits, expected, 1e-6)


def test_ends_that_differ_are_refused_as_one_end_is() -> None:
    model = Tied().eval()
    two = fd.LoraModel(model, lora_r=2, modified_modules=["embedding", "head"])
    with raises_saying(fd.errors.MergeError, "embedding.weight", "head.weight", "tied", "untie=True"):
        two.merge(random_params(two))
    one = fd.DeltaModel(model, TokensConfig(tokens=(3,), modified_modules=["head"]))
    with raises_saying(fd.errors.MergeError, "head.weight is tied to embedding.weight", "untie=True"):
        one.merge(random_params(one))
    both = fd.DeltaModel(model, TokensConfig(tokens=(3,)), fd.LoraConfig(lora_r=2, modified_modules=["head"]))
    params, ids = random_params(both), torch.randint(11, (5, 6))
    with raises_saying(fd.errors.MergeError, "tied", "untie=True"):
        both.merge(params)
    assert_close(both.merged(params, untie=True)(ids), both.apply(params, ids))


@torch.no_grad()
def test_generation_packing_and_compositions() -> None:
    model, inputs = llama(), {"input_ids": batch()["input_ids"], "attention_mask": padding(3).flip(-1)}
    first, second = TokensConfig(), TokensConfig(form="added")
    delta = fd.DeltaModel(model, first)
    params = random_params(delta)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    merged: Any = delta.merged(params)
    view: Any = delta.bind(params)
    assert torch.equal(view.generate(**inputs, **options), merged.generate(**inputs, **options))
    # Beside a LoRA, and unlike members in one stack.
    made = []
    for i, configs in enumerate(
        [(first,), (second,), (first, fd.LoraConfig(modified_modules=["q_proj"], lora_r=2)), (fd.BitFitConfig(),)]
    ):
        one = fd.DeltaModel(model, *configs)
        made.append((one, random_params(one, seed=i)))
    expected = torch.stack([one.apply(own, **inputs).logits for one, own in made])
    packed, stack = fd.pack(made)
    for engine in ("loop", "vmap", "fold"):
        assert_close(packed.apply_many(stack, **inputs, engine=engine).logits, expected)
    composed = fd.DeltaModel(
        model, fd.parallel(first, fd.LoraConfig(lora_r=2), modified_modules=["embed_tokens", "lm_head"])
    )
    table: Any = model.get_input_embeddings()
    assert torch.equal(composed.init(0)["parallel.tokens.rows"], table.weight[list(CHOSEN)])
    stack = random_params(composed, 2)
    each = torch.stack([composed.apply(fd.take(stack, i), **inputs).logits for i in range(2)])
    assert_close(composed.apply_many(stack, **inputs, engine="fold").logits, each)


def test_half_precision_compiled_code_and_padding() -> None:
    model = llama().to(torch.bfloat16)
    delta = fd.DeltaModel(model, TokensConfig())
    params = delta.init(0)
    assert params["tokens.rows"].dtype == torch.float32
    assert torch.equal(delta.apply(params, **batch()).logits, model(**batch()).logits)
    delta = fd.DeltaModel(llama(), TokensConfig())
    stack = random_params(delta, 2)
    many = functools.partial(delta.apply_many, engine="fold")
    compiled = torch.compile(lambda p: many(p, **batch()).logits, backend="eager")
    assert_close(compiled(stack), many(stack, **batch()).logits)
    # The table gives its padding a value and no gradient, and so do its rows here, as in PEFT.
    padded = functools.partial(llama, tied=False, pad_token_id=CHOSEN[0])
    delta = fd.DeltaModel(padded(), TokensConfig())
    params = random_params(delta)
    grads = torch.func.grad(lambda p: loss_of(delta.apply(p, **batch()).logits))(params)
    assert grads["tokens.rows"][0].eq(0).all()
    assert grads["tokens.rows"][2].ne(0).any()


def test_what_cannot_be_is_refused() -> None:
    with raises_saying(fd.errors.MatchError, "tokens has 64", "Embedding has the rows 0 to 63"):
        fd.DeltaModel(llama(), TokensConfig(tokens=(64,)))
    with raises_saying(fd.errors.MatchError, "reads model.embed_tokens.weight", "unfrozen_modules"):
        fd.DeltaModel(llama(), TokensConfig(unfrozen_modules=["deltas", "embed_tokens"]))
    with raises_saying(fd.errors.MatchError, "test_tokens finds no site of its own in MLP", "modified_modules"):
        fd.DeltaModel(MLP(), TokensConfig())
    with raises_saying(fd.errors.MatchError, "exclude_modules leaves out 'lm_head'", "the last site"):
        fd.DeltaModel(llama(), TokensConfig(exclude_modules=["model.embed_tokens", "lm_head"]))
    assert fd.DeltaModel(llama(), TokensConfig(exclude_modules=["lm_head"])).sites == ("model.embed_tokens",)
