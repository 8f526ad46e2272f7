"""Where a prompt enters a model: the module that takes token ids, its embedding, and what counts positions around it.

The entrance of an encoder-decoder is its encoder; that of any other Transformers model is the base transformer without
its heads. Both are found inside wrappers, too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MatchError, ParamsError
from ..match import within
from .positions import before
from .text_model import input_embedding, inputs_of, is_causal, is_pair, padding_position, position_tables, prefixes

LABELS = {"labels", "start_positions", "end_positions"}

SECOND_TABLE, SECOND_INPUT = "get_per_layer_inputs", "per_layer_inputs"
"""Some models look tokens up a second time, for every layer: Transformers' function for that, and the input for it."""

SECOND_WIDTH = "hidden_size_per_layer_input"
"""The config's width of these second embeddings; 0 in models of the same family that have none."""


def entrances(backbone: nn.Module, method: str) -> list[str]:
    """The path of the one module whose input a prompt extends, as a list (``""`` is the backbone itself).

    Raises ``MatchError`` if there is none, or more than one.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    >>> entrances(t5, "soft_prompt"), entrances(torch.nn.Sequential(t5), "soft_prompt")
    (['encoder'], ['0.encoder'])
    """
    paths = {id(module): path for path, module in backbone.named_modules()}
    settled: list[str] = []
    found: list[str] = []
    refusals: list[str] = []
    for path, module in backbone.named_modules():
        if not hasattr(module, "get_input_embeddings") or any(within(path, at) for at in settled):
            continue
        entered = _inside(module)
        refusal = why_not(entered)
        if refusal is None:
            found.append(paths[id(entered)])
        else:
            refusals.append(refusal)
        if refusal is None or is_pair(module):
            settled.append(path)
    kind = type(backbone).__name__
    if len(found) > 1:
        raise MatchError(
            f"{method}: {kind} has several models that take token ids ({', '.join(found)}). Name one of them in "
            f"modified_modules."
        )
    if not found:
        reason = refusals[0] if refusals else "no module has get_input_embeddings(), so its token table is unknown"
        raise MatchError(f"{method} cannot add rows to the input of {kind}: {reason}.")
    return found


def why_not(module: nn.Module) -> str | None:
    """Why no prompt can enter at ``module``; ``None`` if one can.

    >>> why_not(torch.nn.Linear(2, 2))
    'Linear has no get_input_embeddings(), so its token table is unknown'
    """
    kind = type(module).__name__
    if not callable(getattr(module, "get_input_embeddings", None)):
        return f"{kind} has no get_input_embeddings(), so its token table is unknown"
    embedding = input_embedding(module)
    if embedding is None:
        return f"{kind} does not embed its input by a table of tokens"
    names = inspect.signature(type(module).forward).parameters
    passes_on = {parameter.kind for parameter in list(names.values())[1:]} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    if "inputs_embeds" not in names and not passes_on:
        return f"{kind}.forward takes no inputs_embeds"
    return None


