"""Errors for calls that people know from ``nn.Module`` or OpenDelta: each says what to write here instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .errors import ConfigError, ParamsError
from .match import near

INSTEAD = {
    "state_dict": "params, or fd.stack([params, ...])",
    "load_state_dict": "delta, params = fd.AutoDeltaModel.from_finetuned(path, backbone_model=backbone)",
    "load_checkpoint": "delta, params = fd.AutoDeltaModel.from_finetuned(path, backbone_model=backbone)",
    "save_checkpoint": "delta.save_finetuned(params, path)",
    "parameters": "params.values()",
    "named_parameters": "params.items()",
    "trainable_parameters_names": "fd.inspect.trainable_parameters_names(delta, params)",
    "frozen_parameters_names": "fd.inspect.frozen_parameters_names(delta, params)",
    "num_trainable_parameters": "fd.inspect.num_trainable_parameters(delta, params)",
    "num_total_parameters": "fd.inspect.num_total_parameters(delta, params)",
    "mark_as_delta": "delta.names, or fd.partition(full, delta.names)",
    "to": "params = fd.tree.map(lambda leaf: leaf.to(...), params)",
    "cuda": 'params = fd.tree.map(lambda leaf: leaf.to("cuda"), params)',
    "delta_modules": "params",
    "config": "delta.configs",
    "create_config_from_model": "delta.configs",
    "modified_modules": "delta.sites",
    "set_active_state_dict": "delta.save_finetuned(params, path), which writes the delta alone",
    "generate": "delta.bind(params).generate(...)",
    "modules": "delta.bind(params).modules()",
    "stat": "stats = delta.log(params)",
    "requires_grad_": "trainable, rest = fd.partition(params, delta.trainable)",
    "find_key": "fd.find_key(key, targets)",
    "find_module": "fd.find_module(backbone, key)",
}
"""Attributes of a module or of OpenDelta's delta, with what to write instead."""

REGISTERED = "{call} above a function make(site) that returns an nn.Module"
VERBS = {
    "update_module": "modified_modules=[...] to say where, and a config class, @fd.register(...), to say what",
    "add_all_delta_to_backbone": "delta.apply(params, inputs...), which needs nothing in the backbone",
    "replace_module": REGISTERED.format(call='@fd.register_module("name", insert="replace")'),
    "modify_module": "a config class, @fd.register(...), whose weights(self, site, p, w) rewrites the site's tensors",
    "insert_module": REGISTERED.format(call='@fd.register_module("name", insert="before" or another)'),
    "insert_sequential_module": REGISTERED.format(call='@fd.register_module("name", insert="sequential")'),
    "insert_parallel_module": REGISTERED.format(call='@fd.register_module("name", insert="parallel")'),
}
"""OpenDelta's methods that change the backbone, with their counterparts here."""

FUNCTIONS = {
    "set_axis_order": "axis_order=(...) in the config, which holds for that config's sites",
    "DeltaBase": "fd.DeltaModel(backbone, config), or fd.BaseDeltaConfig for a method of your own",
    "Visualization": "fd.inspect.structure_graph(model), or delta.log(params)",
    "inspect_optimizer_statistics": "fd.inspect.inspect_optimizer(optimizer)",
    "CommonStructureMap": "fd.inspect.common_names(model)",
}
"""OpenDelta's functions that do not exist here, with what to write instead."""

DEAD_OPTIONS = {
    "state_dict": (None, "pass the params to save as the first argument"),
    "finetuned_delta_path": (None, "write delta.save_finetuned(params, path)"),
    "repo_path_or_name": (None, 'write delta.push_to_hub(params, "user/name")'),
    "use_temp_dir": (None, "push_to_hub always uploads from a temporary folder; leave it out"),
    "save_config": (True, "the config is always written, because params cannot be loaded without it; leave it out"),
    "save_function": (None, "the format is always safetensors; leave it out"),
    "push_to_dc": (False, 'DeltaCenter is not supported: write push_to_hub="user/name"'),
    "center_args": ({}, "it describes an upload to DeltaCenter: put a README.md into the folder instead"),
    "center_args_pool": ({}, "it describes uploads to DeltaCenter: put a README.md into the folder instead"),
    "list_tags": ([], "tags are for DeltaCenter: put them into the README.md of the hub repository"),
    "dict_tags": ({}, "tags are for DeltaCenter: put them into the README.md of the hub repository"),
    "delay_push": (False, "save now and write delta.push_to_hub(params, repo_id) later"),
    "test_result": (None, "results are for DeltaCenter: put them into the README.md of the hub repository"),
    "usage": ("", "a usage note is for DeltaCenter: put it into the README.md of the hub repository"),
}
"""Arguments of OpenDelta's saving functions: ``{name: (value without effect, what to write instead of others)}``."""


def without_dead_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without OpenDelta's, which must have their defaults; other values raise and say what to write.

    >>> without_dead_options("save_finetuned", {"push_to_dc": False, "private": True})
    {'private': True}
    """
    for name, value in options.items():
        harmless, line = DEAD_OPTIONS.get(name, (value, ""))
        if value != harmless:
            raise ConfigError(f"{method} has no {name}: {line}.")
    return {name: value for name, value in options.items() if name not in DEAD_OPTIONS}


def missing_name(name: str, homes: Sequence[str]) -> NoReturn:
    """Raise the ``AttributeError`` of an unknown ``fd.<name>``, with what was probably meant.

    ``homes`` are the namespaces that have the name.

    >>> fd.set_axis_order
    Traceback (most recent call last):
    ...
    AttributeError: funcdelta has no set_axis_order: write axis_order=(...) in the config, which holds for that ...
    >>> fd.clip_by_norm
    Traceback (most recent call last):
    ...
    AttributeError: funcdelta has no clip_by_norm: write fd.optim.clip_by_norm.
    """
    instead = FUNCTIONS.get(name) or " or ".join(f"fd.{home}.{name}" for home in homes)
    if instead:
        raise AttributeError(f"funcdelta has no {name}: write {instead}.")
    raise AttributeError(f"module 'funcdelta' has no attribute {name!r}.")


class Habits:
    """Methods of a module that a delta cannot have, because it has no state; each raises."""

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
        if name in VERBS:
            raise AttributeError(f"A delta changes no module, so it has no {name}. Write {VERBS[name]}.")
        names = [known for known in dir(type(self)) if not known.startswith("_")]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{near(name, names)}")


def need_dict(value: Any, method: str, line: str) -> Mapping[str, Any]:
    """``value`` if it is a dict; otherwise raises and says what to write."""
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else type(value).__name__
        raise ParamsError(f"{method} takes a dict of tensors and changes no module; found {found}. Write {line}.")
    return value
