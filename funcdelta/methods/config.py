"""Configs: frozen, hashable descriptions of a delta; config and method are one class.

A subclass is a delta method. It gives ``init`` and any of ``before``, ``after``, ``weights``, ``attend`` and
``around``, each a pure function on the tensors of *one* member at *one* site. It never sees the member axis, the
executor or another method.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MatchError
from ..files.configfile import VERSION_FIELDS, data_at, naming_the_file, parts, save_alone, warn_if_newer
from ..kinds import check_kind
from ..match import near
from ..structures.modules.interface import attention_below
from .acts import OF_LEAVES, Acts, Attention, Factors, depends_on_call
from .leaf import Leaves

if TYPE_CHECKING:
    from .own import Own
    from .site import Site

METHODS: dict[str, type[BaseDeltaConfig]] = {}
"""Every registered method by its ``delta_type``."""

COMPOSITIONS: dict[str, type[BaseDeltaConfig]] = {}
"""Registered configs that hold other configs, and do nothing without them."""

Config = TypeVar("Config", bound="type[BaseDeltaConfig]")

# What fields are called in PEFT, where most people come from.
ELSEWHERE = {
    "r": "lora_r",
    "target_modules": "modified_modules",
    "modules_to_save": "unfrozen_modules",
    "adapter_name": "name",
    "bottleneck_size": "bottleneck_dim",
}

DONE_WHEN_BUILT = (
    *("modified_modules", "exclude_modules", "unfrozen_modules", "unfrozen_init", "common_structure", "name"),
    *("backbone_class", "backbone_checkpoint_name", "backbone_hash"),
)
"""Fields that have done their work when a delta has been built: no call reads them."""

# Arguments of OpenDelta's from_dict and from_finetuned that have nothing to do here.
GONE = {"return_unused_kwargs": "unknown fields are errors, so none is left over: leave it out"}


def register(delta_type: str) -> Callable[[Config], Config]:
    """Register a config class as the method ``delta_type``, for :class:`AutoDeltaConfig` and saved files.

    >>> @register("shift")
    ... @dataclasses.dataclass(frozen=True)
    ... class ShiftConfig(BaseDeltaConfig):
    ...     def init(self, site, rng):
    ...         return {"shift": torch.zeros(site.out_features)}
    ...     def after(self, site, p, y, x):
    ...         return y + p["shift"]
    >>> AutoDeltaConfig.from_dict({"delta_type": "shift", "modified_modules": ["dense"]}).modified_modules
    ('dense',)
    >>> del METHODS["shift"]
    """

    def add(cls: Config) -> Config:
        if "__dataclass_fields__" not in vars(cls):
            raise ConfigError(f"{cls.__name__} is not a dataclass: write @dataclass(frozen=True) below @register(...).")
        table = COMPOSITIONS if cls.composed else METHODS
        known = METHODS.get(delta_type) or COMPOSITIONS.get(delta_type)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"The delta type {delta_type!r} is already {known.__module__}.{known.__qualname__}; "
                f"register {cls.__qualname__} under another name."
            )
        cls.delta_type = delta_type
        table[delta_type] = cls
        return cls

    return add


@dataclass(frozen=True, kw_only=True)
class BaseDeltaConfig:
    """What to change and where: the fields that every delta method shares, and the functions that it may give.

    Attributes:
        modified_modules: names of the sites (whole-token suffix, ``[r]regex``); ``None``: the method's own sites.
        exclude_modules: module paths left out, each with everything below it.
        unfrozen_modules: ``"deltas"`` and names of backbone modules or parameters that are trained too.
        common_structure: whether names are backbone-independent (``attn@.q@``); ``None``: names with ``@`` are;
            ``True``: those without it too, as OpenDelta wrote them before 0.3 (``attn.q``).
        backbone_class, backbone_checkpoint_name, backbone_hash: where the delta was made; written by saving.
        name: the delta's name at its sites, if not the method's (two of a kind on one site).
        batch_dim: which axis of the inputs counts the rows.
        unfrozen_init: ``"copy"`` starts trained backbone leaves from the backbone, ``"fresh"`` draws them anew.
        axis_order: for models whose hidden values are not (batch, tokens, features): the method sees
            ``x.permute(axis_order)``, and what it gives is permuted back. Values with another number of axes stay.

    >>> config = BaseDeltaConfig(modified_modules=["query", "value"])
    >>> config.modified_modules, config == config.replace(), config.replace(name="slow").name
    (('query', 'value'), True, 'slow')
    """

    delta_type: ClassVar[str] = ""
    default_name: ClassVar[str | None] = None
    default_modified_modules: ClassVar[tuple[str, ...]] = ()
    """Common names of the sites that the method takes when none are given."""
    identity_at_start: ClassVar[bool] = False
    """Whether fresh params change nothing (law 2 is then tested)."""
    acts_on_parts: ClassVar[bool] = False
    """Whether the method heeds ``site.parts``, so that it can act on the queries of a fused q,k,v alone."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of the site, or of modules below it, that its functions get, to be read only: ``weight`` as
    ``p["own.weight"]``, ``k_proj.weight`` as ``p["own.k_proj.weight"]``."""
    conditions: ClassVar[tuple[str, ...]] = ()
    """Names of what ``before`` and ``after`` get of the call: ``p["call.mask"]`` (:class:`funcdelta.Acts`)."""
    composed: ClassVar[bool] = False
    """Whether the config is made of other configs."""
    in_leaves: ClassVar[tuple[str, ...]] = ()
    """Fields that say how leaves start and how large they are, and that no other function reads: members that differ
    in them may share a config of one stack (:func:`funcdelta.pack`)."""
    as_leaves: ClassVar[tuple[str, ...]] = ()
    """Fields that the functions take from ``p`` where they stand in it: there they may differ by member, too."""

    least: ClassVar[Mapping[str, float]] = {}
    """The smallest value that a field may have."""
    one_of: ClassVar[Mapping[str, tuple[str, ...]]] = {"unfrozen_init": ("copy", "fresh")}
    """The values that a field may have, where they are few."""

    modified_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    unfrozen_modules: tuple[str, ...] = ("deltas",)
    common_structure: bool | None = None
    backbone_class: str | None = None
    backbone_checkpoint_name: str | None = None
    backbone_hash: str | None = None
    name: str | None = None
    batch_dim: int = 0
    unfrozen_init: str = "copy"
    axis_order: tuple[int, ...] | None = None

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        # Before the generated __init__, whose TypeError would not say what the field is called here.
        cls._check_fields(fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for names in ("modified_modules", "exclude_modules", "unfrozen_modules"):
            given = getattr(self, names)
            if given is not None:
                object.__setattr__(self, names, _tuple_of_names(names, given))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            check_kind(field.name, value, kind)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name}={value!r}: write a finite number.")
        for name, least in self.least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: write at least {least}.")
        for name, known in {**BaseDeltaConfig.one_of, **self.one_of}.items():
            if getattr(self, name) not in known:
                words = " or ".join(f'"{one}"' for one in known)
                raise ConfigError(f"{name}={getattr(self, name)!r}: write {words}.")
        if self.batch_dim < 0:
            raise ConfigError(f"batch_dim={self.batch_dim}: count the axis of rows from the front, 0 or more.")
        if self.unfrozen_modules is None:
            object.__setattr__(self, "unfrozen_modules", ("deltas",))
        if "deltas" not in self.unfrozen_modules:
            raise ConfigError(
                f"unfrozen_modules={list(self.unfrozen_modules)} leaves out 'deltas', so the delta itself would not be "
                f"trained. Write unfrozen_modules={['deltas', *self.unfrozen_modules]}; to train a part of the params, "
                f"split them with fd.partition(params, names)."
            )
        if self.axis_order is not None and sorted(self.axis_order) != list(range(len(self.axis_order))):
            raise ConfigError(
                f"axis_order={self.axis_order}: write every axis once, from 0: (0, 2, 1) for (batch, features, tokens)."
            )
        if self.name is not None and (not self.name or "." in self.name):
            raise ConfigError(f"name={self.name!r}: a delta's name is one token of a dotted path; leave out the dots.")

    # -- the method: pure functions on one member's tensors at one site -------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        """One member's leaves at ``site``, drawn from ``rng``: ``{leaf name: tensor or Leaf}``."""
        raise ConfigError(f"{type(self).__name__} gives no init(self, site, rng).")

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        """The same for a method that starts from the backbone's tensors: ``own["weight"]``, to be read only."""
        return self.init(site, rng)

    def before(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """The hidden input that the site gets instead of ``x``."""
        return x

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        """The hidden output that leaves the site instead of ``y``; ``x`` is what the site was given."""
        return y

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """The site's own tensors rewritten: ``{own name: tensor}``; what ``merge`` writes."""
        return w

    def attend(self, site: Site, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values (P, heads · size) that every query of the attention module at ``site`` sees too."""
        raise ConfigError(f"{type(self).__name__} gives no attend(self, site, p).")

    def widen_bias(self, site: Site, module: nn.Module, bias: Tensor, added: int) -> Tensor:
        """The position bias (1, heads, queries, length) that ``module`` computed, with ``added`` columns in front."""
        return torch.nn.functional.pad(bias, (added, 0))

    def around(self, site: Site, p: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, run: Attention) -> Tensor:
        """What leaves the attention at ``site`` instead of ``run(q, k, v)``, which is the model's own: see `Acts`."""
        return run(q, k, v)

    def prompt(self, site: Site, p: dict[str, Tensor]) -> Tensor:
        """Rows ``(P, d)`` that are added before the embedded input of the module at ``site``; P never changes.

        The library embeds, and extends masks, positions and labels (:mod:`funcdelta.run.prompt`). A method may have
        the fields ``other_expand_ids``, pairs of an input's name and what is put before it, and ``strip``.
        """
        raise ConfigError(f"{type(self).__name__} gives no prompt(self, site, p).")

    def spans(self, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """``(entry, exit)`` by name, for a method whose ``x`` enters one module and whose ``y`` leaves another.

        A method that gives this gives ``after`` alone; ``names`` are its ``modified_modules``.
        """
        return ()

    # -- what it adds to a weight, in factors (fd.algebra) ---------------------------------------------------------

    def factors(self, site: Site, p: dict[str, Tensor]) -> Factors:
        """``{own name: (B, A)}`` with ΔW = B A, scales folded in: B (rows, r), A (r, the weight's other axes, flat)."""
        raise ConfigError(f"{type(self).__name__} gives no factors(self, site, p).")

    def from_factors(self, site: Site, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The leaves at ``site`` whose :meth:`factors` are ``factors``, of the rank that the config has."""
        raise ConfigError(f"{type(self).__name__} gives no from_factors(self, site, factors).")

    def with_rank(self, rank: int) -> Self:
        """The config whose leaves are those that :meth:`from_factors` makes of factors of that rank."""
        raise ConfigError(f"{type(self).__name__} gives no with_rank(self, rank).")

    # -- leaves that sites share -----------------------------------------------------------------------------------

    def shared(self, sites: tuple[Site, ...], rng: torch.Generator) -> Leaves:
        """One member's leaves that all ``sites`` use: in params ``<delta name>.<leaf>``, in ``p`` beside a site's own.

        With :meth:`expand` a site gets what that computes from them instead.
        """
        return {}

    def shared_leaves(self, sites: tuple[Site, ...], own: Mapping[str, Own], rng: torch.Generator) -> Leaves:
        """The same for a method that starts from the backbone's tensors: ``own[site.address]["weight"]``."""
        return self.shared(sites, rng)

    def expand(self, sites: tuple[Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """``{site path: {leaf: tensor}}``, computed from the shared leaves ``p`` once a call."""
        return {}

    def baked(self) -> Self:
        """The config whose sites own the leaves that :meth:`expand` computes; what ``delta.bake`` goes over to."""
        raise ConfigError(f"{type(self).__name__} has nothing to bake: its sites own all of their leaves.")

    # -- facts about the method ------------------------------------------------------------------------------------

    def tokenwise(self, site: Site) -> bool:
        """Whether ``before`` and ``after`` make of each token alone a token, by matrix products and elementwise steps.

        Such functions are called once for all members, without a map: with hidden values (n, T, d), matrices
        (n, a, b), vectors (n, 1, d) and numbers (n, 1, 1) in ``p``. Write them with :func:`funcdelta.linear`,
        ``leaf.mT`` and axes counted from the last, and they are right in both ways.
        """
        return False

    def takes_parts(self) -> bool:
        """Whether the method can act on a part of a fused output alone (``acts_on_parts``)."""
        return self.acts_on_parts

    def seed_name(self, name: str) -> str:
        """What tensors of all members (``Leaf.of``) are drawn by, of a delta called ``name``."""
        return name

    def takes_tensors(self) -> bool:
        """Whether a site of the method may be one bare parameter (``site.kind == "tensor"``)."""
        return False

    def default_names(self) -> tuple[str, ...]:
        """Names of the sites that are taken when none are given (``default_modified_modules``)."""
        return self.default_modified_modules

    def own_sites(self, backbone: nn.Module) -> list[str] | None:
        """The sites when none are named, found by structure; ``None``: those of ``default_modified_modules``."""
        return None

    def describe(self, site: Site, module: nn.Module) -> Site:
        """``site`` with what else the method has to know of the module there; ``dataclasses.replace`` it."""
        return site

    def spread(self, path: str, module: nn.Module) -> Iterator[str]:
        """The sites that a matched module stands for: itself, or the modules below it that the method acts on.

        Of a method that acts within attention, every attention module that it is or holds.
        """
        if not (self.gives("attend") or self.gives("around")):
            yield path
            return
        found = attention_below(path, module)
        if not found:
            raise MatchError(
                f"{self.delta_type} cannot act at {path}: {type(module).__name__} neither is nor holds an attention "
                f"module that goes through Transformers' attention interface, the one place where a method can act "
                f"within attention. Name attention modules that do (exclude_modules= leaves others out); where a model "
                f"has none, take a method that acts on hidden values or weights."
            )
        yield from found

    def check(self, site: Site) -> str | None:
        """Why the method cannot act at ``site``; ``None`` if it can. Asked again once widths have been measured."""
        return None

    def unmergeable(self, site: Site) -> str | None:
        """Why the delta at ``site`` is not a function of its weights; ``None`` if ``weights`` is exact."""
        if self.gives("around"):
            return "it wraps the attention, and no weight of the module computes what it gives"
        if not self.gives("weights"):
            return f"{self.delta_type or type(self).__name__} has no weights form"
        return packed_weight(site) if site.packed else None

    def holds_on_values(self, site: Site) -> bool:
        """Whether ``before`` and ``after`` compute at ``site`` what ``weights`` does; asked of methods that give both.

        Where they do not, because the layer has a forward of its own or options that the formula does not know, the
        delta acts by its weights.
        """
        return not site.own_forward

    def gives(self, function: str) -> bool:
        """Whether the method gives its own ``before``, ``after``, ``weights`` or another of the functions above.

        >>> BaseDeltaConfig().gives("after")
        False
        """
        return getattr(type(self), function) is not getattr(BaseDeltaConfig, function)

    def acts(self, site: Site) -> Acts:
        """What the method does at ``site``: the functions above that it gives. A composition of methods composes them.

        >>> backbone = nn.Sequential(nn.Linear(4, 2))
        >>> delta = fd.BitFitModel(backbone, modified_modules=["0"])
        >>> acts = delta.configs[0].acts(delta.plan.all()[0].site)
        >>> acts.after is None, acts.attend is None
        (False, True)
        """

        def given(function: str) -> Any:
            return functools.partial(getattr(self, function), site) if self.gives(function) else None

        return Acts(
            **{name: given(name) for name in OF_LEAVES},
            widen_bias=functools.partial(self.widen_bias, site),
            tokenwise=self.tokenwise(site),
            reads=self.reads,
            conditions=self.conditions,
            exact=self.holds_on_values(site),
            unmergeable=self.unmergeable(site) or depends_on_call(self.conditions),
        )

    def alike(self) -> Hashable:
        """What members of one stack must agree in beside their leaves: every field that a call reads.

        >>> fd.LoraConfig(lora_r=2).alike() == fd.LoraConfig(lora_r=4).alike()
        True
        """
        free = {*DONE_WHEN_BUILT, *self.in_leaves, *self.as_leaves}
        own = (f.name for f in dataclasses.fields(self) if f.name not in free)
        return type(self), tuple((name, getattr(self, name)) for name in own)

    # -- data ------------------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """A new config with some fields changed.

        >>> BaseDeltaConfig(modified_modules=["query"]).replace(batch_dim=1).batch_dim
        1
        """
        self._check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready data, with its ``delta_type``.

        >>> BaseDeltaConfig(modified_modules=["query"]).to_dict()["modified_modules"]
        ['query']
        """
        data: dict[str, Any] = {"delta_type": self.delta_type}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **changes: Any) -> Self:
        """A config from data such as :meth:`to_dict` gives; ``changes`` override, unknown fields are errors.

        >>> BaseDeltaConfig.from_dict({"modified_modules": ["query"]}, name="slow").name
        'slow'
        """
        fields = {key: value for key, value in data.items() if key not in ("delta_type", *VERSION_FIELDS)}
        if "opendelta_version" in data:
            fields = cls._as_opendelta_means(fields)
        fields.update(changes)
        cls._check_fields(fields)
        # Other libraries write null for a field that was never set.
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
        return cls(**{key: defaults[key] if value is None else value for key, value in fields.items()})

    def to_diff_dict(self) -> dict[str, Any]:
        """The ``delta_type`` and the fields that differ from their defaults, as JSON-ready data.

        >>> fd.LoraConfig(lora_r=4, modified_modules=["query"]).to_diff_dict()
        {'delta_type': 'lora', 'modified_modules': ['query'], 'lora_r': 4}
        """
        changed = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        return {key: value for key, value in self.to_dict().items() if key in changed or key == "delta_type"}

    def save_finetuned(self, path: str | os.PathLike[str], *, push_to_hub: bool | str = False, **creating: Any) -> Path:
        """Write the config alone, as ``config.json`` in the folder ``path``; ``push_to_hub`` uploads it, too.

        The repository is ``push_to_hub`` or, if that is ``True``, the folder's name; ``creating`` may have ``private``,
        ``token`` and ``commit_message``.

        >>> import tempfile
        >>> folder = fd.BitFitConfig(modified_modules=["query"]).save_finetuned(tempfile.mkdtemp())
        >>> (folder / "config.json").exists()
        True
        """
        return save_alone(type(self).__name__, self.to_dict(), path, push_to_hub, creating)

    @classmethod
    def from_finetuned(
        cls,
        path: str | os.PathLike[str],
        backbone_model: Any = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **changes: Any,
    ) -> Self:
        """The config at ``path``: a saved folder, a JSON file, a url to one, or a hub id; ``changes`` override.

        ``backbone_model`` is what OpenDelta's callers pass; a config needs none.

        >>> import tempfile
        >>> folder = fd.LoraConfig(lora_r=4).save_finetuned(tempfile.mkdtemp())
        >>> config = fd.LoraConfig.from_finetuned(folder, lora_alpha=8)
        >>> config.lora_r, config.lora_alpha
        (4, 8)
        """
        fetching = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
        configs = load_configs(path, revision=revision, token=token, **fetching)
        if len(configs) != 1:
            kinds = ", ".join(config.delta_type for config in configs)
            raise ConfigError(f"{path} holds {len(configs)} configs ({kinds}): load them with their delta.")
        config = configs[0].replace(**changes)
        if not isinstance(config, cls):
            raise ConfigError(f"{path} holds a {type(config).__name__}, not a {cls.__name__}.")
        return config

    @classmethod
    def _as_opendelta_means(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Its file has null for fields that its model never read, and names a head that it always excludes."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in fields.items() if value is not None or key in known}
        names = kept.get("modified_modules")
        if names:
            kept["modified_modules"] = [name for name in names if name != "lm_head@.proj@"]
        return kept

    @classmethod
    def _check_fields(cls, given: Mapping[str, Any]) -> None:
        names = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in names:
                here = ELSEWHERE.get(key)
                hint = f" PEFT's {key} is {here} here." if here in names else near(str(key), names)
                hint = f" Of OpenDelta's {key}: {GONE[key]}." if key in GONE else hint
                raise ConfigError(f"{cls.__name__} has no field {key!r}.{hint}")


def packed_weight(site: Site) -> str:
    """Why nothing can be added to the weight of a ``packed`` site.

    >>> from funcdelta.methods.site import site_of
    >>> packed_weight(site_of("proj", nn.Linear(2, 3)))
    'the weight of Linear is packed or computed, so it does not hold the numbers of the (3, 2) matrix'
    """
    return (
        f"the weight of {site.module_type} is packed or computed, so it does not hold the numbers of the "
        f"({site.out_features}, {site.in_features}) matrix"
    )


def _tuple_of_names(field: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{field} holds {name!r}; expected names of modules, such as {field}=['query', 'value'].")
    return names


class AutoDeltaConfig:
    """The config class that a ``delta_type`` names.

    >>> AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4}).lora_r
    4
    """

    @staticmethod
    def for_type(delta_type: str) -> type[BaseDeltaConfig]:
        """The registered config class of ``delta_type``.

        >>> AutoDeltaConfig.for_type("lora").__name__
        'LoraConfig'
        """
        known = METHODS | COMPOSITIONS
        if not isinstance(delta_type, str) or delta_type not in known:
            raise ConfigError(f"There is no delta type {delta_type!r}.{near(str(delta_type), list(known))}")
        return known[delta_type]

    @staticmethod
    def from_dict(data: Mapping[str, Any], **changes: Any) -> BaseDeltaConfig:
        """The config that ``data["delta_type"]`` names, from data; ``changes`` override.

        >>> AutoDeltaConfig.from_dict({"delta_type": "adapter"}, bottleneck_dim=8).bottleneck_dim
        8
        """
        if "delta_type" not in data:
            known = sorted(METHODS)
            more = ", …" if len(known) > 12 else ""
            raise ConfigError(f'No "delta_type" in {sorted(data)}: add one of {", ".join(known[:12])}{more}.')
        return AutoDeltaConfig.for_type(data["delta_type"]).from_dict(data, **changes)

    @staticmethod
    def from_finetuned(
        path: str | os.PathLike[str],
        backbone_model: Any = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **changes: Any,
    ) -> BaseDeltaConfig:
        """The config at ``path``, whatever its type: a folder, a JSON file, a url to one, or a hub id.

        ``changes`` override its fields. The options of fetching go to ``huggingface_hub``; nothing is kept of a url.

        >>> import tempfile
        >>> folder = fd.LoraConfig(lora_r=4).save_finetuned(tempfile.mkdtemp())
        >>> AutoDeltaConfig.from_finetuned(folder / "config.json").delta_type
        'lora'
        """
        fetching = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
        return BaseDeltaConfig.from_finetuned(
            path, backbone_model, revision=revision, token=token, **fetching, **changes
        )


def load_configs(path: str | os.PathLike[str], **fetching: Any) -> tuple[BaseDeltaConfig, ...]:
    """The configs at ``path``, with the class, name and fingerprint of the backbone they were made for.

    ``path`` is a folder, a JSON file, a url to one, or a hub id; ``fetching`` as in :func:`funcdelta.files.hub.locate`.

    >>> import tempfile
    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 4)), modified_modules=["0"])
    >>> folder = delta.save_finetuned(delta.init(0), tempfile.mkdtemp() + "/run")
    >>> [config.backbone_class for config in load_configs(folder)]
    ['Sequential']
    """
    where, data = data_at(path, **fetching)
    configs = configs_of(where, data, provenance=True)
    warn_if_newer(where, data)
    return configs


def configs_of(where: str, data: Mapping[str, Any], *, provenance: bool) -> tuple[BaseDeltaConfig, ...]:
    """The configs that the data of a ``config.json`` describes; ``provenance``: with what it says of the backbone.

    >>> configs_of("config.json", {"delta_type": "lora", "lora_r": 4, "members": 3}, provenance=False)[0].lora_r
    4
    """
    with naming_the_file(where, data):
        return tuple(AutoDeltaConfig.from_dict(part) for part in parts(data, provenance=provenance))
