"""Converts the fields of an OpenDelta ``config.json`` to a config, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ...files.configfile import VERSION_FIELDS
from ...match import near
from ...methods.config import METHODS, AutoDeltaConfig, BaseDeltaConfig
from .common_names import EXCLUDED
from .spelling import BASE_FIELDS, DEAD_FIELDS, OURS, PROVENANCE, SPELLINGS, Spelling

COMPAT = "opendelta"


def spelling_of(data: Mapping[str, Any]) -> tuple[str, Spelling]:
    """The delta type that ``config.json`` names, and how OpenDelta spells it.

    >>> spelling_of({"delta_type": "lora"})[0]
    'lora'
    """
    delta_type = data.get("delta_type") or ""
    if delta_type not in SPELLINGS:
        known = near(str(delta_type), list(SPELLINGS)) if delta_type else f" It is one of {', '.join(SPELLINGS)}."
        what = f"OpenDelta has no delta_type={delta_type!r}." if delta_type else "config.json has no delta_type."
        raise CheckpointError(f"{what}{known} Pass it: load_opendelta(path, backbone_model, delta_type=...).")
    return delta_type, SPELLINGS[delta_type]


def config_of(data: Mapping[str, Any], compat: str | None, changes: Mapping[str, Any]) -> BaseDeltaConfig:
    """The config that ``data`` describes, without its sites and trained backbone modules.

    Fields that OpenDelta's models never read are left out; an unknown field is an error.

    >>> data = {"delta_type": "parallel_adapter", "scaled": None, "bottleneck_dim": 4, "opendelta_version": "9"}
    >>> config_of({**data, "delta_type": "adapter"}, None, {"non_linearity": "relu", "scaled": None})
    ... # doctest: +ELLIPSIS
    AdapterConfig(...bottleneck_dim=4, non_linearity='relu')
    """
    delta_type, spelling = spelling_of(data)
    kind = AutoDeltaConfig.for_type(delta_type)
    passed_over = {"delta_type", *VERSION_FIELDS, *BASE_FIELDS, *DEAD_FIELDS}
    passed_over |= {name for name, written in spelling.fields.items() if written is not OURS}
    known = {name for name, written in spelling.fields.items() if written is OURS} | set(PROVENANCE)
    left_out = {name for name, value in changes.items() if value is None}
    for name in data:
        if name not in known | passed_over | left_out:
            raise CheckpointError(
                f"config.json has a field {name!r}, which OpenDelta's {delta_type} lacks.{near(name, sorted(known))} "
                f"To ignore it, write load_opendelta(path, backbone_model, {name}=None)."
            )
    given = {name: data[name] for name in known if name in data}
    if compat is not None and spelling.inexact is not None:
        given[spelling.inexact.field] = spelling.inexact.value
    own = {field.name for field in dataclasses.fields(kind)}
    return kind.from_dict(given, **{name: value for name, value in changes.items() if value is not None or name in own})


def data_of(config: BaseDeltaConfig, spelling: Spelling, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that OpenDelta writes for ``config``: its method's, and those common ones that are not at default.

    >>> data_of(fd.LoraConfig(lora_r=4, modified_modules=["q"]), SPELLINGS["lora"], {})["exclude_modules"]
    ['lm_head']
    """
    data = {name: getattr(config, name) if written is OURS else written for name, written in spelling.fields.items()}
    data |= {"delta_type": config.delta_type, "exclude_modules": list(config.exclude_modules or EXCLUDED)}
    if config.unfrozen_modules != ("deltas",):
        data["unfrozen_modules"] = list(config.unfrozen_modules)
    return json.loads(json.dumps(data | dict(changed)))


def refuse_fields(config: BaseDeltaConfig, spelling: Spelling) -> str | None:
    """A message about a field of ``config`` that OpenDelta lacks and that is not at its default; ``None`` if none is.

    >>> refuse_fields(fd.LoraConfig(enable_lora=(True, False, True)), SPELLINGS["lora"])
    'enable_lora=(True, False, True) has no counterpart'
    """
    of_inexact = (spelling.inexact.field,) if spelling.inexact is not None else ()
    harmless = {*BASE_FIELDS, *PROVENANCE, "name", "unfrozen_init", *spelling.covered, *of_inexact, *spelling.fields}
    for field in dataclasses.fields(METHODS[config.delta_type]):
        value = getattr(config, field.name)
        if field.name not in harmless and value != field.default:
            return f"{field.name}={value!r} has no counterpart"
    return None
