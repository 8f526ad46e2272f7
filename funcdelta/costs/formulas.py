"""Bytes, operations and seconds of one step of n members on one backbone.

P numbers in matrices of the backbone (of all of its numbers N), w bytes each; L layers of width d, feed-forward f,
attention d_a, keys and values d_kv a token; T tokens of n members in rows of s; m numbers a member in products; F
operations and BW bytes a second.

A training step. Every token costs 2P forward and 2P backward: inputs have gradients, frozen weights have none (with
them it would be 6P). Attention: two products of s · d_a forward, four backward, 2 operations each. A member's own
matrices have gradients too, 6m::

    operations = T · (4 P + 12 L s d_a + 6 m)
    bytes      = 2 · w N · chunks              the backbone is read twice, by all members of a chunk together
               + T · 4 w · Σ (in + out)        each site reads what enters, adds to what leaves, and back
               + n · 8 · 4 m                   the optimiser reads and writes params, gradients and moments
    seconds    = max(operations / F, 2 w N · chunks / BW) + (the other bytes) / BW

Where T exceeds F / BW (2-byte weights) the first term is arithmetic: n members cost what T tokens cost, whatever n is.
No step is shorter than starting its kernels: L · launch a forward pass, and twice that a backward pass. Memory::

    backbone w N;  members and gradients 4 (m + constants) n each;  moments 8 m n
    activations T · w · L (4 d + 2 d_a + d_kv + 3 f), and 8 T V bytes of logits

Activations are an estimate: what autograd keeps for the layers of today's decoders with fused attention and frozen
weights. Everything else is a count. Gradients are counted down to the first layer; with sites in the last layers
alone, ``trained_layers`` cuts the backward terms.

A step of generation is one token a row, of s tokens so far::

    operations = T · (2 P + 4 L s d_a + 2 m)
    bytes      = w P + n · 4 m + T · s L d_kv w          the backbone, each member, the cache
    seconds    = max(operations / F, bytes / BW)
"""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Device
from .sizes import Backbone, Member


@dataclass(frozen=True)
class Job:
    """n members, each with ``rows`` rows of ``length`` tokens; ``chunk`` members at a time keep their activations.

    ``trained_layers``: gradients reach down so many layers from the last one; ``None``: all.

    >>> Job(64, rows=2, length=128).tokens
    16384
    """

    members: int
    rows: int = 1
    length: int = 512
    chunk: int | None = None
    trained_layers: int | None = None

    @property
    def tokens(self) -> int:
        """T, of all members in one step of training."""
        return self.members * self.rows * self.length

    @property
    def chunks(self) -> int:
        """How often the backbone runs in one step."""
        return 1 if self.chunk is None else -(-self.members // self.chunk)


@dataclass(frozen=True)
class Cost:
    """Bytes by what they are for, operations, bytes moved, and the seconds of one step.

    ``bound`` says what takes the time: ``"arithmetic"``, ``"memory"`` or ``"launches"``.
    """

    memory: dict[str, float]
    operations: float
    moved: float
    seconds: float
    bound: str

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.memory.values())


def training_cost(backbone: Backbone, member: Member, job: Job, device: Device, shards: int = 1) -> Cost:
    """One step of training by the formulas above, on one device that holds one of ``shards`` parts of the backbone.

    >>> from funcdelta.costs import DEVICES, from_numbers
    >>> cost = training_cost(*from_numbers(layers=32, width=4096), Job(64, rows=1, length=512), DEVICES["h100"])
    >>> round(cost.seconds, 1), cost.bound, round(cost.memory["optimiser"] / 1e9, 2)
    (1.8, 'arithmetic', 2.15)
    """
    n, w, tokens = job.members, device.weight_bytes, job.tokens
    back = 1.0 if job.trained_layers is None else min(job.trained_layers, backbone.layers) / backbone.layers
    attention = backbone.layers * job.length * backbone.attended
    operations = tokens * (2 * backbone.linear * (1 + back) + (4 + 8 * back) * attention + 6 * member.multiplied)
    read = job.chunks * w * backbone.parameters * (1 + back)
    others = tokens * 4 * w * member.adapted + n * 8 * 4 * member.trained
    at_once = min(job.chunk or n, n) * job.rows * job.length
    kept = 4 * backbone.width + 2 * backbone.attended + backbone.cached + 3 * backbone.intermediate
    memory = {
        "backbone": _held(backbone, w, shards),
        "members": n * member.leaf_bytes * (member.trained + member.constants),
        "gradients": n * member.leaf_bytes * (member.trained + member.constants),
        "optimiser": n * (2 * 4 * member.trained + 8),
        "activations": at_once * (w * backbone.layers * back * kept + 8 * backbone.vocabulary),
    }
    return _cost(memory, operations, read, others, job.chunks * (1 + 2 * back) * backbone.layers, device)


def decode_cost(backbone: Backbone, member: Member, job: Job, device: Device, shards: int = 1) -> Cost:
    """One step of generation by the formulas above: one token a row, each row with its member's delta.

    >>> from funcdelta.costs import DEVICES, from_numbers
    >>> decode_cost(*from_numbers(layers=32, width=4096), Job(16, rows=1, length=512), DEVICES["h100"]).bound
    'memory'
    """
    n, w, rows = job.members, device.weight_bytes, job.members * job.rows
    attention = backbone.layers * job.length * backbone.attended
    operations = rows * (2 * backbone.linear + 4 * attention + 2 * member.multiplied)
    cache = rows * job.length * backbone.layers * backbone.cached * w
    leaves = n * member.leaf_bytes * (member.trained + member.constants)
    hidden = w * (4 * backbone.width + 3 * backbone.intermediate + backbone.vocabulary)
    memory = {"backbone": _held(backbone, w, shards), "members": leaves, "cache": cache, "activations": rows * hidden}
    return _cost(memory, operations, w * backbone.linear + leaves + cache, 0, backbone.layers, device)


def _held(backbone: Backbone, w: int, shards: int) -> float:
    """A shard of the backbone, and two layers gathered at a time: the one that runs and the next."""
    whole = w * backbone.parameters
    return whole if shards == 1 else whole / shards + min(2, backbone.layers) * whole / backbone.layers


def _cost(
    memory: dict[str, float], operations: float, read: float, others: float, layers: float, device: Device
) -> Cost:
    speed, bandwidth = device.flops * device.efficiency, device.bandwidth * device.efficiency
    arithmetic, reading, rest = operations / speed, read / bandwidth, others / bandwidth
    seconds, floor = max(arithmetic, reading) + rest, layers * device.launch
    bound = "launches" if floor > seconds else "arithmetic" if arithmetic > reading + rest else "memory"
    return Cost(memory, operations, read + others, max(seconds, floor), bound)
