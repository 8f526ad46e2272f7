"""The table of each family, by Transformers' ``model_type``; a new family needs a table and a line here."""

from __future__ import annotations

from .decoders import BLOOM, GEMMA2, GEMMA3, GPT2, GPT_NEOX, GPTJ, LLAMA, MIXTRAL, OPT, PHI, PHI3
from .encoders import ALBERT, BERT, DEBERTA, DISTILBERT, ELECTRA, MODERNBERT, ROBERTA
from .pairs import BART, T5, WHISPER
from .rows import Rows, Table, read
from .vision import CLIP_TEXT, CLIP_VISION, VIT

FAMILIES: dict[str, Table] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": ELECTRA,
    "albert": ALBERT,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neox": GPT_NEOX,
    "bloom": BLOOM,
    "opt": OPT,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA2,
    "phi": PHI,
    "phi3": PHI3,
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "whisper": WHISPER,
    "vit": VIT,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
}
"""The table of every family; you can add your own: ``FAMILIES["my_type"] = {...}``."""

_READ: dict[str, tuple[Table, Rows]] = {}


def rows_of(kind: str) -> Rows:
    """The rows of the family ``kind``, prepared for look-ups.

    >>> rows_of("gpt2").whole.longest(["wte"])[0].names
    ('embeddings@',)
    """
    table = FAMILIES[kind]
    if kind not in _READ or _READ[kind][0] is not table:
        _READ[kind] = table, read(table)
    return _READ[kind][1]
