"""Code that is known to treat every row by itself, although operations in it take several rows together.

What tracking the rows finds by itself needs no entry. These look at all rows to save work, or regroup tokens and put
every one back in its place, without one that depends on another.
"""

from __future__ import annotations

MASKS = frozenset({"transformers.masking_utils", "transformers.modeling_attn_mask_utils"})
"""Modules whose functions look whether anything is masked, and leave a mask out where nothing is: the same numbers."""

MODULES: dict[str, frozenset[str]] = {
    # Experts without a capacity: tokens are sorted by expert, and each comes back to its place.
    "transformers.models.mixtral.modeling_mixtral": frozenset({"MixtralSparseMoeBlock"}),
    "transformers.models.qwen2_moe.modeling_qwen2_moe": frozenset({"Qwen2MoeSparseMoeBlock"}),
    "transformers.models.qwen3_moe.modeling_qwen3_moe": frozenset({"Qwen3MoeSparseMoeBlock"}),
    "transformers.models.olmoe.modeling_olmoe": frozenset({"OlmoeSparseMoeBlock"}),
    "transformers.models.granitemoe.modeling_granitemoe": frozenset({"GraniteMoeMoE"}),
    # The state of the last end-of-sequence token, found by a mask that has to have one entry a row.
    "transformers.models.bart.modeling_bart": frozenset({"BartForSequenceClassification"}),
    "transformers.models.mbart.modeling_mbart": frozenset({"MBartForSequenceClassification"}),
    "transformers.models.plbart.modeling_plbart": frozenset({"PLBartForSequenceClassification"}),
    "transformers.models.t5.modeling_t5": frozenset({"T5ForSequenceClassification"}),
}
"""By module of the code, the classes whose own forward is known so."""


def is_rowwise(kind: type) -> bool:
    """Whether the forward of the class is known to treat every row by itself.

    >>> is_rowwise(type(None))
    False
    """
    forward = getattr(kind, "forward", None)
    owner = getattr(forward, "__qualname__", "").partition(".")[0]
    return owner in MODULES.get(getattr(forward, "__module__", ""), ())
