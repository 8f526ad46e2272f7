"""The fields of an ``adapter_config.json`` that its tensors do not tell: scales, dropout, and which parameters.

The scale of a site is ``s = alpha / r``, with ``use_rslora`` ``alpha / √r``: r is the one of the tensors, and alpha
that of the first pattern of ``alpha_pattern`` that matches the site's name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from ...kinds import MOST
from .formats import check_type

DEFAULT_ALPHA = 8

READ = {
    *("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "target_parameters", "peft_version"),
    *("ensure_weight_tying", "modules_to_save"),
}
"""Fields that are read; a missing one has PEFT's default."""
PASSED_OVER = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_bias"),
    *("lora_ga_config", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "velora_config"),
}
"""Fields that say what the keys and the shapes of the tensors say, how training began, or what cannot be trusted."""

_MERGE = "in PEFT, model.merge_and_unload() gives a plain model that can be a backbone here"
_REFUSED = {
    "use_dora": ("DoRA", f"{_MERGE}, or peft.save_as_lora(path, model, rank=r) a LoRA"),
    "use_qalora": ("QA-LoRA", "it pools its inputs, so it stays with PEFT"),
    "use_bdlora": ("BD-LoRA, whose factors are block-diagonal", _MERGE),
    "alora_invocation_tokens": ("aLoRA, which acts on tokens after an invocation alone", "it stays with PEFT"),
    "arrow_config": ("Arrow, which routes tokens over several LoRAs", "load each of these LoRAs by itself"),
    "monteclora_config": ("MonteCLoRA, which samples its factors", _MERGE),
    "kasa_config": ("KaSA, which overwrites the backbone by a truncated one", _MERGE),
    "layer_replication": ("layer replication, which gives the backbone more layers", _MERGE),
    "trainable_token_indices": ("trainable tokens", _MERGE),
}
"""Fields that, if set, mean something else than ``W + s B A``, each with what it is and the way out."""
_CHANGES_BACKBONE = re.compile(r"(pissa|olora|corda|lora_ga|loftq)", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """What the fields say.

    Attributes:
        where: the file, for messages.
        alpha, alpha_pattern: of ``s``; the pattern in the file's order.
        use_rslora: whether s divides by √r.
        dropout: on what enters A.
        parameters: names of bare parameters with a LoRA, or ends of such names.
        saved: ``modules_to_save``, ends of the names of modules.
        tied: whether both ends of a tied tensor are meant where one is named.
        experts_turned: whether the file is of a time when PEFT took each table of experts as (experts, in, out).

    >>> settings = settings_of("adapter_config.json", {"peft_type": "LORA", "alpha_pattern": {"k": 2}})
    >>> settings.alpha_of("layers.0.q"), settings.alpha_of("layers.0.k")
    (8.0, 2.0)
    """

    where: str
    alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tied: bool
    experts_turned: bool

    def matching(self, name: str) -> list[str]:
        """The patterns that match the module or parameter called ``name``."""
        return [key for key in self.alpha_pattern if re.match(_WHOLE.format(key), name)]

    def alpha_of(self, name: str) -> float:
        """The alpha of the module or parameter that the file calls ``name``."""
        found = self.matching(name)
        return self.alpha_pattern[found[0]] if found else self.alpha

    def names_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` means the parameter ``name``."""
        return any(name == one or name.endswith(f".{one}") for one in self.parameters)

    def warn_of_overlaps(self, names: list[str]) -> None:
        """Warn where several patterns of unlike alpha match one of ``names``: the first counts, and order is lost.

        PEFT sorts the patterns when it saves them.
        """
        for name in names:
            found = self.matching(name)
            if len({self.alpha_pattern[key] for key in found}) > 1:
                warnings.warn(
                    f"'{self.where}': {', '.join(map(repr, found))} of alpha_pattern all match {name}. The first "
                    f"counts, and PEFT sorts them when it saves, so that it may be another than in training.",
                    stacklevel=4,
                )
                return


_WHOLE = r"(.*\.)?({})$"
"""How PEFT looks for a pattern in the path of a module."""


def settings_of(where: str, data: Mapping[str, Any]) -> Settings:
    """The settings that the fields ``data`` of a LoRA give; raises ``CheckpointError`` for what is no plain LoRA.

    >>> settings_of("adapter_config.json", {"peft_type": "LORA", "use_dora": True})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'adapter_config.json' has use_dora=True: that is DoRA, and cannot be read. ...
    """
    check_type(where, data)
    for field, (what, way) in _REFUSED.items():
        if data.get(field):
            raise CheckpointError(
                f"'{where}' has {field}={_short(data[field])}: that is {what}, and cannot be read. The way out: {way}."
            )
    start = data.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BACKBONE.match(start):
        raise CheckpointError(
            f"'{where}' has init_lora_weights={start!r}, which changes the backbone before training, so that these "
            f"factors belong to another backbone than yours. Write it from PEFT as a plain LoRA: "
            f"model.save_pretrained(path, path_initial_model_for_weight_conversion=path_of_the_untrained_adapter)."
        )
    unknown = sorted(field for field in data if field not in READ | PASSED_OVER | _REFUSED.keys())
    if unknown:
        warnings.warn(f"'{where}' has fields that are not known and not read: {', '.join(unknown)}.", stacklevel=4)
    pattern = data.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise CheckpointError(f"'{where}': alpha_pattern is a dict of numbers by name; found {_short(pattern)}.")
    for key in pattern:
        try:
            re.compile(_WHOLE.format(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"'{where}': alpha_pattern has {key!r}, no regular expression: {error}.") from error
    return Settings(
        where=where,
        alpha=_number(where, data, "lora_alpha", DEFAULT_ALPHA),
        alpha_pattern={key: _number(where, pattern, key, DEFAULT_ALPHA) for key in pattern},
        use_rslora=bool(data.get("use_rslora")),
        dropout=_number(where, data, "lora_dropout", 0.0),
        parameters=_names(where, data, "target_parameters"),
        saved=_names(where, data, "modules_to_save"),
        tied=bool(data.get("ensure_weight_tying")),
        experts_turned=_version(data.get("peft_version")) < (0, 19),
    )


def _number(where: str, data: Mapping[str, Any], field: str, default: float) -> float:
    value = data.get(field)
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"'{where}': {field} is a number; found {_short(value)}.")
    if not abs(value) <= MOST:
        raise CheckpointError(f"'{where}': {field}={_short(value)}; expected a finite number of at most {MOST}.")
    return float(value)


def _names(where: str, data: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = data.get(field) or ()
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple, set)) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"'{where}': {field} is a list of names; found {_short(value)}.")
    return names  # pyright: ignore[reportReturnType]


def _version(given: Any) -> tuple[int, ...]:
    """Major and minor of ``0.18.2.dev0@UNKNOWN``; a missing one is taken for new: old files say little else wrongly."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", str(given or ""))
    return (int(found[1]), int(found[2])) if found else (99,)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
