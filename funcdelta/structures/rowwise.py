"""Lists code that treats every row independently although its operations take several rows together.

Code that row tracking recognises by itself needs no entry. The code listed here looks at all rows to save work, or
regroups tokens and puts each one back, without any row depending on another.
"""

from __future__ import annotations

MASKS = frozenset({"transformers.masking_utils", "transformers.modeling_attn_mask_utils"})
"""Modules whose functions drop a mask that masks nothing, which changes no numbers."""

MODULES: dict[str, frozenset[str]] = {
    # Experts without a capacity: tokens are sorted by expert, and each comes back to its place.
    "transformers.models.mixtral.modeling_mixtral": frozenset({"MixtralSparseMoeBlock"}),
    "transformers.models.qwen2_moe.modeling_qwen2_moe": frozenset({"Qwen2MoeSparseMoeBlock"}),
    "transformers.models.qwen3_moe.modeling_qwen3_moe": frozenset({"Qwen3MoeSparseMoeBlock"}),
    "transformers.models.olmoe.modeling_olmoe": frozenset({"OlmoeSparseMoeBlock"}),
    "transformers.models.granitemoe.modeling_granitemoe": frozenset({"GraniteMoeMoE"}),
    # They find the state of the last end-of-sequence token by a mask with an equal count in every row.
    "transformers.models.bart.modeling_bart": frozenset({"BartForSequenceClassification"}),
    "transformers.models.mbart.modeling_mbart": frozenset({"MBartForSequenceClassification"}),
    "transformers.models.plbart.modeling_plbart": frozenset({"PLBartForSequenceClassification"}),
    "transformers.models.t5.modeling_t5": frozenset({"T5ForSequenceClassification"}),
}
"""``{module of the code: classes whose own forward treats rows independently}``."""


def is_rowwise(kind: type) -> bool:
    """Whether the forward of the class is listed here.

    >>> is_rowwise(type(None))
    False
    """
    forward = getattr(kind, "forward", None)
    owner = getattr(forward, "__qualname__", "").partition(".")[0]
    return owner in MODULES.get(getattr(forward, "__module__", ""), ())
