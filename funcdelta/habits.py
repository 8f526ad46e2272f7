"""Habits from modules and from OpenDelta that mean something else here: each raises with the line to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import ParamsError
from .match import near

INSTEAD = {
    "state_dict": "params, or fd.stack([params, ...])",
    "load_state_dict": "delta, params = fd.AutoDeltaModel.from_finetuned(path, backbone_model=backbone)",
    "parameters": "params.values()",
    "named_parameters": "params.items()",
    "to": "params = fd.tree.map(lambda leaf: leaf.to(...), params)",
    "cuda": 'params = fd.tree.map(lambda leaf: leaf.to("cuda"), params)',
    "delta_modules": "params",
    "config": "delta.configs",
    "modified_modules": "delta.sites",
    "set_active_state_dict": "delta.save_finetuned(params, path), which writes the delta alone",
    "generate": "delta.bind(params).generate(...)",
    "modules": "delta.bind(params).modules()",
    "stat": "stats = delta.log(params)",
    "num_trainable_parameters": "fd.num_trainable_parameters(delta, params)",
    "num_total_parameters": "fd.num_total_parameters(delta, params)",
    "trainable_parameters_names": "fd.trainable_parameters_names(delta, params)",
    "frozen_parameters_names": "fd.frozen_parameters_names(delta, params)",
    "requires_grad_": "trainable, rest = fd.partition(params, delta.trainable)",
}
"""Habits from modules and from OpenDelta, and the line to write instead."""


class Habits:
    """The methods of a module that a delta, which has no state, cannot have."""

    def train(self, mode: bool = True) -> NoReturn:
        """Raises: a delta has no state to switch."""
        raise ParamsError(f"A delta is never changed: write delta = delta.mode(train={bool(mode)}).")

    def eval(self) -> NoReturn:
        """Raises: a delta has no state to switch."""
        raise ParamsError("A delta is never changed: write delta = delta.mode(train=False).")

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: OpenDelta's deltas have no forward either."""
        raise ParamsError("A delta runs with params: write delta.apply(params, inputs...).")

    def __getattr__(self, name: str) -> NoReturn:
        if name in INSTEAD:
            raise AttributeError(
                f"A delta has no {name}: its state is params, a dict of tensors. Write {INSTEAD[name]}."
            )
        names = [known for known in dir(type(self)) if not known.startswith("_")]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{near(name, names)}")


def need_dict(value: Any, method: str, line: str) -> Mapping[str, Any]:
    """``value`` if it is a dict of tensors; else an error with the line to write."""
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else type(value).__name__
        raise ParamsError(f"{method} changes no module; it takes a dict of tensors, found {found}. Write {line}.")
    return value
