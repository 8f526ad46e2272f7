"""The delta methods: one a file, registered on import; nothing outside a method's file names it."""

from .adapter import AdapterConfig
from .bitfit import BitFitConfig
from .compacter import CompacterConfig
from .lora import LoraConfig
from .low_rank_adapter import LowRankAdapterConfig
from .parallel_adapter import ParallelAdapterConfig
from .prefix import PrefixConfig
from .soft_prompt import SoftPromptConfig

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CompacterConfig",
    "LoraConfig",
    "LowRankAdapterConfig",
    "ParallelAdapterConfig",
    "PrefixConfig",
    "SoftPromptConfig",
]
