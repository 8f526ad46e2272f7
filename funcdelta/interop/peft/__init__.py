"""Folders that PEFT wrote, read; and folders that it reads back, written: of its adapters, LoRA."""

from .reading import from_peft, load_peft
from .writing import save_peft, to_peft

__all__ = ["from_peft", "load_peft", "save_peft", "to_peft"]
