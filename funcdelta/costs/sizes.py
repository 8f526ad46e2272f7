"""How large a backbone and a member are: counted on the meta device from a config, or from a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError


@dataclass(frozen=True)
class Backbone:
    """What of a backbone decides its cost.

    Attributes:
        parameters: all of its numbers, each tensor once.
        linear: P, those in matrices that every token is multiplied by, the language model's head included.
        layers, width: L layers of width d.
        attended: heads times head size of the queries, d_a.
        cached: numbers of keys and values a token and layer, heads times head size of both.
        intermediate: width of the feed-forward layer, f.
        vocabulary: outputs of the head, 0 without one.
    """

    name: str
    parameters: int
    linear: int
    layers: int
    width: int
    attended: int
    cached: int
    intermediate: int
    vocabulary: int = 0


@dataclass(frozen=True)
class Member:
    """What of one member decides its cost: numbers that train, constants, those in products with every token.

    ``adapted`` are all the widths that enter and leave its sites, added up; ``leaf_bytes`` bytes a number.
    """

    trained: int
    constants: int = 0
    multiplied: int = 0
    adapted: int = 0
    leaf_bytes: int = 4


def from_numbers(
    parameters: int | None = None, layers: int | None = None, width: int | None = None, rank: int = 8
) -> tuple[Backbone, Member]:
    """A transformer of equal layers with P = 12 L d², and LoRA on its queries and values, m = 2 · L · r · 2d.

    ``parameters`` alone chooses layers of a usual shape, d = 128 L; with ``layers`` and ``width`` it overrides P.

    >>> backbone, member = from_numbers(layers=32, width=4096, rank=16)
    >>> backbone.linear, member.trained
    (6442450944, 8388608)
    """
    if (layers is None) != (width is None):
        raise ConfigError("give --layers and --width together.")
    if layers is None or width is None:
        if parameters is None:
            raise ConfigError("give a config folder, or --layers and --width, or --parameters.")
        layers = max(1, round((parameters / 12 / 128**2) ** (1 / 3)))
        width = max(1, round(math.sqrt(parameters / 12 / layers)))
    count = parameters or 12 * layers * width**2
    backbone = Backbone(f"{layers} layers of {width}", count, count, layers, width, width, 2 * width, 4 * width)
    trained = 2 * layers * rank * 2 * width
    return backbone, Member(trained, 2 * layers, trained, 2 * layers * 2 * width)


def from_config(
    folder: str, rank: int = 8, modules: Sequence[str] | None = None, delta_type: str = "lora"
) -> tuple[Backbone, Member]:
    """The model that the ``config.json`` in ``folder`` describes, built without memory, and one member on it.

    Raises ``ConfigError`` where there is no config, and what ``DeltaModel`` raises where sites do not fit.
    """
    from ..methods.config import AutoDeltaConfig
    from ..model import DeltaModel

    model, config = _on_meta(folder)
    data: dict[str, Any] = {"delta_type": delta_type}
    if modules:
        data["modified_modules"] = list(modules)
    if delta_type == "lora":
        data["lora_r"] = rank
    delta = DeltaModel(model, AutoDeltaConfig.from_dict(data))
    return count_backbone(model, config, Path(folder).name), count_member(delta)


def _on_meta(folder: str) -> tuple[nn.Module, Any]:
    import transformers

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: give the folder of a model, or --layers and --width.")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return model, config


def count_backbone(model: nn.Module, config: Any, name: str = "backbone") -> Backbone:
    """The sizes of ``model``, whose ``config`` has the usual names of Transformers.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    >>> config = LlamaConfig(vocab_size=32, intermediate_size=24, **sizes)
    >>> backbone = count_backbone(LlamaForCausalLM(config), config)
    >>> backbone.linear == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 16 * 32, backbone.cached
    (True, 16)
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = {}
    for module in model.modules():
        # Conv1D of GPT-2 is a linear by another name.
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weights[id(module.weight)] = module.weight
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    width = _first(text, "hidden_size", "n_embd", "d_model")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or width // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    names = ("intermediate_size", "n_inner", "d_ff")
    intermediate = next((value for name in names if (value := getattr(text, name, None))), 4 * width)
    return Backbone(
        name,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(weight.numel() for weight in weights.values()),
        layers,
        width,
        heads * size,
        2 * keys * size,
        intermediate,
        0 if head is None else head.weight.shape[0],
    )


def count_member(delta: Any) -> Member:
    """One member of ``delta``: exact counts of its numbers; what is multiplied are its leaves of two axes.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 6)), lora_r=2, modified_modules=["0"])
    >>> count_member(delta)
    Member(trained=20, constants=1, multiplied=20, adapted=10, leaf_bytes=4)
    """
    sizes = {name: math.prod(shape) for name, shape in delta.shapes.items()}
    constants = sum(sizes[name] for name in delta.constants)
    multiplied = sum(sizes[n] for n, shape in delta.shapes.items() if len(shape) == 2 and n not in delta.constants)
    widths = [(a.site.in_features or 0) + (a.site.out_features or 0) for a in delta.plan.all()]
    return Member(sum(sizes.values()) - constants, constants, multiplied, sum(widths))


def _first(config: Any, *names: str) -> int:
    for name in names:
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise ConfigError(f"the config has none of {', '.join(names)}: give --layers and --width instead.")


def with_vocabulary(backbone: Backbone, vocabulary: int) -> Backbone:
    """``backbone`` with a head of ``vocabulary`` outputs that the numbers given did not count.

    >>> with_vocabulary(from_numbers(layers=2, width=8)[0], 100).linear
    2336
    """
    more = vocabulary * backbone.width
    return dataclasses.replace(
        backbone, parameters=backbone.parameters + more, linear=backbone.linear + more, vocabulary=vocabulary
    )
