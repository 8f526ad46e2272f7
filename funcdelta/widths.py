"""Widths of what enters and leaves, where weights do not tell: measured by one run of an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import MatchError
from .hidden import hidden_input, hidden_output
from .skeleton import Skeleton


def measure_widths(
    backbone: nn.Module, paths: list[str], example: Mapping[str, Any] | Sequence[Any] | None
) -> dict[str, tuple[int | None, int]]:
    """The sizes of the last axes of the hidden input and output at each of ``paths``.

    The first is ``None`` where no features enter: numbers of tokens, or no tensor at all.

    Runs in evaluation mode, without gradients and random numbers, on a private copy of the structure.
    """
    given = example
    if given is None:
        given = getattr(backbone, "dummy_inputs", None)
    if given is None:
        raise MatchError(
            f"The width of {paths[0]} ({type(backbone.get_submodule(paths[0])).__name__}) cannot be read off its "
            f"weights: "
            f"build the delta with example=inputs (a dict of keywords, or a tuple)."
        )
    skeleton = Skeleton(backbone, None, False, None)
    widths: dict[str, tuple[int | None, int]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            widths[path] = _features_in(path, args, kwargs), hidden_output(path, output)[0].shape[-1]

        return hook

    for path in paths:
        skeleton.module.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng():
        try:
            if isinstance(given, Mapping):
                skeleton.module(**given)
            else:
                skeleton.module(*given)
        except MatchError:
            raise
        except Exception as error:
            source = "example" if example is not None else "the model's own dummy_inputs; give example=inputs"
            raise MatchError(
                f"The width of {paths[0]} has to be measured, but the backbone fails on {source}: {error}"
            ) from error
    missed = [path for path in paths if path not in widths]
    if missed:
        raise MatchError(
            f"{missed[0]} was not called by the example: name a module that runs, or give another example."
        )
    return widths


def _features_in(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    try:
        x = hidden_input(path, args, kwargs)[0]
    except MatchError:  # most methods look at what leaves only; one that needs the width says that it is not known
        return None
    return x.shape[-1] if x.ndim and x.is_floating_point() else None
