"""What is public: ``fd``'s names and those of its namespaces, and what each must have: docstring, types, example."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import funcdelta as fd

from ...methods.config import BaseDeltaConfig
from .docstring import Docstring


def names_of(module: ModuleType) -> list[str]:
    """The names that a module promises: its ``__all__``, else the functions and classes that it defines.

    >>> names_of(fd.metrics)
    ['accuracy', 'calibration_error', 'negative_log_likelihood', 'summary']
    """
    own = [name for name, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
    here = [name for name in own if vars(module)[name].__module__ == module.__name__ and not name.startswith("_")]
    return getattr(module, "__all__", here)


def everything(module: ModuleType = fd, path: str = "fd") -> Iterator[tuple[str, Any]]:
    """Every public name in ``module`` and in the namespaces below it, with what it is.

    >>> dict(everything())["fd.optim.adamw"] is fd.optim.adamw
    True
    """
    for name in names_of(module):
        value = getattr(module, name)
        yield f"{path}.{name}", value
        if isinstance(value, ModuleType):
            yield from everything(value, f"{path}.{name}")


@functools.cache
def public_classes() -> frozenset[type]:
    """The classes that have a public name."""
    return frozenset(value for _, value in everything() if inspect.isclass(value))


def members_of(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that ``cls`` brings: its own, and those of bases that are not public.

    A method that fills in what a public base describes has no docstring of its own, and is left to that base.

    >>> [name for name, _ in members_of(fd.Resident)][:3]
    ['of', 'put', 'replace']
    """
    hidden = [base for base in cls.__mro__[1:] if base.__module__.startswith("funcdelta")]
    for home in [cls, *(base for base in hidden if base not in public_classes())]:
        for name, value in vars(home).items():
            function = function_of(value)
            if name.startswith("_") or function is None:
                continue
            if function.__doc__ or not inspect.getdoc(getattr(cls, name)):
                yield name, value


def function_of(value: Any) -> Any:
    """The function behind a method, a class method or a property; ``None`` for anything else.

    >>> function_of(vars(fd.DeltaModel)["shapes"]).__name__
    'shapes'
    """
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    function = getattr(value, "__func__", value)
    return function if inspect.isfunction(function) else None


def fields_of(cls: type) -> dict[str, Any]:
    """``{field: default}`` of the fields that ``cls`` itself declares; without a default, ``Parameter.empty``.

    >>> fields_of(fd.BitFitConfig), fields_of(fd.methods.Leaf)["of"]
    ({}, 'member')
    """
    own = vars(cls).get("__annotations__", {})
    if dataclasses.is_dataclass(cls):
        fields = [field for field in dataclasses.fields(cls) if field.name in own]
        return {field.name: _default_of(field) for field in fields if not field.name.startswith("_")}
    defaults = getattr(cls, "_field_defaults", {})
    return {name: defaults.get(name, inspect.Parameter.empty) for name in getattr(cls, "_fields", ()) if name in own}


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def untyped(function: Any) -> list[str]:
    """The parameters of ``function`` that have no type, and ``return`` where what it gives has none.

    >>> untyped(lambda x: x), untyped(fd.take)
    (['x', 'return'], [])
    """
    signature = inspect.signature(function)
    found = [name for name, each in signature.parameters.items() if each.annotation is each.empty]
    found += ["return"] if signature.return_annotation is signature.empty else []
    return [name for name in found if name not in ("self", "cls")]


def lacking(path: str, value: Any) -> list[str]:
    """What the public name ``path`` lacks, one line each; nothing where all is there.

    A namespace needs a docstring, and a class's methods need docstrings and types: the examples are those of the
    names and of the classes. A config's fields each need a description.

    >>> lacking("fd.take", lambda x: x)
    ['fd.take has no docstring', 'fd.take has no example (>>>) in its docstring', 'fd.take has no types for x, return']
    """
    text = Docstring.of(value)
    found = [] if text.first else [f"{path} has no docstring"]
    if isinstance(value, ModuleType):
        return found
    found += [] if text.examples else [f"{path} has no example (>>>) in its docstring"]
    functions = {path: value}
    if inspect.isclass(value):
        functions = {f"{path}.{name}": function_of(member) for name, member in members_of(value)}
        found += [f"{name} has no docstring" for name, each in functions.items() if not Docstring.of(each).first]
        if "__init__" in vars(value) and not dataclasses.is_dataclass(value):
            functions[path] = value.__init__
        if issubclass(value, BaseDeltaConfig):
            described = text.described("Attributes")
            found += [f"{path}.{name} is not described" for name in fields_of(value) if name not in described]
    missing = ((name, ", ".join(untyped(function))) for name, function in functions.items())
    return found + [f"{name} has no types for {names}" for name, names in missing if names]
