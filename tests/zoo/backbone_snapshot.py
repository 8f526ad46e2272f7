"""Takes down everything about a module that a delta must leave alone, and compares bit for bit.

``before = snapshot(backbone)``, then the work, then ``assert_unchanged(backbone, before)``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SHOWN = 20  # differences named in the error
_HOLDERS = ("_parameters", "_buffers", "_modules")


def _bytes(tensor: Tensor) -> bytes:
    """The values as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return b"".join(_bytes(getattr(tensor, part)) for part in parts)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor_facts(tensor: Tensor) -> dict[str, Any]:
    """What can change about one tensor: object, storage, layout, bytes, flags and gradient."""
    return {
        "identity": tensor,
        "bytes": _bytes(tensor),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "address": tensor.data_ptr(),
        "requires_grad": tensor.requires_grad,
        "version": tensor._version,
        "grad": tensor.grad if tensor.is_leaf else None,
        "grad bytes": _bytes(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None,
    }


def _entries(value: Any) -> Any:
    """The entries of a plain container, kept so that no identity is reused; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return None


def _module_facts(module: nn.Module) -> dict[str, Any]:
    """What can change about one module itself: class, training flag, hooks, attributes."""
    own = vars(module)
    hooks = {name: _entries(value) for name, value in own.items() if name.endswith("_hooks")}
    hooks |= {name: _entries(value) for name, value in own.items() if "_hooks_" in name}
    holders = {name: _entries(own[name]) for name in _HOLDERS}
    apart = {*hooks, *holders, "training"}
    return {
        "class": type(module),
        "training": module.training,
        "hooks": hooks,
        "holders": holders,
        "attributes": {name: value for name, value in own.items() if name not in apart},
        "entries": {name: _entries(value) for name, value in own.items() if name not in apart},
    }


def _config_facts(module: nn.Module) -> dict[str, Any]:
    """Copies of what the module's ``config`` and ``generation_config`` say, public and private."""
    facts: dict[str, Any] = {}
    for name in ("config", "generation_config"):
        config = vars(module).get(name)
        if config is not None and hasattr(config, "to_dict"):
            facts[name] = {"to_dict": config.to_dict(), "attributes": copy.deepcopy(vars(config))}
    return facts


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        **{f"parameter {name}": value for name, value in module.named_parameters(remove_duplicate=False)},
        **{f"buffer {name}": value for name, value in module.named_buffers(remove_duplicate=False)},
    }


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything about ``module`` that ``assert_unchanged`` compares; keep it as long as it is needed.

    Parameters and buffers: object, storage, layout, bytes, ``requires_grad``, version counter, gradient.
    Modules: class, training flag, every dict of hooks, every instance attribute (by identity, and the entries
    of plain containers). Configs: ``to_dict()`` and private fields. The order of all of these too.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    return {
        "tensors": {name: _tensor_facts(tensor) for name, tensor in _tensors(module).items()},
        "modules": {path: _module_facts(value) for path, value in modules.items()},
        "objects": modules,
        "configs": {path: _config_facts(value) for path, value in modules.items()},
    }


def _same(before: Any, after: Any) -> bool:
    """Identity for objects, equality for what is immutable, entry by entry for containers."""
    if before is after:
        return True
    if isinstance(before, dict) and isinstance(after, dict):
        return list(before) == list(after) and all(_same(before[key], after[key]) for key in before)
    if isinstance(before, (list, tuple)) and type(before) is type(after):
        return len(before) == len(after) and all(map(_same, before, after))
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device, type)
    return type(before) is type(after) and isinstance(before, plain) and before == after


def _show(value: Any) -> str:
    """A value in a few words: no dump of a tensor, of bytes or of a module."""
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} tensor"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _compare(where: str, before: dict[Any, Any], after: dict[Any, Any]) -> list[str]:
    """One line for each key that went, came or differs, and one where only the order of the keys differs."""
    found = [f"{where}: {key} is gone" for key in before if key not in after]
    found += [f"{where}: {key} is new" for key in after if key not in before]
    for key, old in before.items():
        if key not in after or _same(old, new := after[key]):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _compare(f"{where}: {key}", old, new)
        elif key == "identity" or _show(old) == _show(new):
            found.append(f"{where}: {key} changed ({_show(old)})")
        else:
            found.append(f"{where}: {key} was {_show(old)}, is {_show(new)}")
    if not found and list(before) != list(after):
        found.append(f"{where}: the order changed from {_show(list(before))} to {_show(list(after))}")
    return found


def _compare_configs(path: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The fields of configs that differ in value; configs hold nested plain data, compared by equality."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        for part in ("to_dict", "attributes"):
            old, new = before.get(name, {}).get(part, {}), after.get(name, {}).get(part, {})
            changed = [key for key in old.keys() | new.keys() if repr(old.get(key)) != repr(new.get(key))]
            found += [f"{path}: {name}.{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in sorted(changed)]
    return found


def differences(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """What of ``module`` differs from the snapshot, one line each; empty where nothing does."""
    after = snapshot(module)
    found = _compare("modules", before["objects"], after["objects"])
    found += _compare("tensors", before["tensors"], after["tensors"])
    for path in [path for path in before["modules"] if path in after["modules"]]:
        where = f"module {path or '(root)'}"
        found += _compare(where, before["modules"][path], after["modules"][path])
        found += _compare_configs(where, before["configs"][path], after["configs"][path])
    return found


def assert_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    """Raises ``AssertionError`` that names each difference between ``module`` now and its snapshot."""
    found = differences(module, before)
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines = "\n  ".join(found[:SHOWN])
        raise AssertionError(f"{type(module).__name__} changed in {len(found)} ways:\n  {lines}{more}")
