"""What stands under PEFT's file names and is not a LoRA of PEFT's: foreign formats, and its other adapters.

Each is refused by its name, with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_POINTER = b"version https://git-lfs"

FOREIGN = (
    ("MLX-LM", {"lora_parameters"}, "fuse it there (mlx_lm.fuse) and load the model it gives"),
    ("MLX-LM", {"fine_tune_type"}, "fuse it there (mlx_lm.fuse) and load the model it gives"),
    ("AdapterHub's adapters", {"config", "model_class", "model_name"}, "load it with that library"),
)
"""Libraries that write a file of that name, with fields that tell them; the first that fits is meant."""

_MERGE = (
    "In PEFT, model.merge_and_unload() gives a plain model that can be a backbone here; what has been merged is then "
    "frozen"
)
_CONVERT = "In PEFT 0.19 or later, peft.save_as_lora(path, model, rank=r) writes it as a LoRA, which can be read here"
_PROMPT = "fd.SoftPromptModel and fd.PrefixModel are the methods of that kind here; the file stays with PEFT"

OTHERS = {
    **dict.fromkeys(
        ("IA3", "ADALORA", "OFT", "BOFT", "HRA", "LN_TUNING", "HIRA", "SHIRA", "ROAD", "GLORA", "OSF", "DEFT"), _MERGE
    ),
    **dict.fromkeys(("TRAINABLE_TOKENS", "PEANUT", "SUPERTUNING", "BEFT", "ADAMSS", "PVERA", "FROD", "BONE"), _MERGE),
    **dict.fromkeys(("VERA", "LOHA", "LOKR", "MISS", "RANDLORA", "TINYLORA", "C3A", "DELORA", "GRALORA"), _CONVERT),
    **dict.fromkeys(("FOURIERFT", "WAVEFT", "VBLORA", "UNILORA", "PSOFT"), _CONVERT),
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), _PROMPT),
    **dict.fromkeys(("CARTRIDGE", "ADAPTION_PROMPT"), _PROMPT),
    **dict.fromkeys(("LILY", "POLY", "XLORA", "SHADOW", "MIXED"), "It acts on activations alone: it stays with PEFT"),
}
"""PEFT's other types, each with the way out."""


def refuse_pointer(file: Path) -> None:
    """Raise for a file of Git LFS that stands for one that was not fetched.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "adapter_model.safetensors"
    >>> _ = file.write_text("version https://git-lfs.github.com/spec/v1")
    >>> refuse_pointer(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: '...safetensors' is a pointer of Git LFS, not the file itself: run git lfs pull.
    """
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"'{file}' is a pointer of Git LFS, not the file itself: run git lfs pull.")


def check_type(where: str, data: Mapping[str, Any]) -> None:
    """Raise unless ``data`` are the fields of a LoRA of PEFT's.

    >>> check_type("adapter_config.json", {"peft_type": "LORA"})
    >>> check_type("adapter_config.json", {"fine_tune_type": "lora", "num_layers": 16})
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'adapter_config.json' was written by MLX-LM, not by PEFT: fuse it there ...
    """
    given = data.get("peft_type")
    if given is None:
        _refuse_foreign(where, data)
    name = str(getattr(given, "value", given)).upper()
    if name != "LORA":
        way = OTHERS.get(name, _MERGE)
        raise CheckpointError(f"'{where}' is an adapter of the type {name}, and only LORA can be read. {way}.")


def _refuse_foreign(where: str, data: Mapping[str, Any]) -> None:
    for library, fields, way in FOREIGN:
        if fields <= data.keys():
            raise CheckpointError(f"'{where}' was written by {library}, not by PEFT: {way}.")
    if str(data.get("base_model")).startswith("lerobot/"):
        raise CheckpointError(f"'{where}' was written by LeRobot, not by PEFT: load it with that library.")
    if isinstance(data.get("format"), str):
        raise CheckpointError(f"'{where}' is of the format {data['format']!r}, not PEFT's: load it with what wrote it.")
    shown = ", ".join(sorted(map(str, data))[:6]) or "no field"
    raise CheckpointError(
        f"'{where}' was not written by PEFT: expected peft_type, found {shown}. If it is a LoRA all the same, write "
        f"fd.from_peft({{**config, 'peft_type': 'LORA'}}, state_dict, backbone_model)."
    )