class Entrance:
    """The entrance at ``path`` of ``model``, and the modules around it that have to know about a prompt.

    Attributes:
        module, embedding: the module there, and its table of tokens.
        inputs: names of the module's positional inputs.
        decoders: the modules that attend to its states, if it is an encoder.
        labelled: the nearest module at or above the entrance that takes labels for its output.
        head_counts_ids: whether the head above finds the last token of a row in ``input_ids``, and so needs hidden
            states without the prompt.
        first_position: the number of the first position (RoBERTa starts counting after its padding number).
        padding_position: the position number of padding, if positions are counted from ids.
        causal: whether each position attends only to itself and earlier ones.
        behind_padding: whether the prompt has to come between the padding and the text of a row that is padded in
            front. Anything that depends on distances (windows, relative positions, convolutions, the label of the
            first token) then finds them as in the row alone. Where only position numbers matter, the prompt stays in
            front of the padding, because heads look at the first position there.

    >>> from transformers import RobertaConfig, RobertaModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> entrance = Entrance(RobertaModel(RobertaConfig(vocab_size=20, **sizes)), "")
    >>> entrance.positions({"input_ids": torch.tensor([[1, 5, 6]])})
    {'position_ids': tensor([[1, 2, 3]])}
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.module = model.get_submodule(path)
        embedding = input_embedding(self.module)
        assert embedding is not None
        self.embedding = embedding
        self.inputs = inputs_of(self.module)
        above = [model.get_submodule(part) for part in prefixes(path)]
        pair = [module for module in above if is_pair(module)]
        self.decoders = _decoders(model, path) if pair else []
        takes_labels = [module for module in above if not LABELS.isdisjoint(inputs_of(module))]
        self.labelled = None if pair or not takes_labels else takes_labels[0]
        self.head_counts_ids = not pair and any(_counts_ids(module) for module in above)
        self.padding_position = padding_position(self.module, embedding)
        self.first_position = 0 if self.padding_position is None else self.padding_position + 1
        self.causal = is_causal(self.module)
        self.behind_padding = self.causal or not position_tables(self.module, embedding)
        self._limit = _position_limit(self.module, embedding, self.first_position)

    def positions(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """The position numbers that the model would count from ids; it gets embeddings instead, so they are given.

        Padding has none. Positions behind the text that the mask hides are counted, as models do for embeddings.
        """
        if self.padding_position is None or given.get("position_ids") is not None or "position_ids" not in self.inputs:
            return {}
        tokens, mask = given["input_ids"].ne(self.padding_position).int(), given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == tokens.shape:
            tokens = tokens | mask.ne(0).flip(1).cumsum(1).flip(1).eq(0).int()
        return {"position_ids": (tokens.cumsum(1) * tokens).long() + self.padding_position}

    def identities(self, given: dict[str, Any], rows: int) -> dict[str, Tensor]:
        """The second embeddings of all tokens, with ``rows`` more in front, for a model that has such embeddings.

        The rows of a prompt are not tokens. They get what the padding token has, as images do in such models.
        """
        look_up: Any = getattr(self.module, SECOND_TABLE, None)
        if look_up is None or SECOND_INPUT not in self.inputs or not getattr(self.module, SECOND_WIDTH, True):
            return {}
        token = getattr(getattr(self.module, "config", None), "pad_token_id", None) or 0
        ids, known, x = given.get("input_ids"), given.get(SECOND_INPUT), given.get("inputs_embeds")
        if ids is not None:
            return {SECOND_INPUT: look_up(before(ids, rows, token))}
        if known is None and "inputs_embeds" in inspect.signature(look_up).parameters:
            known = look_up(None, x)  # it finds the tokens by comparing embeddings
        if known is None:
            return {}
        like = torch.full((known.shape[0], rows), token, device=known.device)
        return {SECOND_INPUT: torch.cat([look_up(like), known], 1)}

    def check_length(self, total: int, without: int) -> None:
        """Raise if the model has fewer than ``total`` positions; ``without`` of them are the text's."""
        if self._limit is not None and total > self._limit:
            raise ParamsError(
                f"{self.path or type(self.module).__name__} has {self._limit} positions, but the prompt "
                f"({total - without}) and the text ({without}) need {total}: shorten the text to "
                f"{self._limit - total + without}, or the prompt."
            )


def _inside(module: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder, else the transformer below the head."""
    if is_pair(module):
        encoder = getattr(module, "get_encoder")()  # noqa: B009
        return encoder if isinstance(encoder, nn.Module) else module
    base = getattr(module, "base_model", module)
    base = base if hasattr(base, "get_input_embeddings") else module
    # Some bases only wrap one stack (OPT's), and the causal head calls the stack directly: enter there.
    stack = getattr(base, "get_decoder")() if hasattr(base, "get_decoder") else base  # noqa: B009
    same = hasattr(stack, "get_input_embeddings") and input_embedding(stack) is input_embedding(base)
    return stack if same else base


def _decoders(model: nn.Module, path: str) -> list[nn.Module]:
    """The outermost modules, neither above nor below ``path``, that attend to an encoder."""
    found: dict[str, nn.Module] = {}
    for at, module in model.named_modules():
        if within(at, path) or within(path, at) or any(within(at, other) for other in found):
            continue
        names = inspect.signature(type(module).forward).parameters
        if "encoder_attention_mask" in names and "encoder_hidden_states" in names:
            found[at] = module
    return list(found.values())


def _counts_ids(module: nn.Module) -> bool:
    """Whether the module's forward finds the last token of a row by looking for padding in its ids."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {"pad_token_id", "argmax"} <= set(code.co_names)


def _position_limit(module: nn.Module, embedding: nn.Module, first: int) -> int | None:
    """How many positions a table of absolute positions has; ``None`` where positions are relative or computed."""
    tables = [table for _, table in position_tables(module, embedding)]
    return min((table.num_embeddings - int(getattr(table, "offset", first)) for table in tables), default=None)


def embedded_tokens(embedding: nn.Embedding, count: int) -> Tensor:
    """The embeddings (count, d) of the tokens 0 … count-1, scaled as the embedding's forward scales them."""
    from ..structures.modules.structure import copy_structure

    with torch.no_grad():
        private = copy_structure(embedding, trains=False)
        return private(torch.arange(count, device=embedding.weight.device)).detach().clone()
