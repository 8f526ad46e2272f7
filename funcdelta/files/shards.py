"""Saves members in parts, one folder ``members-<first>-<last>`` per process, and joins them into a stack.

Each folder is an ordinary checkpoint (``fd.AutoDeltaModel.from_finetuned`` reads it), replaced as a whole. It may also
hold the optimiser's state, so that a process that died can resume from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CheckpointError, ParamsError
from ..kinds import count
from ..trees.leaves import named
from ..trees.stack import cat, members, take
from .atomic import recover, replace_folder
from .tensorfile import read_tensors, write_tensors

STATE = "state.safetensors"
FOLDER = re.compile(r"members-(\d+)-(\d+)")
MOVED = re.compile(r"\.(members-\d+-\d+)\.old")


def write_shard(
    write: Callable[[Path], Any],
    stack: dict[str, Tensor],
    path: str | os.PathLike[str],
    mine: slice,
    state: Any = None,
) -> Path:
    """Have ``write`` fill the folder ``path/members-<first>-<last>`` of the members ``mine``, and add ``state`` to it.

    See :func:`funcdelta.distributed.save_shard`.

    >>> import tempfile
    >>> stack = {"w": torch.zeros(4, 3)}
    >>> write_shard(lambda folder: (folder / "w").touch(), stack, tempfile.mkdtemp(), slice(4, 8)).name
    'members-4-7'
    """
    first, count = int(mine.start or 0), members(stack)
    if mine.stop is None or mine.stop - first != count or mine.step not in (None, 1):
        raise ParamsError(f"save_shard: the stack has {count} members, but mine is {mine}: write slice(first, stop).")
    if state is not None and members(state) != count:
        raise ParamsError(f"save_shard: the stack has {count} members, but the state has {members(state)}.")
    plain = [name for name, leaf in named(state) if not isinstance(leaf, Tensor)] if state is not None else []
    if plain:
        raise ParamsError(f"save_shard: the leaf {plain[0]} of the state is not a tensor, so it would be lost.")
    for other_first, other_last in _folders(Path(path)):
        if (other_first, other_last) != (first, mine.stop - 1) and other_first < mine.stop and first <= other_last:
            raise CheckpointError(
                f"'{path}' has members-{other_first}-{other_last}, which overlaps members-{first}-{mine.stop - 1}: "
                f"choose another folder for a run with another number of processes."
            )

    def fill(folder: Path) -> None:
        write(folder)
        if state is not None:
            write_tensors(folder / STATE, dict(named(state)), {})

    return replace_folder(Path(path) / f"members-{first}-{mine.stop - 1}", fill)


def read_shards(
    read: Callable[[Path], dict[str, Tensor]], path: str | os.PathLike[str], wanted: int | slice, like: Any = None
) -> Any:
    """The members ``wanted`` as one stack, joined from the folders in ``path``, each of which ``read`` loads.

    See :func:`funcdelta.distributed.load_shards`.

    >>> import tempfile
    >>> path = tempfile.mkdtemp()
    >>> for mine in (slice(0, 4), slice(4, 6)):
    ...     folder = write_shard(Path.touch, {"w": torch.zeros(mine.stop - mine.start)}, path, mine)
    >>> parts = {"members-0-3": torch.arange(4), "members-4-5": torch.arange(4, 6)}
    >>> read_shards(lambda folder: {"w": parts[folder.name]}, path, slice(2, 5))
    {'w': tensor([2, 3, 4])}
    """
    if isinstance(wanted, slice):
        first, stop = wanted.start or 0, wanted.stop
    else:
        first, stop = 0, count(wanted, "wanted", "members", least=1)
    parts, here = [], first
    folders = [pair for pair in _folders(Path(path)) if pair[0] < stop and first <= pair[1]]
    missing: list[tuple[int, int]] = []
    for begin, last in folders:
        if begin < here and parts:
            raise CheckpointError(f"'{path}': members-{begin}-{last} overlaps the folder before it: remove the older.")
        if begin > here:
            missing.append((here, begin - 1))
        parts.append((begin, last))
        here = last + 1
    if here < stop:
        missing.append((here, stop - 1))
    if missing:
        gaps = ", ".join(f"{a} to {b}" if a != b else str(a) for a, b in missing)
        known = ", ".join(f"members-{begin}-{last}" for begin, last in folders) or "no folder of these"
        raise CheckpointError(
            f"'{path}' lacks the members {gaps} of {first} to {stop - 1} (it has {known}): train them with "
            f"fd.seeds(seed, n)[{missing[0][0]}:{missing[0][1] + 1}]."
        )
    stacks, states = [], []
    for begin, last in parts:
        folder = Path(path) / f"members-{begin}-{last}"
        stack = read(folder)
        found, named_so = members(stack), last - begin + 1
        if found != named_so:
            raise CheckpointError(f"'{folder}' holds {found} members, but its name says {named_so}.")
        cut = slice(max(first - begin, 0), min(stop, last + 1) - begin)
        stacks.append(take(stack, cut))
        if like is not None:
            states.append(take(_state(folder, like), cut))
    return cat(stacks) if like is None else (cat(stacks), cat(states))


def _folders(path: Path) -> list[tuple[int, int]]:
    """``(first, last)`` of every part in ``path``, in order, after repairing what a killed save left."""
    if not path.is_dir():
        return []
    for entry in list(path.iterdir()):
        if moved := MOVED.fullmatch(entry.name):
            recover(path / moved[1])
    found = (FOLDER.fullmatch(entry.name) for entry in path.iterdir() if entry.is_dir())
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _state(folder: Path, like: Any) -> Any:
    """The state saved in ``folder``, with the structure of ``like``."""
    if not (folder / STATE).is_file():
        raise CheckpointError(f"'{folder}' holds no state, because it was saved without state=: leave out like=.")
    tensors, _ = read_tensors(folder / STATE)
    wanted = {name: leaf for name, leaf in named(like) if isinstance(leaf, Tensor)}
    wrong = sorted(wanted.keys() ^ tensors.keys())
    wrong += [n for n in wanted.keys() & tensors.keys() if wanted[n].shape[1:] != tensors[n].shape[1:]]
    if wrong:
        raise CheckpointError(f"'{folder / STATE}' does not fit like= (first: {wrong[0]}).")
    leaves = [tensors[name].to(leaf.device) for name, leaf in wanted.items()]
    return pytree.tree_unflatten(leaves, pytree.tree_structure(like))
