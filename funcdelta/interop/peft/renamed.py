"""Module names that Transformers has changed: what a file calls a module, and what the backbone calls it now.

A name that the backbone has is never changed. Rules are tried alone and one after the other, in this order, until the
name is one of the backbone's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from ...errors import CheckpointError

RULES = (
    # what wraps a model
    (r"^module\.", ""),
    # vision with language, before 4.52 (LLaVA, PaliGemma, Gemma 3, Qwen2-VL, Qwen2.5-VL, ...)
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^visual\.", "model.visual."),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"\.vision_model\.", "."),
    # encoders of images, before 5 (ViT and its relatives)
    (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.attention\.(query|key|value)\b", r".attention.\1"),
    (r"\.attention\.query\b", ".attention.q_proj"),
    (r"\.attention\.key\b", ".attention.k_proj"),
    (r"\.attention\.value\b", ".attention.v_proj"),
    (r"\.attention\.output\.dense\b", ".attention.o_proj"),
    (r"(layers\.\d+)\.intermediate\.dense\b", r"\1.mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    # experts, before 5 (Mixtral)
    (r"\.block_sparse_moe\.", ".mlp."),
    # heads
    (r"^embed_out\b", "lm_head"),
)
"""``(pattern, what stands there now)``."""

KeyMap = Mapping[str, str] | Callable[[str], str]
"""A user's own rules: regular expressions with what to put there, or a function of the name in the file."""


def mapped(name: str, key_map: KeyMap | None) -> str:
    """``name`` after the user's own rules, all of them in turn.

    >>> mapped("encoder.0.q", {r"^encoder": "blocks", r"\\.q$": ".query"})
    'blocks.0.query'
    """
    if key_map is None:
        return name
    if not isinstance(key_map, Mapping):
        return key_map(name)
    for pattern, now in key_map.items():
        try:
            name = re.sub(pattern, now, name)
        except re.error as error:
            raise CheckpointError(f"key_map has {pattern!r}: {now!r}, no regular expression: {error}.") from error
    return name


def here(name: str, known: Callable[[str], bool]) -> str | None:
    """What the backbone calls the module or tensor ``name`` of a file; ``None`` where it has none.

    >>> here("vit.encoder.layer.3.attention.attention.query", {"vit.layers.3.attention.q_proj"}.__contains__)
    'vit.layers.3.attention.q_proj'
    >>> here("query", {"key"}.__contains__)
    """
    return name if known(name) else next((other for other in _renamed(name) if known(other)), None)


def _renamed(name: str) -> Iterator[str]:
    """``name`` by each rule alone, then by the rules in a row, as far as each leads."""
    for pattern, now in RULES:
        other = re.sub(pattern, now, name)
        if other != name:
            yield other
    row = name
    for pattern, now in RULES:
        row = re.sub(pattern, now, row)
        if row != name:
            yield row
    for start in range(1, len(RULES)):  # a row that begins later: an earlier rule may lead astray
        row = name
        for pattern, now in RULES[start:]:
            row = re.sub(pattern, now, row)
        if row != name:
            yield row
