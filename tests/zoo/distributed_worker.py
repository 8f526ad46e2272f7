"""What the processes of test_distributed.py run: ``python distributed_worker.py FOLDER CASE:WORLD ...``.

Forks WORLD processes a case, after its imports; each writes what it found to FOLDER/<case>-<rank>.pt. Started by
torchrun, ``FOLDER CASE``, it is one of the processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import funcdelta as fd

VOCABULARY, WIDTH, LENGTH, STEPS = 19, 12, 5, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class Tiny(nn.Module):
    """Odd sizes, so that shards are uneven; a buffer; a norm at the end of the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("shift", torch.randn(WIDTH))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = (self.embed(input_ids) if inputs_embeds is None else inputs_embeds) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


LORA = fd.LoraConfig(lora_r=2, modified_modules=["up", "down"])
CONFIGS: dict[str, fd.BaseDeltaConfig] = {
    "lora": LORA,
    # Backbone leaves in a unit of their own and in the root's; one is the model's last module but one, a norm.
    "trained": LORA.replace(unfrozen_modules=("deltas", "head", "norm", "embed")),
    # out_proj is read by the attention above it: the weights form. Norms end in a view.
    "bitfit": fd.BitFitConfig(modified_modules=["attention", "norm", "down"]),
    "adapter": fd.AdapterConfig(bottleneck_dim=3, modified_modules=["blocks.0", "blocks.1"]),
    "soft_prompt": fd.SoftPromptConfig(soft_token_num=2),
}


