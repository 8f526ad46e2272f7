"""The hidden tensor among a module's inputs or outputs, and a function that puts another in its place.

Modules take and return tuples, keywords and Transformers' model outputs; methods see only the hidden tensor in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import MatchError

HIDDEN_NAMES = ("hidden_states", "last_hidden_state", "input", "x")


def hidden_input(
    path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The first positional tensor, else the keyword with a usual name, else the first keyword tensor.

    >>> x, put_back = hidden_input("layer", (), {"mask": None, "hidden_states": torch.ones(2)})
    >>> put_back(x + 1)
    ((), {'mask': None, 'hidden_states': tensor([2., 2.])})
    """
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            return value, lambda new, at=position: ((*args[:at], new, *args[at + 1 :]), kwargs)
    name = _key_of_hidden(kwargs)
    if name is None:
        given = [type(value).__name__ for value in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
        raise MatchError(
            f"The site {path} was called without a tensor (found {', '.join(given) or 'no input'}). Name a module that "
            f"takes one."
        )
    return kwargs[name], lambda new: (args, {**kwargs, name: new})


def hidden_output(path: str, output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor itself, the first tensor of a tuple or list, or the hidden state of a model output.

    >>> y, put_back = hidden_output("layer", (torch.ones(2), None))
    >>> put_back(y + 1)
    (tensor([2., 2.]), None)
    """
    if isinstance(output, Tensor):
        return output, lambda new: new
    if isinstance(output, Mapping):
        name = _key_of_hidden(output)
        if name is not None:
            return output[name], lambda new: type(output)(**{**output, name: new})
    if isinstance(output, (tuple, list)):
        for position, value in enumerate(output):
            if isinstance(value, Tensor):
                return value, lambda new, at=position: _with_item(output, at, new)
    raise MatchError(
        f"The site {path} returns a {type(output).__name__} without a hidden tensor. Name a module that returns a "
        f"tensor, or a tuple or model output that holds one."
    )


def _key_of_hidden(values: Mapping[str, Any]) -> str | None:
    names = [name for name in HIDDEN_NAMES if isinstance(values.get(name), Tensor)]
    return names[0] if names else next((name for name, value in values.items() if isinstance(value, Tensor)), None)


def _with_item(sequence: Any, position: int, new: Tensor) -> Any:
    items = [*sequence[:position], new, *sequence[position + 1 :]]
    if hasattr(sequence, "_make"):
        return sequence._make(items)
    return type(sequence)(items)
