"""Widths and numbers of heads that cannot be read off a site's weights: measured by running an example once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MatchError
from ..methods.site import AttentionShape, Shapes
from ..randomness import private_random
from ..structures.modules.interface import uses_interface
from .attention import open_attention, shape_of
from .hidden import hidden_input, hidden_output
from .skeleton import Skeleton

Example = Mapping[str, Any] | Sequence[Any] | None


def measure_shapes(backbone: nn.Module, paths: list[str], example: Example) -> dict[str, Shapes]:
    """The shapes of the hidden input and output at each of ``paths``.

    The input's is ``None`` if no features enter: token ids, or no tensor at all.
    """
    shapes: dict[str, Shapes] = {}

    def note(path: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shapes[path] = _shape_in(path, args, kwargs), tuple(hidden_output(path, output)[0].shape)

        module.register_forward_hook(hook, with_kwargs=True)

    _run(backbone, paths, example, note, "The width")
    for path in paths:
        if path not in shapes:
            raise MatchError(f"{path} did not run on the example. Name a module that runs, or give another example.")
    return shapes


def measure_attention(backbone: nn.Module, paths: list[str], example: Example) -> dict[str, AttentionShape]:
    """Heads and sizes of the keys and values that the module at each of ``paths`` passes to its attention function."""
    shapes: dict[str, AttentionShape] = {}
    closed = next((path for path in paths if not uses_interface(backbone.get_submodule(path))), None)
    if closed is not None:
        raise MatchError(
            f"{closed} ({type(backbone.get_submodule(closed)).__name__}) does not go through Transformers' attention "
            f"interface, so no method can act within its attention: leave it out with exclude_modules=."
        )

    def note(path: str, module: nn.Module) -> None:
        def attention(original: Any, _: str, module: nn.Module, *args: Tensor, **kwargs: Any) -> Any:
            shapes[path] = shape_of(*args[:3])
            return original(module, *args, **kwargs)

        open_attention(path, module, attention)

    _run(backbone, paths, example, note, "The number of heads")
    for path in paths:
        if path not in shapes:
            raise MatchError(
                f"{path} ({type(backbone.get_submodule(path)).__name__}) did not go through Transformers' attention "
                f"interface when the example ran, so no method can act within its attention: leave it out with "
                f"exclude_modules=, or give another example."
            )
    return shapes


def _run(
    backbone: nn.Module, paths: list[str], example: Example, note: Callable[[str, nn.Module], None], what: str
) -> None:
    """Call ``note(path, module)`` for the module at each path of a private copy, then run the example on the copy.

    It runs in evaluation mode, without gradients and global random numbers.
    """
    trials = _own_trials(backbone, paths) if example is None else {"": example}
    if not trials:
        raise MatchError(
            f"{what} of {paths[0]} ({type(backbone.get_submodule(paths[0])).__name__}) cannot be read off its "
            f"weights. Build the delta with example=inputs (a dict of keyword inputs, or a tuple)."
        )
    skeleton = Skeleton(backbone, None, False, None)
    for path in paths:
        note(path, skeleton.module.get_submodule(path))
    with torch.no_grad(), private_random(0):
        for owner, given in trials.items():
            try:
                model = skeleton.module.get_submodule(owner)
                if isinstance(given, Mapping):
                    model(**given)
                else:
                    model(*given)
            except MatchError:
                raise
            except Exception as error:
                source = "example" if example is not None else "the model's own dummy_inputs; give example=inputs"
                raise MatchError(
                    f"{what} of {paths[0]} has to be measured, but the backbone fails on {source}: {error}"
                ) from error


def _own_trials(backbone: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """``{path of a model: its dummy inputs}`` of the outermost models around ``paths`` that have some."""
    found: dict[str, Any] = {}
    for path in paths:
        tokens = path.split(".")
        for owner in (".".join(tokens[:end]) for end in range(len(tokens))):
            given = _dummy_inputs(backbone.get_submodule(owner))
            if given is not None:
                found[owner] = given
                break
    return found


def _dummy_inputs(backbone: nn.Module) -> Any:
    """The dummy inputs of a Transformers model; an image, if it takes nothing else."""
    config = getattr(backbone, "config", None)
    if getattr(backbone, "main_input_name", None) == "pixel_values" and isinstance(
        getattr(config, "image_size", None), int
    ):
        size, channels = getattr(config, "image_size"), getattr(config, "num_channels", 3)  # noqa: B009  (typed Any)
        return {"pixel_values": torch.zeros(1, channels, size, size, dtype=getattr(backbone, "dtype", None))}
    return getattr(backbone, "dummy_inputs", None)


def _shape_in(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    try:
        x = hidden_input(path, args, kwargs)[0]
    except MatchError:  # most methods need only the output's width; one that needs this one will say so
        return None
    return tuple(x.shape) if x.ndim and x.is_floating_point() else None
