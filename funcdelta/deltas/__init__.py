"""The delta methods: one a file, registered on import; nothing outside a method's file names it."""

from .adapter import AdapterConfig
from .bitfit import BitFitConfig
from .lora import LoraConfig
from .soft_prompt import SoftPromptConfig

__all__ = ["AdapterConfig", "BitFitConfig", "LoraConfig", "SoftPromptConfig"]
