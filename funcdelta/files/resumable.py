"""A saved delta in a folder that belongs to a trainer: it resumes from it, and nobody takes it for a whole model.

Transformers' Trainer loads ``model.safetensors`` of a checkpoint into the model that it trains, so the leaves of a
view stand there, too, under the names that the view's ``load_state_dict`` knows. ``from_pretrained`` would read the
same file, find none of its tensors and start from random numbers; so ``config.json`` names the file to read by a
sentence, which ``from_pretrained`` shows when it refuses. Other files of the folder (an optimiser's state, other
processes' random numbers) may be written at the same time: the files are put in their places one by one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .hub import CONFIG, TENSORS

TRAINERS = "model.safetensors"
"""The file that a Trainer looks for."""

SAYS_WHAT_IT_IS = {
    "transformers_weights": "these are the leaves of a delta, without the model that they belong to: load them with "
    "fd.AutoDeltaModel.from_finetuned(path, backbone_model=model)"
}
"""What ``config.json`` has so that ``from_pretrained`` refuses the folder."""


def write_resumable(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """The folder ``path`` with what ``write`` makes of an empty folder, and with the tensors for a Trainer beside it.

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
        # The config says whose tensors they are, so it comes last.
        for name in (TENSORS, TRAINERS, CONFIG):
            os.replace(Path(made) / name, folder / name)
    return folder
