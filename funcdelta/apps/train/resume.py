"""The state of a run on disk: enough to continue after a kill with the same numbers, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...files.atomic import recover, replace_folder
from ...trees.leaves import named
from .errors import JobError
from .options import Settings, flag

RUN, STATE, REPORT = "run.json", "state.safetensors", "report.json"


@dataclass(frozen=True)
class State:
    """How far a run has come: ``step`` steps taken, the stack, the optimiser's state, the losses (step, n) so far.

    >>> State(0, {"w": torch.zeros(2, 3)}, (), torch.zeros(0, 2)).step
    0
    """

    step: int
    stack: dict[str, Tensor]
    optimizer: Any
    losses: Tensor


@dataclass(frozen=True)
class Run:
    """What identifies a run, written once: its settings, and what they referred to when it began.

    >>> run = Run(Settings(seeds=2), data="ab", backbone="fd1:cd", versions={"torch": "2"})
    >>> Run.from_dict(run.to_dict()) == run
    True
    """

    settings: Settings
    data: str
    """sha256 of the split."""
    backbone: str
    """The backbone's fingerprint."""
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON-ready data."""
        return vars(self) | {"settings": self.settings.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """A run from what :meth:`to_dict` gave."""
        settings = Settings.from_dict(data["settings"])
        return cls(settings, data["data"], data["backbone"], data["versions"])


def save(out: Path, run: Run, state: State) -> None:
    """The folder ``out`` with ``run`` and ``state``, replaced as a whole.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "run"
    >>> state = State(1, {"w": torch.ones(2)}, {"count": torch.tensor(1)}, torch.zeros(1, 2))
    >>> save(out, Run(Settings(), "ab", "cd", {}), state)
    >>> load_state(out, state).stack
    {'w': tensor([1., 1.])}
    """
    from safetensors.torch import save_file

    tensors = {name: leaf.detach().contiguous() for name, leaf in named(_tree(state))}

    def write(folder: Path) -> None:
        (folder / RUN).write_text(json.dumps(run.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / STATE, {"step": str(state.step)})

    replace_folder(out, write)


def load_run(out: Path, given: dict[str, Any]) -> Run:
    """The run in ``out``; raises `JobError` if there is none, or if ``given`` settings differ from its own.

    >>> load_run(Path("no-such-run"), {})
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: --resume: there is no run in no-such-run; leave --resume out to start one.
    """
    recover(out)
    path = out / RUN
    if not path.is_file():
        raise JobError(f"--resume: there is no run in {out}; leave --resume out to start one.")
    try:
        run = Run.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise JobError(f"--resume: {path} cannot be read ({error}); start anew with another --out.") from error
    own = run.settings.to_dict()
    for name, value in Settings(**given).to_dict().items():
        if name in given and value != own[name]:
            raise JobError(
                f"--resume: the run in {out} has {flag(name)} {_shown(own[name])}, not {_shown(value)}; "
                f"leave {flag(name)} out, or start anew with another --out."
            )
    return run


def check_same(out: Path, saved: Run, found: Run) -> None:
    """Raise `JobError` if the data or the backbone are not those that the run in ``out`` began with.

    >>> run = Run(Settings(), "ab", "cd", {})
    >>> check_same(Path("run"), run, Run(Settings(), "ab", "ef", {}))
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: --resume: the backbone is not the one that the run in run began with; ...
    """
    for what in ("data", "backbone"):
        if getattr(saved, what) != getattr(found, what):
            raise JobError(
                f"--resume: the {what} is not the one that the run in {out} began with; "
                "bring it back, or start anew with another --out."
            )


def load_state(out: Path, fresh: State) -> State:
    """The state saved in ``out``, with the structure of ``fresh``; raises `JobError` if it does not fit."""
    from safetensors import SafetensorError, safe_open

    path = out / STATE
    tree = _tree(fresh)
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise JobError(f"--resume: {path} cannot be read ({error}); start anew with another --out.") from error
    wanted = dict(named(tree))
    wrong = sorted(wanted.keys() ^ tensors.keys())
    wrong += [name for name in wanted.keys() & tensors.keys() if _kind(wanted[name]) != _kind(tensors[name])]
    wrong = [name for name in wrong if name != "losses"]
    if wrong:
        raise JobError(f"--resume: {path} does not fit this run (first: {wrong[0]}); start anew with another --out.")
    loaded = pytree.tree_unflatten([tensors[name] for name in wanted], pytree.tree_structure(tree))
    return State(step, loaded["stack"], loaded["optimizer"], loaded["losses"])


def _tree(state: State) -> dict[str, Any]:
    return {"stack": state.stack, "optimizer": state.optimizer, "losses": state.losses}


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
