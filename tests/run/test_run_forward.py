"""Who is told use_cache=False: whoever understands it, by name or through keywords, and nobody who would refuse it."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from funcdelta.run.forward import accepts, positional_names, takes_use_cache, without_cache

LLAMA = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 32}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
WHISPER = {"vocab_size": 60, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 20, **ENCODER, **DECODER}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
IDS = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}


def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config={**LLAMA, "head_dim": 8, "rope_parameters": MROPE},
        vision_config={**QWEN_VISION, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
        image_token_id=59,
    )


def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=59,
    )


def t5_gemma() -> Any:
    module = {**LLAMA, "head_dim": 8, "layer_types": ["full_attention"]}
    return transformers.T5GemmaConfig(encoder=module, decoder=module, vocab_size=60)


def switch() -> Any:
    experts = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return transformers.SwitchTransformersConfig(**{**T5, "num_layers": 2}, num_decoder_layers=2, **experts)


def gemma_3() -> Any:
    text = {**LLAMA, "head_dim": 8, "pad_token_id": 0}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION)


CASES: dict[str, tuple[Any, dict[str, Tensor], bool]] = {
    # Keep a cache, and are told by name.
    "LlamaForCausalLM": (lambda: transformers.LlamaConfig(**LLAMA), TEXT, True),
    "GPT2LMHeadModel": (lambda: transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2), TEXT, True),
    "T5ForConditionalGeneration": (lambda: transformers.T5Config(**T5), BOTH, True),
    # Keep a cache, and are told through keywords.
    "GraniteMoeForCausalLM": (lambda: transformers.GraniteMoeConfig(**LLAMA, **EXPERTS), TEXT, True),
    "GraniteMoeSharedForCausalLM": (lambda: transformers.GraniteMoeSharedConfig(**LLAMA, **EXPERTS), TEXT, True),
    "SwitchTransformersForConditionalGeneration": (switch, BOTH, True),
    "LlavaForConditionalGeneration": (llava, TEXT, True),
    "LlavaModel": (llava, TEXT, True),
    "Qwen3VLForConditionalGeneration": (qwen3_vl, TEXT, True),
    "Qwen3VLModel": (qwen3_vl, TEXT, True),
    "Gemma3ForSequenceClassification": (gemma_3, TEXT, True),
    # Keep none, and would fail if they were told (two values for one keyword), or have nobody to tell it to.
    "T5GemmaForSequenceClassification": (t5_gemma, BOTH, False),
    "T5GemmaForTokenClassification": (t5_gemma, BOTH, False),
    "ViTModel": (lambda: transformers.ViTConfig(**VISION), {"pixel_values": torch.randn(2, 3, 16, 16)}, False),
    "LayoutLMForMaskedLM": (lambda: transformers.LayoutLMConfig(**BERT), TEXT, False),
    "WhisperForAudioClassification": (
        lambda: transformers.WhisperConfig(**WHISPER),
        {"input_features": torch.randn(2, 8, 40)},
        False,
    ),
    "XLNetLMHeadModel": (
        lambda: transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32),
        TEXT,
        False,
    ),
}


def caches(output: Any) -> list[str]:
    return [name for name, value in output.items() if hasattr(value, "reorder_cache")]


@pytest.mark.parametrize("name", CASES)
def test_a_cache_is_turned_off_wherever_the_model_understands_it(name: str) -> None:
    config, inputs, told = CASES[name]
    model = getattr(transformers, name)(config()).eval()
    given = without_cache(model, inputs)
    assert ("use_cache" in given) == told
    with torch.no_grad():
        plain, found = model(**inputs), model(**given)
    assert bool(caches(plain)) == told, "the case keeps a cache exactly where it has to be told"
    assert not caches(found)
    torch.testing.assert_close(found[0], plain[0])


def generating_classes() -> dict[str, type[nn.Module]]:
    """Every class of Transformers whose ``generate`` is its own or inherited."""
    found = {}
    for name in dir(transformers):
        if not name.endswith(("Model", "LM", "Generation", "Causal", "LMHeadModel", "Answering", "CTC")):
            continue
        try:
            kind = getattr(transformers, name)
        except ImportError:  # needs a library that is not installed
            continue
        if isinstance(kind, type) and issubclass(kind, (transformers.PreTrainedModel, transformers.GenerationMixin)):
            found[name] = kind
    return {name: kind for name, kind in found.items() if issubclass(kind, transformers.GenerationMixin)}


def known_by(config: Any) -> bool:
    return hasattr(config, "use_cache") or hasattr(getattr(config, "text_config", None), "use_cache")


@pytest.mark.slow
def test_generating_classes_of_transformers_by_their_signatures() -> None:
    """A model without weights answers as a built one does: the class and the config decide."""
    kinds = generating_classes()
    assert len(kinds) > 100
    through_keywords = []
    for name, kind in kinds.items():
        parameters = inspect.signature(kind.forward).parameters
        try:
            config = kind.config_class()
        except Exception:  # a config without defaults
            continue
        model = object.__new__(kind)
        nn.Module.__init__(model)
        model.__dict__["config"] = config
        by_name = "use_cache" in parameters
        by_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and known_by(config)
        assert takes_use_cache(model) == (by_name or by_keywords), name
        through_keywords += [name] if by_keywords and not by_name else []
    assert {"LlavaForConditionalGeneration", "GraniteMoeForCausalLM"} <= set(through_keywords)


# -- models that people write --------------------------------------------------------------------------------------

CONFIG = types.SimpleNamespace(use_cache=True)


class Decoder(nn.Module):
    """Keeps a cache where it is not told otherwise."""

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        return (x, "cache") if use_cache else (x, None)


class Wrapper(nn.Module):
    """Hands its keywords on."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.decoder(x, **kwargs)


