"""What a call tells of its texts: which tokens are real, where each stands in its text, how many there are, and cached.

Of a text model's input (rows, tokens), its mask M of all tokens so far and c cached ones: ``mask = M[:, c:]``,
``positions = (ΣM - 1)[:, c:]`` with sums over the tokens up to each, -1 where the mask is 0, and ``lengths = ΣM``.
Numbers of positions that were given by hand (packed texts begin again within a row) count instead of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MatchError, ParamsError
from ..transforms import is_wrapped
from .positions import seen_length
from .text_model import input_embedding, inputs_of, prefixes, takes_text

MEMORIES = ("mems", "cache_params", "state", "past_buckets_states")
"""Memories that do not tell how many tokens they hold."""


def text_model_of(root: nn.Module, path: str) -> str:
    """The path of the innermost module at or above ``path`` that takes the text whose tokens pass through ``path``.

    Raises ``MatchError`` where there is none, or where another module beside ``path`` takes that text.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    >>> text_model_of(gpt2, "transformer.h.0.mlp")
    'transformer'
    """
    at = next((above for above in prefixes(path) if _reads_tokens(root.get_submodule(above))), None)
    if at is None:
        raise MatchError(f"no module around {path} takes input_ids and an attention_mask")
    inner = root.get_submodule(at).named_modules()
    other = next((name for name, module in inner if name and _reads_tokens(module)), None)
    if other is not None:
        within = f"{at}.{other}" if at else other
        raise MatchError(f"the text goes through {within}, and {path or 'the model'} is not a part of it")
    return at


def _reads_tokens(module: nn.Module) -> bool:
    """Whether the module is given a text: an encoder of images takes embeddings and a mask, too, but no ids."""
    return takes_text(module) and ("input_ids" in inputs_of(module) or input_embedding(module) is not None)


class Text(NamedTuple):
    """The input of one call of a text model.

    Attributes:
        rows, tokens, device: of its ids or embeddings.
        cached: how many tokens were cached before.
        mask: of all tokens so far, (rows, cached + tokens), bool; ``None``: all are real.
        refused: why the mask is not known.
        numbers: of the positions, from 0 on, as somebody gave them by hand.
        others: hidden values that are not of this text, such as an encoder's states.
    """

    rows: int
    tokens: int
    device: torch.device
    cached: int
    mask: Tensor | None
    refused: str
    numbers: Tensor | None
    others: tuple[Tensor, ...]


def read_text(given: dict[str, Any], mask: Any, by_hand: Any, first: int) -> Text:
    """What ``given`` to a text model tells, by name; ``mask`` and positions ``by_hand`` are what the caller gave.

    ``first`` is the number of a text's first position. What is not understood is refused later, by who wants it.

    >>> ids, rows = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 0]])
    >>> text = read_text({"input_ids": ids}, rows, by_hand=None, first=0)
    >>> positions(text), lengths(text)
    (tensor([[-1,  0,  1],
            [ 0,  1, -1]]), tensor([2, 2]))
    """
    ids, x = given.get("input_ids"), given.get("inputs_embeds")
    like = ids if x is None else x
    if not isinstance(like, Tensor) or like.ndim != (2 if x is None else 3):
        found = tuple(like.shape) if isinstance(like, Tensor) else type(like).__name__
        return Text(0, 0, torch.device("cpu"), 0, None, f"its input is {found}, not (rows, tokens)", None, ())
    rows, tokens = like.shape[:2]
    cached, refused = _cached(given)
    others = tuple(t for name, t in given.items() if name != "inputs_embeds" and isinstance(t, Tensor) and t.ndim == 3)
    whole, why = _whole_mask(mask, rows, tokens, cached)
    numbers = None
    if isinstance(by_hand, Tensor) and by_hand.ndim < 3 and not cached:  # others tell places in images, too
        fits = by_hand.shape in ((tokens,), (1, tokens), (rows, tokens))
        why = why or ("" if fits else f"its position_ids are {tuple(by_hand.shape)}, and there are {tokens} tokens")
        numbers = _from_zero(by_hand.to(torch.int64).expand(rows, tokens), whole, first) if fits else None
    return Text(rows, tokens, like.device, cached, whole, refused or why, numbers, others)


def _from_zero(numbers: Tensor, real: Tensor | None, first: int) -> Tensor:
    """``numbers`` from 0 on, of a model that begins with ``first``, for which not everybody does (``generate``)."""
    if not first or not numbers.numel():
        return numbers
    smallest = (numbers if real is None else torch.where(real, numbers, first)).amin()
    return numbers - torch.where(smallest >= first, first, 0)


def _cached(given: dict[str, Any]) -> tuple[int, str]:
    memory = next((name for name in MEMORIES if given.get(name) is not None), None)
    if memory is not None:
        return 0, f"{memory} does not tell how many tokens were read already"
    try:
        return seen_length(given), ""
    except ValueError as error:  # a cache of states alone
        return 0, f"its cache does not tell how many tokens it holds ({error})"


def _whole_mask(mask: Any, rows: int, tokens: int, cached: int) -> tuple[Tensor | None, str]:
    """The mask of all tokens so far, and why it is not known."""
    if mask is None:
        return None, ""
    if not isinstance(mask, Tensor):
        return None, f"its attention_mask is a {type(mask).__name__}"
    if mask.ndim != 2:
        says = "says which tokens see each other, not which are text; in generate leave cache_implementation out"
        return None, f"its attention_mask {tuple(mask.shape)} {says}"
    if mask.shape[0] not in (1, rows) or mask.shape[1] != cached + tokens:
        so_far = f"{rows} rows of {cached + tokens} tokens{f', {cached} of them cached' if cached else ''}"
        return None, f"its attention_mask is {tuple(mask.shape)}, and there are {so_far}"
    if mask.is_floating_point() and not readable(mask):
        why = "cannot be told from one that is added in compiled or mapped code; write attention_mask.bool()"
        return None, f"its attention_mask of {mask.dtype} {why}"
    if mask.is_floating_point() and bool((mask < 0).any()):
        return None, "its attention_mask has numbers below 0, as masks that are added have"
    return mask.ne(0).expand(rows, cached + tokens), ""


def readable(tensor: Tensor) -> bool:
    """Whether Python may read the numbers of ``tensor``.

    >>> readable(torch.ones(2)), readable(torch.ones(2, device="meta"))
    (True, False)
    """
    return not (torch.compiler.is_compiling() or is_wrapped(tensor) or tensor.is_meta)


def _all(text: Text) -> Tensor:
    whole = torch.ones(text.rows, text.cached + text.tokens, dtype=torch.bool, device=text.device)
    return whole if text.mask is None else text.mask


def mask(text: Text) -> Tensor:
    """Which tokens of this call are real, (rows, tokens)."""
    return _all(text)[:, text.cached :]


def positions(text: Text) -> Tensor:
    """The number of each token in its own text, (rows, tokens); -1 where it is padding."""
    whole = _all(text)
    found = text.numbers if text.numbers is not None else (whole.cumsum(1) - 1)[:, text.cached :]
    return torch.where(mask(text), found, -1)


def lengths(text: Text) -> Tensor:
    """How many real tokens each row has so far, (rows,)."""
    if text.numbers is not None:
        _check_one_text(text, text.numbers)
    return _all(text).sum(1)


def cached(text: Text) -> Tensor:
    """How many tokens were cached before, a number."""
    return torch.full((), text.cached, dtype=torch.int64, device=text.device)


def _check_one_text(text: Text, numbers: Tensor) -> None:
    """Raise where a row holds several texts: which of them is meant?"""
    real = mask(text)
    if not (readable(numbers) and readable(real)):
        raise ParamsError(
            "position_ids were given by hand, and here, in compiled or mapped code, it cannot be read whether a row "
            "holds several texts: leave position_ids out"
        )
    last = numbers.new_full((text.rows, 1), -1)
    before = torch.where(real, numbers, -1).cummax(1).values
    if bool((real & (numbers <= torch.cat([last, before[:, :-1]], 1))).any()):
        raise ParamsError("position_ids begin again within a row, so it holds several texts, each with its own length")
    first = torch.where(real, numbers, numbers.amax() + 1).amin(1)
    if bool((real.any(1) & (first != 0)).any()):
        raise ParamsError("position_ids do not begin with 0, so a row is the end of a text whose length is not known")


OF_TEXTS: dict[str, Callable[[Text], Tensor]] = {
    "mask": mask,
    "positions": positions,
    "lengths": lengths,
    "cached": cached,
}
"""The conditions that are read off the text."""

A_TOKEN = ("mask", "positions")
"""Those with a value for each token."""
