"""What ``weights`` gives: the site's tensors, each in its own shape, under its own name, and none of them written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ConfigError, FuncdeltaError
from ..match import near
from ..methods.acts import Acts
from ..structures.modules.forwards import is_plain
from ..transforms import outside_transforms
from ..trees.drawing import own_defaults

LARGEST = 2**20
"""Layers of more numbers are not tried: another of their kind is, or what a method says is trusted."""


def check_rewritten(changed: Any, own: Mapping[str, Tensor], who: str, path: str) -> None:
    """Raises ``ConfigError`` unless ``changed`` is a dict of tensors, of the shapes that those of ``own`` have.

    >>> check_rewritten({"weight": torch.ones(2, 3)}, {"weight": torch.ones(3, 2)}, "MyConfig.weights", "dense")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: MyConfig.weights gave 'weight' at dense the shape (2, 3); expected (3, 2).
    """
    if not isinstance(changed, Mapping):
        raise ConfigError(
            f"{who} returned {type(changed).__name__} at {path}; expected the site's tensors, as in "
            f'return w | {{"weight": w["weight"] + change}}.'
        )
    for name, tensor in changed.items():
        old = own.get(name)
        if tensor is old:
            continue
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{who} gave {type(tensor).__name__} for {name!r} at {path}; expected a tensor.")
        if old is None:
            continue
        if tensor.shape != old.shape:
            raise ConfigError(
                f"{who} gave {name!r} at {path} the shape {tuple(tensor.shape)}; expected {tuple(old.shape)}."
            )
        if old.is_floating_point() and not tensor.is_floating_point():
            raise ConfigError(f"{who} gave {name!r} at {path} in {tensor.dtype}, and it is {old.dtype}; expected that.")


def try_weights(acts: Acts, module: nn.Module, p: Mapping[str, Tensor], who: str, path: str) -> None:
    """Run ``weights`` once on copies, of a layer of usual size, and check what it gives and that it writes into none.

    A method that writes into ``w`` would change the backbone, so this comes before the first call.

    >>> acts = Acts(weights=lambda p, w: {"weight": w["weight"].mul_(p["gain"])})
    >>> try_weights(acts, nn.Linear(2, 2), {"gain": torch.ones(())}, "MyConfig.weights", "dense")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: MyConfig.weights changed 'weight' of dense in place, which is the backbone's own: ...
    """
    parameters = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    if acts.weights is None or not all(is_plain(t) and not t.is_meta for t in parameters.values()):
        return
    if sum(tensor.numel() for tensor in parameters.values()) > LARGEST:
        return
    with torch.inference_mode(False), torch.no_grad(), outside_transforms(), own_defaults():
        w, leaves = _copied(parameters), _copied(p)
        given = {**{f"p[{name!r}]": tensor for name, tensor in leaves.items()}, **w}
        before = {name: tensor._version for name, tensor in given.items()}
        try:
            changed = acts.weights(dict(leaves), dict(w))
        except FuncdeltaError:
            raise
        except Exception:  # the method's own error is told with its site when it is first called
            return
    written = next((name for name, tensor in given.items() if tensor._version != before[name]), None)
    if written is not None:
        what = f"{written!r} of {path} in place, which is the backbone's own" if written in w else f"{written} in place"
        raise ConfigError(
            f'{who} changed {what}: compute with a changed copy, as in return w | {{"weight": w["weight"] * gain}}.'
        )
    check_rewritten(changed, w, who, path)
    unknown = next((name for name in changed if name not in module._parameters), None)
    # What cannot be merged may say what it would add, and add it to the output.
    if unknown is not None and acts.unmergeable is None and not is_parametrized(module, unknown):
        raise ConfigError(
            f"{who} gave {unknown!r}, and {path} ({type(module).__name__}) has no such tensor."
            f"{near(unknown, list(parameters))}"
        )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In double precision, on the CPU."""
    copied = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in copied.items()}
