"""Makes a method of any ``nn.Module`` m: a site's output becomes ``m(y)``, ``y + m(x)`` or ``m(x)``, or its input m(x).

The module is a template. It is built once per site on the meta device, without memory, and run by
``torch.func.functional_call`` with one member's tensors. Its parameters are the leaves, its buffers the constants.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import ConfigError
from .match import near
from .methods.config import BaseDeltaConfig, register
from .methods.leaf import Leaf
from .methods.site import Site
from .randomness import private_random
from .transforms import outside_transforms

MakeModule = Callable[..., nn.Module]
Key = tuple[BaseDeltaConfig, Site]

_local = threading.local()
"""This thread's templates; threads cannot share one, because a call swaps tensors in it."""
_traced: dict[Key, nn.Module] = {}
"""Templates for compiled code, built in advance because tracing cannot build them."""


class ModuleConfig(BaseDeltaConfig):
    """A method whose leaves are the tensors of the module that ``make(site, **fields)`` builds."""

    make: ClassVar[MakeModule]

    def init(self, site: Site, rng: torch.Generator) -> dict[str, Leaf]:
        for training in (False, True):
            self._reserve(dataclasses.replace(site, training=training))
        seed = int(torch.randint(2**62, (), generator=rng))
        with private_random(seed), torch.device("cpu"):
            found = tensors_of(self._build(site)).items()
        return {name: Leaf(tensor.detach(), trains=tensor.requires_grad) for name, tensor in found}

    def run(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """The module's output for the hidden value ``x``, with the tensors ``p``."""
        return functional_call(self._template(site), p, (x,), strict=True)

    def _template(self, site: Site) -> nn.Module:
        if torch.compiler.is_compiling():
            return _traced[self, site]
        if not hasattr(_local, "templates"):
            _local.templates = {}
        if (self, site) not in _local.templates:
            _local.templates[self, site] = self._on_meta(site)
        return _local.templates[self, site]

    def _reserve(self, site: Site) -> None:
        if (self, site) not in _traced:
            _traced[self, site] = self._on_meta(site)

    def _on_meta(self, site: Site) -> nn.Module:
        with torch.device("meta"), outside_transforms():
            return self._build(site)

    def _build(self, site: Site) -> nn.Module:
        name = type(self).__name__
        module = type(self).make(site, **{field: getattr(self, field) for field in own_fields(type(self))})
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{name} returned a {type(module).__name__} for {site.path}; expected an nn.Module.")
        for path, child in module.named_modules():
            if isinstance(child, nn.modules.batchnorm._NormBase) and child.track_running_stats:
                raise ConfigError(
                    f"{name} made a {type(child).__name__} ({path or 'the module itself'}) that keeps running "
                    f"statistics, but calls of a delta keep nothing: write track_running_stats=False, or use LayerNorm."
                )
        return module.train(site.training)


class Before(ModuleConfig):
    """The site gets ``m(x)`` instead of ``x``."""

    def before(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.run(site, p, x)


class Sequential(ModuleConfig):
    """The site's output becomes ``m(y)``."""

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return self.run(site, p, y)


class Parallel(ModuleConfig):
    """The site's output becomes ``y + m(x)``."""

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + self.run(site, p, x)


class Replace(ModuleConfig):
    """The site's output becomes ``m(x)``."""

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return self.run(site, p, x)


INSERTS: dict[str, type[ModuleConfig]] = {
    "before": Before,
    "sequential": Sequential,
    "parallel": Parallel,
    "replace": Replace,
}


def register_module(delta_type: str, insert: str = "sequential") -> Callable[[MakeModule], type[ModuleConfig]]:
    """Decorate a function ``make(site, **fields) -> nn.Module``, which becomes the config class of a method.

    The fields are the function's other parameters, with their defaults. ``insert`` says how the module m acts: with
    ``"sequential"`` the output is ``m(y)``, with ``"parallel"`` ``y + m(x)``, with ``"replace"`` ``m(x)`` (the site
    still runs, but its output is not used); with ``"before"`` the site gets ``m(x)``. The module maps one hidden tensor
    to another. It runs with one member's tensors, so engines, rows and views all work; the backbone is not changed.

    Raises ``ConfigError`` for another ``insert``, a parameter without a default, or a module with running statistics.

    >>> from funcdelta.methods.config import METHODS
    >>> @fd.register_module("squeeze", insert="parallel")
    ... def Squeeze(site, m: int = 4):
    ...     return nn.Sequential(nn.Linear(site.in_features, m), nn.ReLU(), nn.Linear(m, site.width))
    >>> backbone = nn.Sequential(nn.Linear(4, 6))
    >>> delta = fd.DeltaModel(backbone, Squeeze(m=2, modified_modules=["0"]))
    >>> delta.shapes["0.squeeze.0.weight"], delta.shapes["0.squeeze.2.weight"]
    ((2, 4), (6, 2))
    >>> del METHODS["squeeze"]
    """
    if insert not in INSERTS:
        raise ConfigError(f"insert={insert!r}: write one of {', '.join(INSERTS)}.{near(insert, list(INSERTS))}")

    def add(make: MakeModule) -> type[ModuleConfig]:
        base = INSERTS[insert]
        namespace = {"make": staticmethod(make), "__doc__": make.__doc__ or f"{make.__name__}: {base.__doc__}"}
        cls = dataclasses.make_dataclass(
            make.__name__, fields_of(make), bases=(base,), namespace=namespace, frozen=True, kw_only=True
        )
        # Pickle finds the class under the decorated function's name.
        cls.__module__, cls.__qualname__ = make.__module__, make.__qualname__
        return register(delta_type)(cls)

    return add


def fields_of(make: MakeModule) -> list[tuple[str, Any, Any]]:
    """``(name, type, default)`` of the parameters after the site.

    >>> fields_of(lambda site, m=4: nn.Linear(site.width, m))
    [('m', 'Any', 4)]
    """
    parameters = list(inspect.signature(make).parameters.values())
    if not parameters:
        raise ConfigError(
            f"{make.__name__} takes no argument: write {make.__name__}(site, ...); the site says what it acts on."
        )
    given = parameters[1:]
    taken = {field.name for field in dataclasses.fields(BaseDeltaConfig)}
    for one in given:
        if one.default is one.empty:
            raise ConfigError(f"{make.__name__}: the parameter {one.name!r} becomes a field, so give it a default.")
        if one.name in taken:
            raise ConfigError(f"{make.__name__}: every config already has a field {one.name!r}: use another name.")
        if isinstance(one.default, (list, dict, set)):
            raise ConfigError(f"{make.__name__}: the default {one.name}={one.default!r} is mutable: write a tuple.")
    return [(one.name, "Any" if one.annotation is one.empty else one.annotation, one.default) for one in given]


def own_fields(cls: type[BaseDeltaConfig]) -> list[str]:
    """The fields that a method adds to those of every config.

    >>> own_fields(fd.AdapterConfig)
    ['bottleneck_dim', 'non_linearity']
    """
    common = {field.name for field in dataclasses.fields(BaseDeltaConfig)}
    return [field.name for field in dataclasses.fields(cls) if field.name not in common]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones are listed once.

    >>> list(tensors_of(nn.BatchNorm1d(2, affine=False)))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
