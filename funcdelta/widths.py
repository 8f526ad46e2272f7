"""Shapes that weights do not tell: measured by running an example through the backbone's structure once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import MatchError
from .hidden import hidden_output
from .skeleton import Skeleton


def measure_shapes(
    backbone: nn.Module, paths: list[str], example: Mapping[str, Any] | Sequence[Any] | None
) -> dict[str, tuple[int, ...]]:
    """The shape of the hidden output at each of ``paths``.

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
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shapes[path] = tuple(hidden_output(path, output)[0].shape)

        return hook

    for path in paths:
        skeleton.module.get_submodule(path).register_forward_hook(note(path))
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
    missed = [path for path in paths if path not in shapes]
    if missed:
        raise MatchError(
            f"{missed[0]} was not called by the example: name a module that runs, or give another example."
        )
    return shapes
