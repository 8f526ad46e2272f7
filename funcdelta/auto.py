"""Ways to make a delta: one constructor per method, and deltas from configs as data or from saved folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .deltas import (
    AdapterConfig,
    BitFitConfig,
    CompacterConfig,
    LoraConfig,
    LowRankAdapterConfig,
    ParallelAdapterConfig,
    PrefixConfig,
    SoftPromptConfig,
)
from .errors import ConfigError
from .files.checkpoint import check_backbone
from .loading import load
from .methods.config import AutoDeltaConfig, BaseDeltaConfig
from .model import DeltaModel
from .run.call import Prepare


class MethodModel(DeltaModel):
    """A delta of one method: ``LoraModel(backbone_model=b, lora_r=8)`` is ``DeltaModel(b, LoraConfig(lora_r=8))``.

    ``interactive_modify`` (``True``, or a port) opens a web page to pick ``modified_modules``: :func:`funcdelta.pick`.
    """

    config_class: ClassVar[type[BaseDeltaConfig]]

    def __init__(
        self,
        backbone_model: nn.Module,
        *,
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        prepare: Prepare | None = None,
        backend: str = "hf",
        interactive_modify: bool | int = False,
        **fields: Any,
    ) -> None:
        if backend != "hf":
            raise ConfigError(f"backend={backend!r}: any nn.Module is a backbone here; leave out backend.")
        config = self.config_class.from_dict(fields)
        if interactive_modify is not False:
            from .apps.picker.interactive import picked  # imports a web server

            config = picked(backbone_model, config, interactive_modify)
        super().__init__(backbone_model, config, example=example, prepare=prepare)

    @classmethod
    def from_config(
        cls, config: BaseDeltaConfig | Mapping[str, Any], backbone_model: nn.Module, **fields: Any
    ) -> DeltaModel:
        """The delta that ``config`` describes; raises if it is of another method. ``fields`` override the config's.

        >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> fd.LoraModel.from_config(fd.LoraConfig(modified_modules=["0"]), backbone, lora_r=2).configs[0].lora_r
        2
        """
        if isinstance(config, Mapping):
            config = {"delta_type": cls.config_class.delta_type} | dict(config)
        delta = AutoDeltaModel.from_config(config, backbone_model, **fields)
        if not isinstance(delta.configs[0], cls.config_class):
            found = type(delta.configs[0]).__name__
            raise ConfigError(f"{cls.__name__} takes a {cls.config_class.__name__}; found a {found}.")
        return delta

    @classmethod
    def from_finetuned(
        cls, path: str | os.PathLike[str], backbone_model: nn.Module, **options: Any
    ) -> tuple[DeltaModel, dict[str, Tensor]]:
        """As :meth:`AutoDeltaModel.from_finetuned`; raises if the saved delta is of another method.

        >>> import tempfile
        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> folder = delta.save_finetuned(delta.init(0), tempfile.mkdtemp() + "/run")
        >>> fd.LoraModel.from_finetuned(folder, delta.backbone)[0].delta_type
        'lora'
        """
        delta, params = AutoDeltaModel.from_finetuned(path, backbone_model, **options)
        if not all(isinstance(config, cls.config_class) for config in delta.configs):
            found = ", ".join(type(config).__name__ for config in delta.configs)
            raise ConfigError(f"{path} holds a {found}: load it with fd.AutoDeltaModel.from_finetuned.")
        return delta, params


class LoraModel(MethodModel):
    """LoRA on a backbone; the fields are those of :class:`LoraConfig`.

    >>> fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"]).sites
    ('0',)
    """

    config_class = LoraConfig


class AdapterModel(MethodModel):
    """Bottleneck adapters on a backbone; the fields are those of :class:`AdapterConfig`.

    >>> fd.AdapterModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"]).delta_type
    'adapter'
    """

    config_class = AdapterConfig


class BitFitModel(MethodModel):
    """BitFit on a backbone; the fields are those of :class:`BitFitConfig`.

    >>> fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"]).names
    ('0.bitfit.bias',)
    """

    config_class = BitFitConfig


class CompacterModel(MethodModel):
    """Compacters on a backbone; the fields are those of :class:`CompacterConfig`.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 64))
    >>> fd.CompacterModel(backbone, modified_modules=["0"]).delta_type
    'compacter'
    """

    config_class = CompacterConfig


class LowRankAdapterModel(MethodModel):
    """Low-rank adapters on a backbone; the fields are those of :class:`LowRankAdapterConfig`.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> fd.LowRankAdapterModel(backbone, reduction_factor=2, modified_modules=["0"]).delta_type
    'low_rank_adapter'
    """

    config_class = LowRankAdapterConfig


class PrefixModel(MethodModel):
    """Prefix tuning of a backbone; the fields are those of :class:`PrefixConfig`.

    >>> from transformers import GPT2Config, GPT2Model
    >>> backbone = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2))
    >>> fd.PrefixModel(backbone, reparameterize=False).names
    ('h.0.attn.prefix.past_key', 'h.0.attn.prefix.past_value')
    """

    config_class = PrefixConfig


class SoftPromptModel(MethodModel):
    """A soft prompt on a backbone; the fields are those of :class:`SoftPromptConfig`.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> fd.SoftPromptModel(BertModel(BertConfig(vocab_size=20, **sizes)), soft_token_num=3).shapes
    {'soft_prompt_layer.soft_embeds': (3, 8)}
    """

    config_class = SoftPromptConfig


class ParallelAdapterModel(MethodModel):
    """Parallel adapters on a backbone; the fields are those of :class:`ParallelAdapterConfig`.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> fd.ParallelAdapterModel(backbone, modified_modules=["0", "2"]).sites
    ('0',)
    """

    config_class = ParallelAdapterConfig


class AutoDeltaModel:
    """Deltas from configs as data, and from saved folders.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> fd.AutoDeltaModel.from_config({"delta_type": "bitfit", "modified_modules": ["0"]}, backbone)
    DeltaModel(Sequential: bitfit at 0; 8 numbers a member)
    """

    @staticmethod
    def from_config(
        config: BaseDeltaConfig | Mapping[str, Any],
        backbone_model: nn.Module,
        *,
        check_hash: bool = True,
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        prepare: Prepare | None = None,
        **fields: Any,
    ) -> DeltaModel:
        """The delta that ``config`` (a config, or its dict) describes; ``fields`` override the config's.

        A config that was saved with a delta contains the fingerprint of that delta's backbone: another backbone raises
        ``CheckpointError``, unless ``check_hash=False``. (OpenDelta's hashes cover more than the backbone and are not
        compared.)

        >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> config = {"delta_type": "lora", "modified_modules": ["0"]}
        >>> fd.AutoDeltaModel.from_config(config, backbone_model=backbone, lora_r=2).configs[0].lora_r
        2
        """
        if isinstance(config, BaseDeltaConfig):
            made = config.replace(**fields)
        else:
            made = AutoDeltaConfig.from_dict(config, **fields)
        delta = DeltaModel(backbone_model, made, example=example, prepare=prepare)
        if check_hash:
            check_backbone("The config", made.to_dict(), {}, backbone_model, delta.shapes)
        return delta

    @staticmethod
    def from_finetuned(
        path: str | os.PathLike[str],
        backbone_model: nn.Module,
        *,
        delta_config: BaseDeltaConfig | Sequence[BaseDeltaConfig] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        check_hash: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        device: torch.device | str | None = None,
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        prepare: Prepare | None = None,
        **fields: Any,
    ) -> tuple[DeltaModel, dict[str, Tensor]]:
        """``(delta, params)`` from what ``save_finetuned`` wrote: a folder, or a hub id; every key is accounted for.

        Args:
            delta_config: used instead of the saved config; single ``fields`` override it.
            state_dict: tensors by name, used instead of the saved ones.
            check_hash: whether the backbone must be the one that the delta was saved with, bit for bit.
            cache_dir, force_download, local_files_only, revision, token: for ``huggingface_hub``.
            device: where to put the leaves; by default, on the device of their sites.

        >>> import tempfile
        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> folder = delta.save_finetuned(delta.init(0), tempfile.mkdtemp() + "/run")
        >>> loaded, params = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=delta.backbone)
        >>> loaded.configs[0].lora_r, list(params) == list(delta.names)
        (8, True)
        """
        return load(
            path,
            backbone_model,
            delta_config=delta_config,
            state_dict=state_dict,
            check_hash=check_hash,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            revision=revision,
            token=token,
            device=device,
            example=example,
            prepare=prepare,
            **fields,
        )
