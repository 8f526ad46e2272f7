"""Saves a delta into a trainer's folder so that the trainer can resume, and no one mistakes it for a whole model.

Transformers' Trainer loads ``model.safetensors`` of a checkpoint into the model that it trains, so a view's leaves are
written there as well, under the names that its ``load_state_dict`` expects. ``from_pretrained`` would read that file,
find none of the model's tensors and start from random numbers; so ``config.json`` has a sentence in place of the name
of the weights file, which ``from_pretrained`` shows when it refuses. Other processes may write into the folder at the
same time (an optimiser's state, random states), so files are replaced one by one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .hub import CONFIG, TENSORS

TRAINERS = "model.safetensors"
"""The file that a Trainer resumes from."""

SAYS_WHAT_IT_IS = {
    "transformers_weights": "these are the leaves of a delta, without the model that they belong to: load them with "
    "fd.AutoDeltaModel.from_finetuned(path, backbone_model=model)"
}
"""The entry of ``config.json`` that makes ``from_pretrained`` refuse the folder."""


def write_resumable(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Put the files that ``write`` makes in an empty folder into ``path``, with a copy of the tensors for a Trainer.

    >>> def write(folder):
    ...     _ = (folder / "config.json").write_text("{}"), (folder / "delta.safetensors").write_text("tensors")
    >>> folder = write_resumable(tempfile.mkdtemp(), write)
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'delta.safetensors', 'model.safetensors']
    """
    folder = Path(os.path.realpath(path))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        write(Path(made))
        try:
            os.link(Path(made) / TENSORS, Path(made) / TRAINERS)
        except OSError:  # not every file system has hard links
            (Path(made) / TRAINERS).write_bytes((Path(made) / TENSORS).read_bytes())
        # The config comes last, because it describes the tensors.
        for name in (TENSORS, TRAINERS, CONFIG):
            os.replace(Path(made) / name, folder / name)
    return folder
