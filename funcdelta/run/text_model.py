"""Facts about a model of text: what it takes, how it counts positions, and which positions attend to which.

They are read off its forward, its config and its tables; nothing is run.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor, nn

from .positions import CACHES

POSITION_TABLES = ("wpe", "position_embeddings", "position_embedding", "embed_positions")

CACHES_TAKEN = frozenset({*CACHES, "use_cache"})

COUNTS_FROM_IDS = "create_position_ids_from_input_ids"
"""Transformers' function in models whose positions skip padding."""


def inputs_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the positional inputs of the module's forward.

    >>> inputs_of(torch.nn.Linear(2, 2))
    ('input',)
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def input_embedding(module: nn.Module) -> nn.Embedding | None:
    """The table of token embeddings of ``module``; ``None`` if there is none.

    >>> from transformers import T5Config, T5EncoderModel
    >>> t5 = T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    >>> input_embedding(t5)
    Embedding(20, 8)
    """
    try:
        found = getattr(module, "get_input_embeddings")()  # noqa: B009  (typed as a tensor or a module)
    except (NotImplementedError, AttributeError):  # Transformers raises these if there is none
        return None
    return found if isinstance(found, nn.Embedding) else None


def takes_text(module: nn.Module) -> bool:
    """Whether the module's forward takes token ids or embeddings, and a mask."""
    names = inputs_of(module)
    return "attention_mask" in names and ("input_ids" in names or "inputs_embeds" in names)


def caller_of(model: nn.Module, path: str) -> nn.Module | None:
    """The outermost module above ``path`` that takes the same text; ``None`` if there is none.

    Models of images and text compute positions and masks and pass them to their text model. A module above an encoder
    and a decoder takes other text than either.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    >>> caller_of(gpt2, "transformer") is gpt2, caller_of(gpt2, "")
    (True, None)
    """
    found = None
    for above in prefixes(path)[1:] if path else ():
        module = model.get_submodule(above)
        if is_pair(module):
            break
        found = module if takes_text(module) else found
    return found


def counts_from_mask(module: nn.Module) -> bool:
    """Whether the module's forward computes positions from the mask if it is given no ``position_ids``."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "cumsum" not in code.co_names:
        return False
    return {"attention_mask", "position_ids"} <= {*code.co_varnames}


def only_attends(module: nn.Module) -> bool:
    """Whether positions interact only in attention, so that a mask hides them; convolutions and recurrences ignore it.

    >>> only_attends(torch.nn.Linear(2, 2)), only_attends(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3)))
    (True, False)
    """
    return not any(isinstance(part, (nn.Conv1d, nn.RNNBase)) for part in module.modules())


def is_causal(module: nn.Module) -> bool:
    """Whether each position attends only to itself and earlier ones.

    Read off a flag of its attention, or a triangular buffer; if there is neither, a model that takes a cache is causal.
    """
    said = [causal for part in module.modules() if isinstance(causal := getattr(part, "is_causal", None), bool)]
    if said:
        return any(said)
    triangles = any(_is_triangle(buffer) for name, buffer in module.named_buffers() if name.endswith(".bias"))
    return triangles or not CACHES_TAKEN.isdisjoint(inputs_of(module))


def _is_triangle(tensor: Tensor) -> bool:
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.is_meta or tensor.shape[-1] < 2:
        return False
    return bool((tensor == torch.ones_like(tensor).tril()).all())


def padding_position(module: nn.Module, embedding: nn.Module) -> int | None:
    """The position number of padding if positions are counted from ids, else ``None``.

    >>> from transformers import RobertaConfig, RobertaModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> roberta = RobertaModel(RobertaConfig(vocab_size=20, pad_token_id=1, **sizes))
    >>> padding_position(roberta, roberta.get_input_embeddings())
    1
    """
    for holder, table in position_tables(module, embedding):
        source = sys.modules.get(type(holder).__module__)
        if table.padding_idx is not None and (hasattr(holder, COUNTS_FROM_IDS) or hasattr(source, COUNTS_FROM_IDS)):
            return table.padding_idx
    return None


def position_tables(module: nn.Module, embedding: nn.Module) -> list[tuple[nn.Module, nn.Embedding]]:
    """The tables of absolute positions, each with the module that holds it and the token table ``embedding``.

    >>> from transformers import GPT2Config, GPT2Model
    >>> gpt2 = GPT2Model(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    >>> [table for _, table in position_tables(gpt2, gpt2.wte)]
    [Embedding(16, 8)]
    """
    holders = [m for m in module.modules() if any(child is embedding for child in m.children())]
    return [
        (holder, table)
        for holder in holders
        for name, table in holder.named_children()
        if name in POSITION_TABLES and isinstance(table, nn.Embedding)
    ]


def is_pair(module: nn.Module) -> bool:
    """Whether the module is an encoder-decoder.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    >>> is_pair(t5), is_pair(t5.shared)
    (True, False)
    """
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(
        module, "get_encoder"
    )


def encoder_path(module: nn.Module) -> str | None:
    """The path of an encoder-decoder's encoder, which ``generate`` calls by itself; ``None`` for other models.

    >>> encoder_path(torch.nn.Linear(2, 2)) is None
    True
    """
    if not is_pair(module):
        return None
    encoder = getattr(module, "get_encoder")()  # noqa: B009  (typed as a tensor or a module)
    return next((path for path, child in module.named_modules() if child is encoder and path), None)


def prefixes(path: str) -> list[str]:
    """The path and those above it, nearest first.

    >>> prefixes("model.layers")
    ['model.layers', 'model', '']
    """
    tokens = path.split(".") if path else []
    return [".".join(tokens[:end]) for end in range(len(tokens), -1, -1)]
