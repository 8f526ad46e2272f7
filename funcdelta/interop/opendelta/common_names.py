"""Resolves names in OpenDelta's files to modules: common names (``attn@.q@``) of known classes, and exclusion.

A row maps a path inside a module of that class to common tokens (``$`` is a number). The longest row that a path
starts with is translated, each token with an ``@`` appended, and the rest of the path stays. These tables are separate
from those of :mod:`funcdelta.structures` on purpose: they record what the names in old files meant, which must not
change when the other tables grow (norms on OPT, DeBERTa's ``intermediate``). Before 0.3 the names had no ``@``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ...match import find_key

EXCLUDED = ("lm_head",)
"""The modules that OpenDelta leaves out if ``exclude_modules`` is not given."""

BERT = {
    "embeddings.word_embeddings": "embeddings",
    "encoder": "encoder",
    "encoder.layer": "encoder.block",
    "encoder.layer.$": "encoder.block.$",
    "encoder.layer.$.attention": "encoder.block.$.attn",
    "encoder.layer.$.attention.self.query": "encoder.block.$.attn.q",
    "encoder.layer.$.attention.self.key": "encoder.block.$.attn.k",
    "encoder.layer.$.attention.self.value": "encoder.block.$.attn.v",
    "encoder.layer.$.attention.output.dense": "encoder.block.$.attn.proj",
    "encoder.layer.$.attention.output.LayerNorm": "encoder.block.$.attn.layer_norm",
    "encoder.layer.$.intermediate": "encoder.block.$.ff",
    "encoder.layer.$.intermediate.dense": "encoder.block.$.ff.w1",
    "encoder.layer.$.output": "encoder.block.$.ff",
    "encoder.layer.$.output.dense": "encoder.block.$.ff.w2",
    "encoder.layer.$.output.LayerNorm": "encoder.block.$.ff.layer_norm",
}
DEBERTA = {key: value for key, value in BERT.items() if not key.endswith(("intermediate", "query", "key", "value"))} | {
    "encoder.layer.$.attention.self.query_proj": "encoder.block.$.attn.q",
    "encoder.layer.$.attention.self.key_proj": "encoder.block.$.attn.k",
    "encoder.layer.$.attention.self.value_proj": "encoder.block.$.attn.v",
}
GPT2 = {
    "wte": "embeddings",
    "h": "decoder.block",
    "h.$": "decoder.block.$",
    "h.$.attn": "decoder.block.$.attn",
    "h.$.attn.c_attn": "decoder.block.$.attn.q,k,v",
    "h.$.attn.c_proj": "decoder.block.$.attn.proj",
    "h.$.ln_1": "decoder.block.$.attn.layer_norm",
    "h.$.mlp": "decoder.block.$.ff",
    "h.$.mlp.c_fc": "decoder.block.$.ff.w1",
    "h.$.mlp.c_proj": "decoder.block.$.ff.w2",
    "h.$.ln_2": "decoder.block.$.ff.layer_norm",
    "ln_f": "decoder.layer_norm",
}
OPT = {
    "decoder": "decoder",
    "decoder.embed_tokens": "embeddings",
    "decoder.layers": "decoder.block",
    "decoder.layers.$": "decoder.block.$",
    "decoder.layers.$.self_attn": "decoder.block.$.attn",
    "decoder.layers.$.self_attn.q_proj": "decoder.block.$.attn.q",
    "decoder.layers.$.self_attn.k_proj": "decoder.block.$.attn.k",
    "decoder.layers.$.self_attn.v_proj": "decoder.block.$.attn.v",
    "decoder.layers.$.self_attn.out_proj": "decoder.block.$.attn.proj",
    "decoder.layers.$.self_attn_layer_norm": "decoder.block.$.attn.layer_norm",
    "decoder.layers.$.fc1": "decoder.block.$.ff.w1",
    "decoder.layers.$.fc2": "decoder.block.$.ff.w2",
    "decoder.layers.$.final_layer_norm": "decoder.block.$.ff.layer_norm",
}


def _t5_stack(stack: str, parts: Sequence[str]) -> dict[str, str]:
    """The rows of one stack whose layers have the sub-layers ``parts``, in this order."""
    rows = {
        stack: stack,
        f"{stack}.embed_tokens": f"{stack}.embeddings",
        f"{stack}.block": f"{stack}.block",
        f"{stack}.block.$": f"{stack}.block.$",
        f"{stack}.final_layer_norm": f"{stack}.layer_norm",
    }
    inner = {
        "attn": {f"SelfAttention.{own}": name for own, name in zip("qkvo", ("q", "k", "v", "proj"), strict=True)},
        "crossattn": {
            f"EncDecAttention.{own}": name for own, name in zip("qkvo", ("q", "k", "v", "proj"), strict=True)
        },
        "ff": {"DenseReluDense.wi": "w1", "DenseReluDense.wo": "w2"},
    }
    for number, part in enumerate(parts):
        path, name = f"{stack}.block.$.layer.{number}", f"{stack}.block.$.{part}"
        rows |= {path: name, f"{path}.layer_norm": f"{name}.layer_norm"}
        rows |= {f"{path}.{own}": f"{name}.{common}" for own, common in inner[part].items()}
    return rows


T5 = {"shared": "embeddings"} | _t5_stack("encoder", ("attn", "ff")) | _t5_stack("decoder", ("attn", "crossattn", "ff"))

TABLES: Mapping[str, Mapping[str, str]] = {
    "BertModel": BERT,
    "RobertaModel": BERT,
    "DebertaV2Model": DEBERTA,
    "GPT2Model": GPT2,
    "OPTModel": OPT,
    "T5Model": T5,
    "T5ForConditionalGeneration": T5,
    "T5EncoderModel": T5,
}
"""The tables by the exact name of a class, which may be anywhere inside the backbone."""

VIRTUAL = {"decoder.layers.$.fc1": "decoder.block.$.ff", "decoder.layers.$.fc2": "decoder.block.$.ff"}
"""Second names of OPT's modules, because its feed-forward part is not a module of its own."""


