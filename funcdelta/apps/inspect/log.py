"""delta.log: the tree of the backbone with the delta in it, and the figures."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...habits import need_dict
from ...plan.plan import Planned
from .folding import folded
from .nodes import pruned, tree
from .render import bytes_text, show
from .statistics import DeltaStatistics, count_members, statistics


def log(
    delta: Planned,
    params: Mapping[str, Tensor] | None = None,
    delta_ratio: bool = True,
    trainable_ratio: bool = True,
    visualization: bool = True,
    cuda_memory: bool = True,
) -> DeltaStatistics:
    """Print the folded tree of the backbone with ``params`` in it, ratios and memory; see ``delta.log``.

    >>> from funcdelta.apps.inspect import log
    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> stats = log(delta, delta.init(0), delta_ratio=False, cuda_memory=False)
    Sequential
    └── 0 (Linear) weight:[8, 4] bias:[8]
        └── bitfit (BitFitConfig) bias*:[8]
    * trained, of the delta   frozen
    Trainable ratio: 8/48 = 16.6667 %
    """
    if params is not None:
        need_dict(params, "log", "delta.log(params), or delta.log() for the shapes alone")
    members = count_members(delta, params)
    root = pruned(tree(delta.backbone, delta.plan, params))
    stats = statistics(delta, params, root)
    if visualization:
        show(folded(root))
    lines = []
    if members is not None and (visualization or trainable_ratio or delta_ratio):
        lines.append(f"A stack of {members} members; shapes and ratios are those of one.")
    if trainable_ratio:
        every = stats.all_trainable_parameters
        lines.append(_ratio("Trainable", stats.trainable_parameters, stats.total_parameters, members, every))
    if delta_ratio:
        every = stats.all_delta_parameters
        lines.append(_ratio("Delta parameter", stats.delta_parameters, stats.total_parameters, members, every))
    if cuda_memory:
        lines.append(_memory(stats, members))
    for line in lines:
        print(line)
    return stats


def _ratio(what: str, part: int, whole: int, members: int | None, every: int) -> str:
    """``part/whole = x %``, and how many there are in all members."""
    more = "" if members is None else f" ({every:,} in all members)"
    return f"{what} ratio: {part:,}/{whole:,} = {part / whole if whole else 0.0:.4%}{more}".replace("%", " %")


def _memory(stats: DeltaStatistics, members: int | None) -> str:
    """What params, the backbone and CUDA tensors take."""
    params = f"params {bytes_text(stats.params_bytes)}"
    if members is not None:
        params += f" a member, {bytes_text(stats.all_params_bytes)} in all"
    cuda = f"CUDA {stats.cudamem:.2f} GiB now, {stats.maxcudamem:.2f} GiB at most"
    return f"Memory: {params}; backbone {bytes_text(stats.backbone_bytes)}; {cuda}"