def data(n: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """A batch (n, rows, length) and labels (n, rows), the same in every process."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (n, rows, LENGTH), generator=rng)
    return ids, torch.randint(3, (n, rows), generator=rng)


def losses_of(delta: fd.DeltaModel) -> Any:
    def losses(stack: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return torch.vmap(F.cross_entropy)(delta.apply_many(stack, ids, in_dims=0, engine="fold"), labels)

    return losses


def rates(n: int) -> Tensor:
    return torch.linspace(0.01, 0.05, n)


def train(
    delta: fd.DeltaModel, n: int, mine: slice, folder: Path | None = None, dies_after: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The members ``mine`` of n, trained from wherever ``folder`` has them; saved there after every step."""
    ids, labels = (values[mine] for values in data(n))
    step = fd.value_and_grad(losses_of(delta), in_dims=0)
    optimizer = fd.optim.adamw(lr=rates(n)[mine], weight_decay=0.1)
    stack = delta.init(fd.seeds(0, n)[mine])
    state, done, losses = optimizer.init(stack), 0, torch.zeros(mine.stop - mine.start)
    if folder is not None and (folder / f"members-{mine.start}-{mine.stop - 1}").exists():
        stack, state = fd.distributed.load_shards(delta, folder, mine, like=state)
        done = int(state.step[0])
    for now in range(done, STEPS):
        losses, grads = step(stack, ids, labels)
        updates, state = optimizer.update(grads, state, stack)
        stack = fd.tree.add(stack, updates)
        if folder is not None:
            fd.distributed.save_shard(delta, stack, folder, mine, state)
        if now + 1 == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
    return stack, losses


def units(skeleton: nn.Module, mesh: Any) -> None:
    """Every block is one unit, the rest of the model another."""
    for block in skeleton.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(skeleton, mesh=mesh)


# -- cases ---------------------------------------------------------------------------------------------------------


def members(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Members over processes, an uneven number; every process has all results."""
    n, delta = 5, fd.DeltaModel(Tiny(), LORA)
    mine = fd.distributed.shard(n)
    stack, losses = train(delta, n, mine)
    k = mine.stop - mine.start
    odd = {
        "half": torch.arange(mine.start, mine.stop).to(torch.bfloat16),
        "flags": (torch.arange(mine.start, mine.stop) % 2 == 0, 7),
        "pairs": torch.arange(mine.start, mine.stop).view(k, 1).expand(k, 3).double(),
        "nothing": torch.zeros(k, 0),
    }
    found = {"mine": mine, "odd": fd.distributed.gather(odd), "mean": fd.distributed.mean({"w": torch.ones(2) * rank})}
    found |= fd.distributed.gather({"stack": stack, "losses": losses})
    for name, call in {
        "unlike": lambda: fd.distributed.gather({"a": torch.ones(2, 3 + rank)}),
        "few": lambda: fd.distributed.shard(1),
    }.items():
        try:
            call()
        except fd.errors.ParamsError as error:
            found[name] = str(error)
    return found


def backbone(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """The backbone over processes: everything that one process gives, for each of the configs."""
    mesh = init_device_mesh("cpu", (world,))
    model = Tiny()
    before = {
        name: (id(t), t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    found: dict[str, Any] = {}
    ids, labels = data(3)
    for name, config in CONFIGS.items():
        plain = fd.DeltaModel(model, config, example=(ids[0],))
        sharded = fd.DeltaModel(model, config, example=(ids[0],), prepare=lambda skeleton: units(skeleton, mesh))
        stack = plain.random_members(3, plain.plan.present(dict.fromkeys(plain.names)))
        one = fd.take(stack, 1)
        for kind, delta in (("expected", plain), ("found", sharded)):
            results = {
                "apply": delta.apply(one, ids[0]),
                "bare": delta.apply({}, ids[0]),
                # A bare row would be shorter than the others.
                "rows": delta.apply_rows(stack, [2, 0 if name == "soft_prompt" else -1], ids[0]),
                **{
                    engine: delta.apply_many(stack, ids, in_dims=0, engine=engine)
                    for engine in ("fold", "vmap", "loop")
                },
            }
            results |= fd.value_and_grad(losses_of(delta), in_dims=0)(stack, ids, labels)[1]
            alone = fd.value_and_grad(lambda p: F.cross_entropy(delta.apply(p, ids[0]), labels[0]))(one)[1]  # noqa: B023
            results |= {f"alone {key}": leaf for key, leaf in alone.items()}
            if not delta.plan.trained:
                view = delta.bind(one)
                view(ids[0]).square().sum().backward()
                results |= {f"view {key}": p.grad for key, p in view.named_parameters() if p.requires_grad}
            found.setdefault(kind, {}).update({(name, key): value.detach() for key, value in results.items()})
        if name == "lora":
            first, second = sharded.program.skeletons.get(None).module, sharded.program.skeletons.build(None).module
            pairs = zip(first.parameters(), second.parameters(), strict=True)
            found["shared"] = all(a.to_local().data_ptr() == b.to_local().data_ptr() for a, b in pairs)
            found["part"] = (
                sum(p.to_local().numel() for p in first.parameters()),
                sum(p.numel() for p in model.parameters()),
            )
        if name == "trained":
            found["bind"] = refusal(fd.errors.ParamsError, lambda: sharded.bind(one))  # noqa: B023
    found["unchanged"] = all(
        (id(t), t.data_ptr(), t._version) == before[name][:3] and torch.equal(t, before[name][3])
        for name, t in model.state_dict(keep_vars=True).items()
    )
    deep = fd.DeltaModel(
        model, CONFIGS["bitfit"], prepare=lambda s: [fully_shard(b.attention.out_proj, mesh=mesh) for b in s.blocks]
    )
    found["below"] = refusal(fd.errors.EngineError, lambda: deep.apply(deep.init(0), ids[0]))
    fully_shard(model, mesh=mesh)
    found["already"] = refusal(fd.errors.ConfigError, lambda: fd.DeltaModel(model, LORA))
    return found


def both(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Members over all processes of a 2-D mesh, the backbone over one of its dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("members", "shards"))
    delta = fd.DeltaModel(Tiny(), LORA, prepare=lambda skeleton: units(skeleton, mesh["shards"]))
    mine = fd.distributed.shard(6, mesh)
    stack, losses = train(delta, 6, mine)
    found = fd.distributed.gather({"stack": stack, "losses": losses}, mesh)
    return found | {"mine": mine, "group": fd.distributed.shard(6, mesh["members"])}


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """The last process kills itself in the middle, the others end."""
    delta = fd.DeltaModel(Tiny(), LORA)
    train(delta, 5, fd.distributed.shard(5), folder / "run", dies_after=2 if rank == world - 1 else None)
    return {}


def resumed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Each process goes on from what it saved."""
    delta, mine = fd.DeltaModel(Tiny(), LORA), fd.distributed.shard(5)
    like = fd.optim.adamw(lr=rates(5)).init(delta.init(0, n=5))
    _, state = fd.distributed.load_shards(delta, folder / "run", mine, like=like)
    stack, _ = train(delta, 5, mine, folder / "run")
    return {"stack": fd.distributed.gather(stack), "began": int(state.step[0])}


def refusal(kind: type[Exception], call: Any) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing was raised"


CASES = {case.__name__: case for case in (members, backbone, both, killed, resumed)}


def run(case: str, rank: int, world: int, folder: Path, init: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap without a batching rule
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    found = CASES[case](rank, world, folder)
    torch.save(found, folder / f"{case}-{rank}.pt")
    dist.destroy_process_group()


def in_forks(case: str, world: int, folder: Path) -> list[int]:
    """The exit codes of ``world`` processes that run ``case``; their errors go to FOLDER/<case>.log."""
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            log = os.open(folder / f"{case}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 2)
            try:
                run(case, rank, world, folder, f"file://{folder}/{case}.rendezvous")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        run(sys.argv[2], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder, "env://")
        sys.exit()
    codes = {}
    for word in sys.argv[2:]:
        case, world = word.split(":")
        codes[case] = in_forks(case, int(world), folder)
    print(json.dumps(codes))