class Sums(Wrapper):
    """Takes its keywords for tensors."""

    def forward(self, x: Tensor, **others: Tensor) -> Any:
        return self.decoder(x + sum(others.values()))


class Decides(Wrapper):
    """Says itself what its decoder keeps."""

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.decoder(x, use_cache=False, **kwargs)


class Below(Wrapper):
    """Hands its keywords to one that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decides()


class NoConfig(Wrapper):
    """Nothing says that it knows the word."""

    config = None


class NoDecoder(Wrapper):
    """Nobody inside takes it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Identity()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        *((Decoder, True), (Wrapper, True)),
        *((Sums, False), (Decides, False), (Below, False), (NoConfig, False), (NoDecoder, False), (nn.Identity, False)),
    ],
)
def test_keywords_that_only_go_on_carry_it(kind: type[nn.Module], told: bool) -> None:
    model, x = kind(), torch.zeros(2)
    kwargs = without_cache(model, {})
    assert kwargs == ({"use_cache": False} if told else {})
    output = model(x, **kwargs)
    if told:
        assert output[1] is None
    assert without_cache(model, {"use_cache": True}) == {"use_cache": True}


def test_a_forward_of_the_instance_decides() -> None:
    model = Decoder()
    assert takes_use_cache(model)
    model.forward = types.MethodType(lambda self, x, scale=1.0: x * scale, model)
    assert not takes_use_cache(model)
    assert positional_names(model) == ("x", "scale")
    assert accepts(model, "scale")
    assert not accepts(model, "use_cache")
    del model.forward
    assert takes_use_cache(model)


def test_what_compile_returns_takes_what_the_model_takes() -> None:
    compiled = torch.compile(Decoder(), backend="eager")
    assert takes_use_cache(compiled)
    assert positional_names(compiled) == ("x", "use_cache")


def test_names_by_position() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *more: Tensor, scale: float = 1.0, **kwargs: Any) -> Tensor:
            return x

    assert positional_names(Mixed()) == ("x", "y")
    builtin = nn.Identity()
    builtin.forward = torch.relu  # has no signature
    assert positional_names(builtin) == ()
    assert accepts(Mixed(), "scale")
    assert not accepts(Mixed(), "kwargs")


def test_it_is_known_while_compiling() -> None:
    model = Wrapper()

    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Any:
        return model(x, **without_cache(model, {}))

    assert call(torch.zeros(2))[1] is None