def named_sites(
    backbone: nn.Module, names: Iterable[str], excluded: Iterable[str], common: bool
) -> tuple[str, ...] | None:
    """The paths that OpenDelta selects by ``names``; ``None`` if it has no table for the backbone.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> named_sites(backbone, ["0", "1"], ["1"], common=False)
    ('0',)
    >>> named_sites(backbone, ["attn@"], [], common=True) is None
    True
    """
    targets = tuple(names)
    modules = [path for path, _ in backbone.named_modules() if path]
    called = {path: (path,) for path in modules}
    if common:
        known = _translations(backbone)
        if not known:
            return None
        called |= known
        if not any("@" in target for target in targets):
            called = {path: tuple(name.replace("@", "") for name in every) for path, every in called.items()}
    # Its exclusion compares the beginnings of paths, ignoring the dots.
    taken = [path for path in modules if not path.startswith(tuple(excluded))]
    return tuple(path for path in taken if any(find_key(name, targets) for name in called[path]))


def _translations(backbone: nn.Module) -> dict[str, tuple[str, ...]]:
    """The common names, virtual ones included, of every module inside a module of a known class."""
    found: dict[str, tuple[str, ...]] = {}
    roots: list[tuple[str, Mapping[str, str]]] = []
    for path, module in backbone.named_modules():
        # OpenDelta does not look for further classes inside a known one.
        if type(module).__name__ in TABLES and not any(not root or path.startswith(f"{root}.") for root, _ in roots):
            roots.append((path, TABLES[type(module).__name__]))
    for root, rows in roots:
        before = f"{root}." if root else ""
        for below, _ in backbone.get_submodule(root).named_modules():
            if below:
                second = VIRTUAL.get(_pattern(below), "") if rows is OPT else ""
                every = [_translate(below, rows), *([_with_marks(second, below)] if second else [])]
                found[before + below] = tuple(before + name for name in every)
    return found


def _pattern(path: str) -> str:
    return ".".join("$" if token.isdigit() else token for token in path.split("."))


def _translate(path: str, rows: Mapping[str, str]) -> str:
    """``path`` whose longest beginning that is a row is replaced by common tokens."""
    tokens = path.split(".")
    for end in range(len(tokens), 0, -1):
        start = ".".join(tokens[:end])
        # T5's sub-layers are numbered, too, and rows spell these numbers out.
        for row in (start, *_with_first_number_open(tokens[:end]), _pattern(start)):
            if row in rows:
                return ".".join([_with_marks(rows[row], start), *tokens[end:]])
    return path


def _with_first_number_open(tokens: Sequence[str]) -> list[str]:
    """The path with its first number, the layer's, replaced by ``$``; as a list, which is empty without a number."""
    for position, token in enumerate(tokens):
        if token.isdigit():
            return [".".join([*tokens[:position], "$", *tokens[position + 1 :]])]
    return []


def _with_marks(common: str, path: str) -> str:
    """Common tokens, each with an ``@``, and the layer's number from ``path`` in place of ``$``."""
    number = next((token for token in path.split(".") if token.isdigit()), "")
    return ".".join(number if token == "$" else f"{token}@" for token in common.split("."))
