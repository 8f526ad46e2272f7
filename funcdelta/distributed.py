"""Splits members over several processes, and gathers their results in the members' order.

Built on torch's process groups and ``DeviceMesh`` (start with ``torchrun``). Members exchange nothing while they
train, so each process initialises, trains and saves its own, and only results are gathered. A single process has all
members, so one script serves both cases.

A mesh of several dimensions counts row by row, the last dimension fastest. If the backbone is sharded over one of them
(``prepare=lambda skeleton: fully_shard(skeleton, mesh=mesh["shards"])``), ``shard(n, mesh)`` still gives each process
its own members; the processes of one group then have to make the same number of calls, forward and backward.

>>> import funcdelta as fd
>>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 3)), lora_r=2, modified_modules=["0"])
>>> mine = shard(8)
>>> stack = delta.init(fd.seeds(0, 8)[mine])
>>> with torch.no_grad():
...     losses = delta.apply_many(stack, torch.ones(5, 4)).square().mean((1, 2))
>>> gather(losses).shape
torch.Size([8])
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .errors import CheckpointError, ParamsError
from .files.shards import read_shards, write_shard
from .kinds import count
from .loading import load
from .model import DeltaModel
from .trees.leaves import named
from .trees.stack import members

__all__ = ["gather", "load_shards", "mean", "save_shard", "shard"]

Tree = TypeVar("Tree")


def shard(n: int, mesh: DeviceMesh | None = None) -> slice:
    """This process's share of n members, as a slice: ``fd.seeds(0, n)[mine]``, ``fd.take(stack, mine)``.

    Shares are contiguous, in the order of the processes of ``mesh`` (``None``: all processes); the first n mod world
    processes have one member more. Raises ``ParamsError`` if there are fewer members than processes.

    >>> shard(64)
    slice(0, 64, None)
    """
    rank, world = _place(mesh)
    n = count(n, "n", "members all processes have")
    if n < world:
        raise ParamsError(
            f"{n} members on {world} processes leave some processes without a member: start at most {n} processes, or "
            f"shard over one dimension of a mesh, shard({n}, mesh['members'])."
        )
    each, more = divmod(n, world)
    first = rank * each + min(rank, more)
    return slice(first, first + each + (rank < more))


def gather(tree: Tree, mesh: DeviceMesh | None = None) -> Tree:
    """Concatenate the stacks of all processes: (n of this process, …) → (n, …), the same on each of them.

    ``tree`` is any pytree whose tensors have the member axis first (params, losses, an optimiser's state); other leaves
    pass unchanged. Values of any dtype arrive bit for bit, detached; processes may have different numbers of members.
    All processes of ``mesh`` (``None``: all) have to call it. Raises ``ParamsError`` on all of them if leaves differ.

    >>> gather({"loss": torch.tensor([0.5, 0.25])})
    {'loss': tensor([0.5000, 0.2500])}
    """
    members(tree)
    for group, device in _groups(mesh):
        tree = _gather(tree, group, device)
    return tree


def mean(tree: Tree, mesh: DeviceMesh | None = None) -> Tree:
    """The mean of every leaf over the processes of ``mesh``, such as gradients of members whose rows they share.

    For processes with the same members and equally many different rows: average the output of ``fd.value_and_grad``.

    >>> mean({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """
    for group, device in _groups(mesh):
        world = dist.get_world_size(group)

        def average(leaf: Tensor, group: Any = group, device: Any = device, world: int = world) -> Tensor:
            total = leaf.detach().to(device=device, copy=True).contiguous()
            dist.all_reduce(total, group=group)
            return (total / world).to(device=leaf.device, dtype=leaf.dtype)

        tree = pytree.tree_map_only(Tensor, average, tree)
    return tree


def save_shard(
    delta: DeltaModel,
    stack: dict[str, Tensor],
    path: str | os.PathLike[str],
    mine: slice,
    state: Any = None,
    *,
    hash_backbone: bool = True,
) -> Path:
    """Write the members ``mine`` (a slice of all, from :func:`shard`) to ``path/members-<first>-<last>``.

    ``state`` is any pytree of tensors with the member axis first, for example the optimiser's. A killed process leaves
    the previous save intact. Returns the folder. Raises ``CheckpointError`` if another folder's members overlap.

    >>> import tempfile
    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 3)), lora_r=2, modified_modules=["0"])
    >>> folder = save_shard(delta, delta.init(0, n=4), tempfile.mkdtemp(), slice(4, 8))
    >>> folder.name
    'members-4-7'
    """

    def write(folder: Path) -> None:
        delta.save_finetuned(stack, folder, hash_backbone=hash_backbone)

    return write_shard(write, stack, path, mine, state)


def load_shards(
    delta: DeltaModel, path: str | os.PathLike[str], wanted: int | slice, like: Any = None, *, check_hash: bool = True
) -> Any:
    """The members ``wanted`` as one stack, joined from the folders in ``path``: all n (a number), or a slice of them.

    With ``like``, a state of the structure that was saved, returns ``(stack, state)``. The slice need not match what
    one process saved, so the number of processes may change.

    Raises ``CheckpointError`` that names missing members, or a folder that does not fit.

    >>> import tempfile
    >>> path = tempfile.mkdtemp()
    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 3)), lora_r=2, modified_modules=["0"])
    >>> stack = delta.init(0, n=8)
    >>> for mine in (slice(0, 4), slice(4, 8)):
    ...     folder = save_shard(delta, fd.take(stack, mine), path, mine)
    >>> all(torch.equal(leaf, stack[name]) for name, leaf in load_shards(delta, path, 8).items())
    True
    >>> load_shards(delta, path, 12)
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: ... lacks the members 8 to 11 of 0 to 11 ...
    """

    def read(folder: Path) -> dict[str, Tensor]:
        found, stack = load(folder, delta.backbone, check_hash=check_hash, example=delta.example)
        if found.names != delta.names or found.shapes != delta.shapes:
            raise CheckpointError(f"'{folder}' holds another delta: expected {delta!r}, found {found!r}.")
        return stack

    return read_shards(read, path, wanted, like)


def _place(mesh: DeviceMesh | None) -> tuple[int, int]:
    """``(rank, world)`` among the processes of ``mesh``, counted row by row."""
    if mesh is None:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ParamsError(f"This process (rank {dist.get_rank()}) is not in {mesh}: call it in processes of the mesh.")
    rank = 0
    for position, size in zip(coordinate, mesh.shape, strict=True):
        rank = rank * size + position
    return rank, mesh.size()


def _groups(mesh: DeviceMesh | None) -> list[tuple[Any, torch.device]]:
    """The process groups to communicate in, one after the other, each with its device."""
    if mesh is not None:
        device = _device(mesh.device_type)
        # The last dimension first: its processes hold neighbours.
        return [(mesh.get_group(dim), device) for dim in reversed(range(mesh.ndim)) if mesh.size(dim) > 1]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    return [(None, _device("cpu" if "gloo" in dist.get_backend() else "cuda"))]


def _device(kind: str) -> torch.device:
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _gather(tree: Any, group: Any, device: torch.device) -> Any:
    """Gather the whole tree in one collective, with each member's leaves as one row of bytes."""
    world = dist.get_world_size(group)
    pairs = [(name, leaf.detach()) for name, leaf in named(tree) if isinstance(leaf, Tensor)]
    k = members(tree)
    kinds = [(name, tuple(leaf.shape[1:]), leaf.dtype) for name, leaf in pairs]
    facts = torch.tensor([k, _number(kinds)], device=device)
    all_facts = [torch.empty_like(facts) for _ in range(world)]
    dist.all_gather(all_facts, facts, group=group)
    counts, numbers = torch.stack(all_facts).unbind(1)
    unlike = (numbers != numbers[0]).nonzero().flatten().tolist()
    if unlike:
        raise ParamsError(
            f"gather: the leaves of process {unlike[0]} differ from those of process 0 in names, shapes after the "
            f"member axis, dtypes or order; here the first is {kinds[0]}. Give gather the same tree on all processes."
        )
    rows = [leaf.contiguous().to(device).reshape(k, -1) for _, leaf in pairs]
    rows = [row.view(torch.uint8) if row.shape[1] else row.new_empty(k, 0, dtype=torch.uint8) for row in rows]
    widths, most = [row.shape[1] for row in rows], int(counts.max())
    own = torch.zeros(most, sum(widths), dtype=torch.uint8, device=device)
    torch.cat(rows, 1, out=own[:k])
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=group)
    kept = torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
    found = iter(zip(kept.split(widths, 1), pairs, strict=True))

    def unpack(leaf: Tensor) -> Tensor:
        row, _ = next(found)
        # A copy, because bytes can be viewed as numbers only if they begin at a multiple of the numbers' size.
        plain = row.clone(memory_format=torch.contiguous_format).view(-1).view(leaf.dtype)
        return plain.view(kept.shape[0], *leaf.shape[1:]).to(leaf.device)

    return pytree.tree_map_only(Tensor, unpack, tree)


def _number(facts: Any) -> int:
    """A hash of ``facts`` that is the same in every process (Python's own is not)."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "big")
