"""The figures of a delta: how many numbers it has, how many of them train, and how much memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...plan.plan import Planned, shapes_of
from ...run.check import check_member, check_stack
from .nodes import Node, tree

GIB = 1024**3


@dataclass(frozen=True)
class DeltaStatistics:
    """What ``delta.log`` counts. Counts are those of one member unless they begin with ``all_``; ratios are fractions.

    Attributes:
        total_parameters: the backbone's parameters, each tied one once, and the delta's leaves.
        trainable_parameters: the delta's leaves that train and the backbone's that are trained too.
        trainable_ratio: trainable_parameters / total_parameters.
        delta_parameters: the delta's leaves that train.
        delta_ratio: delta_parameters / total_parameters.
        constant_parameters: the delta's leaves that never train (scales, frozen bases); not in any other count.
        params_bytes: the memory of one member's params, constants too.
        backbone_bytes: that of the backbone's parameters.
        members: n for a stack, 1 for one member.
        all_total_parameters, all_trainable_parameters, all_delta_parameters, all_params_bytes: of all members; what
            is frozen counts once.
        cudamem, maxcudamem: memory of tensors now and at its peak, in GiB over all CUDA devices; 0.0 without one.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LoraModel(model, lora_r=2, modified_modules=["0"])
    >>> stats = delta.log(delta.init(0, n=3), visualization=False, delta_ratio=False, cuda_memory=False)
    A stack of 3 members; shapes and ratios are those of one.
    Trainable ratio: 24/64 = 37.5000 % (72 in all members)
    >>> stats.total_parameters, stats.trainable_parameters, stats.trainable_ratio, stats.all_trainable_parameters
    (64, 24, 0.375, 72)
    """

    total_parameters: int
    trainable_parameters: int
    trainable_ratio: float
    delta_parameters: int
    delta_ratio: float
    constant_parameters: int
    params_bytes: int
    backbone_bytes: int
    members: int
    all_total_parameters: int
    all_trainable_parameters: int
    all_delta_parameters: int
    all_params_bytes: int
    cudamem: float
    maxcudamem: float

    def to_dict(self) -> dict[str, int | float]:
        """The figures as JSON-ready data, under their names."""
        return asdict(self)


def count_members(delta: Planned, params: Mapping[str, Tensor] | None) -> int | None:
    """n if ``params`` is a stack of n members, ``None`` for one member; errors as for ``delta.apply``.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> count_members(delta, delta.init(0)), count_members(delta, delta.init(0, n=3)), count_members(delta, None)
    (None, 3, None)
    """
    if params is None:
        return None
    shapes = shapes_of(delta)
    named = [*delta.backbone.named_parameters(), *delta.backbone.named_buffers()]
    others = {name: tuple(tensor.shape) for name, tensor in named if name not in shapes}
    if isinstance(params, Mapping) and any(
        isinstance(params[name], Tensor) and params[name].ndim > len(shapes[name]) for name in params if name in shapes
    ):
        return check_stack(params, shapes, delta.plan.keys(), others)
    check_member(params, shapes, delta.plan.keys(), others)
    return None


def statistics(delta: Planned, params: Mapping[str, Tensor] | None = None, root: Node | None = None) -> DeltaStatistics:
    """The figures of ``params`` (a member, a stack, ``None``: fresh ones); ``root`` is their tree if it is at hand.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> statistics(fd.BitFitModel(model, modified_modules=["0"])).delta_parameters
    8
    """
    members = count_members(delta, params) or 1
    root = root or tree(delta.backbone, delta.plan, params)
    frozen, own = root.numel("frozen"), root.numel("delta")
    trainable = root.numel("trainable") + own
    total = frozen + trainable
    params_bytes = root.nbytes("delta", "constant", "trainable")
    now, at_most = cuda_memory()
    return DeltaStatistics(
        total_parameters=total,
        trainable_parameters=trainable,
        trainable_ratio=trainable / total if total else 0.0,
        delta_parameters=own,
        delta_ratio=own / total if total else 0.0,
        constant_parameters=root.numel("constant"),
        params_bytes=params_bytes,
        backbone_bytes=sum(p.numel() * p.element_size() for p in delta.backbone.parameters()),
        members=members,
        all_total_parameters=frozen + members * trainable,
        all_trainable_parameters=members * trainable,
        all_delta_parameters=members * own,
        all_params_bytes=members * params_bytes,
        cudamem=now,
        maxcudamem=at_most,
    )


def cuda_memory() -> tuple[float, float]:
    """GiB that tensors take now and took at most, over all CUDA devices that the process sees.

    >>> now, at_most = cuda_memory()
    >>> 0.0 <= now <= at_most
    True
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    now, at_most = (sum(map(read, devices)) for read in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
    return now / GIB, at_most / GIB


def trainable_parameters_names(delta: Planned, params: Mapping[str, Tensor] | None = None) -> list[str]:
    """The names in ``params`` (default: all of the delta's) that train: delta leaves and trained backbone leaves.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> fd.inspect.trainable_parameters_names(fd.LoraModel(model, modified_modules=["0"]))
    ['0.lora.lora_A', '0.lora.lora_B']
    """
    count_members(delta, params)
    constants = frozenset(delta.plan.constants)
    return [name for name in delta.plan.order if (params is None or name in params) and name not in constants]


def frozen_parameters_names(delta: Planned, params: Mapping[str, Tensor] | None = None) -> list[str]:
    """The names that do not train: the backbone's parameters, each tied one once, then the delta's constants.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LoraModel(model, modified_modules=["0"], unfrozen_modules=["deltas", "0.bias"])
    >>> fd.inspect.frozen_parameters_names(delta)
    ['0.weight', '0.lora.scale']
    """
    trained = set(trainable_parameters_names(delta, params))
    own = [name for name, _ in delta.backbone.named_parameters() if name not in trained]
    return own + [name for name in delta.plan.constants if params is None or name in params]


def num_trainable_parameters(delta: Planned, params: Mapping[str, Tensor] | None = None) -> int:
    """How many numbers of one member train.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> fd.inspect.num_trainable_parameters(delta)
    96
    """
    return statistics(delta, params).trainable_parameters


def num_total_parameters(delta: Planned, params: Mapping[str, Tensor] | None = None) -> int:
    """How many parameters the backbone has together with one member, without constants.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> fd.inspect.num_total_parameters(delta)
    136
    """
    return statistics(delta, params).total_parameters
