"""What a model's forward takes: the names of its inputs, and whether ``use_cache=False`` can be passed to it."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from typing import Any

from torch import nn

from ..transforms import constant_while_tracing

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_known_parameters: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_known_answers: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def _forward(model: nn.Module) -> tuple[Any, bool]:
    """The function that a call runs, and whether it still expects ``self``."""
    compiled = vars(model).get("_modules", {}).get("_orig_mod")
    if isinstance(compiled, nn.Module):  # the wrapper that torch.compile returns has (*args, **kwargs)
        return _forward(compiled)
    own = vars(model).get("forward")
    return (type(model).forward, True) if own is None else (own, False)


def _parameters(model: nn.Module) -> dict[str, Any]:
    """The kind of every parameter of the forward, by name and in order."""
    function, unbound = _forward(model)
    try:
        if function not in _known_parameters:
            found = inspect.signature(function).parameters
            _known_parameters[function] = {name: parameter.kind for name, parameter in found.items()}
        kinds = _known_parameters[function]
    except (TypeError, ValueError):  # no signature (TorchScript), or a function without weak references
        return {}
    return dict(list(kinds.items())[1:]) if unbound else kinds


@constant_while_tracing
def positional_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the inputs that can be given by position, in order.

    >>> positional_names(torch.nn.Bilinear(2, 2, 2))
    ('input1', 'input2')
    """
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return tuple(name for name, kind in _parameters(model).items() if kind not in (*_VARIADIC, keyword_only))


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter called ``name``.

    >>> accepts(torch.nn.Linear(2, 2), "input"), accepts(torch.nn.Linear(2, 2), "weight")
    (True, False)
    """
    return _parameters(model).get(name, _VARIADIC[0]) not in _VARIADIC


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with ``use_cache=False``, if the model understands it and the caller does not give it.

    A cache in the output could be neither mapped nor split by member.

    >>> class Decoder(torch.nn.Linear):
    ...     def forward(self, x, use_cache=True):
    ...         return super().forward(x)
    >>> without_cache(Decoder(2, 2), {"x": 1}), without_cache(torch.nn.Linear(2, 2), {"input": 1})
    ({'x': 1, 'use_cache': False}, {'input': 1})
    """
    return {**kwargs, "use_cache": False} if "use_cache" not in kwargs and takes_use_cache(model) else kwargs


@constant_while_tracing
def takes_use_cache(model: nn.Module) -> bool:
    """Whether the model's forward takes ``use_cache``: by name, or through ``**kwargs`` to a module that does.

    Through ``**kwargs`` only if the config knows it, and either ``generate`` passes it as well, or the source shows
    that ``**kwargs`` reaches, untouched, a module that takes it by name.
    """
    function = _forward(model)[0]
    try:
        known = _known_answers.get(model)
        # The answer is outdated if forward was replaced on the instance, as accelerate's hooks do.
        if known is None or known[0] != function:
            known = _known_answers[model] = function, _takes_use_cache(model)
        return known[1]
    except TypeError:  # a module that cannot be hashed
        return _takes_use_cache(model)


def _takes_use_cache(model: nn.Module) -> bool:
    if accepts(model, "use_cache"):
        return True
    config = getattr(model, "config", None)
    known = hasattr(config, "use_cache") or hasattr(getattr(config, "text_config", None), "use_cache")
    if not known or inspect.Parameter.VAR_KEYWORD not in _parameters(model).values():
        return False
    if hasattr(model, "prepare_inputs_for_generation"):
        return True
    inner = {_forward(module)[0]: module for module in model.modules() if module is not model}
    passing = [f for f, m in inner.items() if inspect.Parameter.VAR_KEYWORD in _parameters(m).values()]
    decided = [function for function in passing if not accepts(inner[function], "use_cache")]
    return (
        any(accepts(module, "use_cache") for module in inner.values())
        and _passes_on(_forward(model)[0])
        and not any(map(_decides_itself, decided))
    )


def _passes_on(function: Any) -> bool:
    """Whether a forward only passes its ``**kwargs`` on, and passes no ``use_cache=`` of its own."""
    tree = _source(function)
    if tree is None or tree.args.kwarg is None or _decides_itself(function):
        return False
    name = tree.args.kwarg.arg
    handed_on = [
        keyword.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name)
    ]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    return bool(uses) and all(any(use is value for value in handed_on) for use in uses)


def _decides_itself(function: Any) -> bool:
    """Whether the source of a forward passes ``use_cache=``: with one in ``**kwargs`` as well, Python would raise."""
    tree = _source(function)
    return tree is None or any(isinstance(n, ast.keyword) and n.arg == "use_cache" for n in ast.walk(tree))


def _source(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None
