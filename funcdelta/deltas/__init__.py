"""The delta methods: one per file, registered on import; no other code names a method."""

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
