"""DeltaModel: a static, stateless delta on a backbone; every call is a pure function of params."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .errors import ConfigError, ParamsError, shown
from .files.checkpoint import Facts, push, save
from .files.configfile import storable
from .fresh import fresh_member, fresh_stack
from .habits import Habits, need_dict, without_dead_options
from .kinds import count
from .match import as_names
from .merge import merge, merged
from .methods.config import BaseDeltaConfig
from .plan.building import build_plan
from .plan.kinds import COMPUTES, check_device
from .plan.naming import named_leaves
from .plan.plan import Plan, shapes_of
from .plan.sharing import expand_member, expand_stack
from .run.auto import Explanation, explain, run_any
from .run.call import Params, Prepare
from .run.checked import Checks
from .run.conditions import GIVEN, checked
from .run.engines import BY_NAME
from .run.forward import without_cache
from .run.inputs import InDims, Inputs, Readings
from .run.outputs import join_chunks
from .run.program import Program
from .run.route import route_rows
from .run.single import call_single, tell_missed
from .run.widths import measure_attention, measure_shapes
from .transforms import current_transform
from .trees.resident import Resident
from .trees.routing import Index
from .trees.stack import partition, seeds, slices, take
from .views.bound import bind
from .views.held import refuse_views
from .views.routed import bind_rows

if TYPE_CHECKING:
    from .apps.inspect import DeltaStatistics

ENGINES = ("auto", *BY_NAME)
FACTS = operator.attrgetter("shape", "dtype", "layout", "is_meta")
"""The facts about a leaf that the checks of params depend on."""


class DeltaModel(Habits):
    """Changes to ``backbone_model`` as pure functions of params; the backbone itself is never modified.

    Args:
        backbone_model: any ``nn.Module``.
        configs: one config per delta; the first one acts first.
        example: inputs (a dict of keywords, or a tuple), needed if shapes cannot be read from the weights.
        prepare: called once on every private copy of the backbone's structure.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> delta = fd.DeltaModel(backbone, fd.LoraConfig(lora_r=2, modified_modules=["0", "2"]))
    >>> params = delta.init(seed=0)
    >>> x = torch.randn(3, 4)
    >>> torch.equal(delta.apply(params, x), backbone(x))  # B starts at zero
    True
    >>> outs = delta.apply_many(delta.init(0, n=5), x)
    >>> outs.shape
    torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        backbone_model: nn.Module,
        *configs: BaseDeltaConfig,
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        if not isinstance(backbone_model, nn.Module):
            raise ConfigError(f"backbone_model is a {type(backbone_model).__name__}; expected an nn.Module.")
        refuse_views(backbone_model)
        if not configs or not all(isinstance(config, BaseDeltaConfig) for config in configs):
            found = ", ".join(type(config).__name__ for config in configs) or "nothing"
            raise ConfigError(f"Pass one or more configs, DeltaModel(backbone, fd.LoraConfig(...)); found {found}.")
        axes = {config.batch_dim for config in configs}
        if len(axes) > 1:
            raise ConfigError(f"The configs disagree about batch_dim: {sorted(axes)}.")
        self.backbone = backbone_model
        self.configs = configs
        self.example = example
        self.prepare = prepare
        plan = build_plan(
            backbone_model,
            configs,
            lambda paths: measure_shapes(backbone_model, paths, example),
            lambda paths: measure_attention(backbone_model, paths, example),
        )
        self.program = Program(backbone_model, plan, axes.pop(), prepare)
        self._read_backbone()

    def _read_backbone(self) -> None:
        """Cache the backbone's tensors as detached aliases, each once, and the shapes of all leaves."""
        self._generation = self.program.skeletons.generation
        self._readings = Readings(self.backbone, self.program.batch_dim)
        self._shapes, self._groups = shapes_of(self.program), self.plan.keys()
        self.constants: tuple[str, ...] = self.plan.constants
        self._constants = frozenset(self.constants)
        named = [*self.backbone.named_parameters(), *self.backbone.named_buffers()]
        self._tensors = {name: tensor.detach() for name, tensor in named}
        self._backbone_shapes = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items() if name not in self._shapes
        }
        self._checks = Checks(self._shapes, self._groups, self._backbone_shapes, self.plan.kinds)

    def _follow_refresh(self) -> None:
        """Read the backbone again if this delta was refreshed in another mode, or a change of it was noticed."""
        if self._generation != self.program.skeletons.generation:
            self._read_backbone()

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan: which config acts where. All modes of this delta share it."""
        return self.program.plan

    @property
    def batch_dim(self) -> int:
        """The axis of the inputs that counts rows."""
        return self.program.batch_dim

    @property
    def mode_flag(self) -> bool | None:
        """The mode that was chosen; ``None`` means the backbone's own flags at the time the delta was built."""
        return self.program.training

    @property
    def backbone_model(self) -> nn.Module:
        """The backbone, under OpenDelta's name."""
        return self.backbone

    @property
    def delta_type(self) -> str:
        """The method's name, or ``union`` for several configs."""
        return self.configs[0].delta_type if len(self.configs) == 1 else "union"

    @property
    def sites(self) -> tuple[str, ...]:
        """The matched module paths, in the backbone's order; a span is listed where it begins. Print them as a dry run.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.sites
        ('0',)
        """
        return tuple(dict.fromkeys(a.site.address for a in self.plan.all()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all leaves, in the order of params."""
        return tuple(self._shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of one member."""
        return dict(self._shapes)

    def trainable(self, name: str) -> bool:
        """Whether the leaf ``name`` trains: ``fd.partition(params, delta.trainable)``.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> some, rest = fd.partition(delta.init(0), delta.trainable)
        >>> list(some), list(rest)
        (['0.lora.lora_A', '0.lora.lora_B'], ['0.lora.scale'])
        """
        return name not in self._constants

    @property
    def training(self) -> bool:
        """Whether calls run in training mode."""
        return self.program.skeletons.flags[""] if self.mode_flag is None else self.mode_flag

    def __repr__(self) -> str:
        inner = ", ".join(f"{a.name} at {a.site.path}" for a in self.plan.all()[:3])
        more = len(self.plan.all()) - 3
        return (
            f"{type(self).__name__}({type(self.backbone).__name__}: {inner}{f' and {more} more' if more > 0 else ''}; "
            f"{sum(_numel(shape) for shape in self._shapes.values()):,} numbers a member)"
        )

    def __reduce__(self) -> Any:
        """Pickle what the delta was made from: the backbone, the configs and the mode."""
        return _rebuilt, (self.backbone, self.configs, self.example, self.prepare, self.mode_flag)

    # -- modes -----------------------------------------------------------------------------------------------------

    def mode(self, train: bool = True) -> DeltaModel:
        """This delta in training or evaluation mode; the backbone's own flag is not touched.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.mode(train=False).training, delta.backbone.training
        (False, True)
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.program = self.program.mode(train)
        return other

    def refresh(self) -> DeltaModel:
        """Read the backbone again after ``backbone.to(...)`` or a replaced parameter; returns the same delta.

        >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> delta = fd.LoraModel(backbone, modified_modules=["0"])
        >>> params, backbone = delta.init(0), backbone.double()
        >>> delta.refresh().apply(params, torch.zeros(3, 4, dtype=torch.float64)).dtype
        torch.float64
        """
        shapes = {a.site.path: a.site.attention for a in self.plan.all() if a.in_attention}
        plan = build_plan(self.backbone, self.configs, lambda paths: self.plan.measured, lambda paths: shapes)
        self.program.refresh(plan)
        self._read_backbone()
        return self

    # -- params ----------------------------------------------------------------------------------------------------

    def init(
        self,
        seed: int | Iterable[int] | torch.Generator,
        n: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Fresh params of one member, or with ``n`` (or several seeds) a stack.

        A leaf depends only on the member's seed and the site's name, so member i is the same for every n. It is on its
        site's device and has its site's dtype, or float32 if the site is half precision or quantised; ``dtype`` and
        ``device`` override this.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
        >>> {name: tuple(leaf.shape) for name, leaf in delta.init(0, n=3).items()}
        {'0.lora.lora_A': (3, 2, 4), '0.lora.lora_B': (3, 8, 2), '0.lora.scale': (3,)}
        >>> one = delta.init(fd.seeds(0, 3)[1])
        >>> all(torch.equal(leaf, fd.take(delta.init(0, n=64), 1)[name]) for name, leaf in one.items())
        True
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in COMPUTES):
            raise ParamsError(f"dtype={dtype!r}: write a floating-point dtype, such as torch.float32.")
        if device is not None:
            check_device(device)
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        if isinstance(seed, Iterable) and not (isinstance(seed, str) or (isinstance(seed, Tensor) and seed.ndim == 0)):
            each = [_seed(one) for one in seed]
            if n is not None and n != len(each):
                raise ParamsError(f"n={shown(n)}, but there are {len(each)} seeds: leave out n.")
        elif n is None:
            with torch.inference_mode(False):  # inference tensors can never train
                return fresh_member(self.plan, self.backbone, self.names, _seed(seed), dtype, device)
        else:
            each = seeds(_seed(seed), count(n, "n", "members", least=1))
        if not each:
            raise ParamsError("A stack needs at least one member: no seeds were given.")
        with torch.inference_mode(False):
            return fresh_stack(self.plan, self.backbone, self.names, each, dtype, device)

    def random_members(self, n: int, present: frozenset[str]) -> dict[str, Tensor]:
        """n members with noise on their initial values, for the probe of the batch's layout.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> list(delta.random_members(2, frozenset(["lora"])))[1]
        '0.lora.lora_B'
        """
        return dict(self.program.random_members(count(n, "n", "members", least=1), present))

    def attach(self, params: Params | None = None) -> dict[str, Tensor]:
        """``{every backbone name: tensor} | params``: one dict with everything, which ``apply`` accepts.

        A tied tensor is listed once; if you change it there, the change acts on all its ends.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> params = delta.init(0)
        >>> list(delta.attach(params))
        ['0.weight', '0.bias', '0.lora.lora_A', '0.lora.lora_B', '0.lora.scale']
        """
        params = need_dict(params, "attach", "full = delta.attach(params)")
        self._follow_refresh()
        self._checks.member(params)
        return self._tensors | dict(params)

    def detach(self, full: Params | None = None) -> dict[str, Tensor]:
        """``full`` without this delta's leaves; trained backbone leaves get the backbone's values again.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> list(delta.detach(delta.attach(delta.init(0))))
        ['0.weight', '0.bias']
        """
        full = need_dict(full, "detach", "plain = delta.detach(full)")
        self._follow_refresh()
        kept = {name: tensor for name, tensor in full.items() if name not in self._shapes or name in self.plan.trained}
        return {name: self._tensors[name] if name in self.plan.trained else tensor for name, tensor in kept.items()}

    def freeze_module(
        self, module: Any = None, exclude: Iterable[str] | str | None = None, set_state_dict: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(trainable, frozen)``: the dict of ``attach`` split by name; ``exclude`` says what trains.

        ``"deltas"`` stands for this delta's leaves; other names are matched as in ``unfrozen_modules``, whose values in
        the configs apply if ``exclude=None``. No tensor is flagged: differentiate with respect to the first dict.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> trainable, frozen = delta.freeze_module(delta.attach(delta.init(0)))
        >>> list(trainable), list(frozen)
        (['0.lora.lora_A', '0.lora.lora_B'], ['0.weight', '0.bias', '0.lora.scale'])
        """
        full = need_dict(module, "freeze_module", "trainable, frozen = delta.freeze_module(delta.attach(params))")
        names = None if exclude is None else as_names(exclude)
        if names is None:
            chosen = {name for name in self.plan.trained if name in full}
        else:
            chosen = set(named_leaves(self.backbone, names, self.configs[0].common_structure))
            if absent := [name for name in chosen if name not in full]:
                raise ParamsError(f"freeze_module: {absent[0]} is not in the dict: pass delta.attach(params).")
        if names is None or "deltas" in names:
            chosen |= {
                name for name in full if name in self._shapes and name not in self._tensors and self.trainable(name)
            }
        return partition(full, lambda name: name in chosen)

    # -- calls -----------------------------------------------------------------------------------------------------

    def apply(self, params: Params, /, *args: Any, inputs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The backbone's output with one member's params; ``apply({}, ...)`` equals the backbone bit for bit.

        Raises ``ParamsError`` for unknown, missing or misshapen leaves, and ``StackError`` for a stack.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.apply(delta.init(0), torch.zeros(3, 4)).shape
        torch.Size([3, 8])
        """
        params = self._member(params)
        mapped = not torch.compiler.is_compiling() and current_transform() is not None
        if mapped or inputs is not None:
            args, kwargs = self._given(args, kwargs, inputs, transformed=mapped)
        if GIVEN in kwargs:
            kwargs = checked(self.plan, self.backbone, params, kwargs)
        program = self.program
        shared = program.skeletons.plan.shared
        expanded = expand_member(shared, params) if shared else params
        if torch.compiler.is_compiling() or program.is_verified(params):
            return call_single(program, expanded, args, kwargs)
        reached: set[str] = set()
        output = call_single(program, expanded, args, kwargs, reached)
        tell_missed(program, params, reached)
        return output

    def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Same as :meth:`apply`."""
        return self.apply(params, *args, **kwargs)

    def apply_many(
        self,
        stack: Params,
        /,
        *args: Any,
        in_dims: InDims = None,
        engine: str = "auto",
        chunk_size: int | None = None,
        inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The outputs of all members; leaves are (n, b, …).

        Args:
            in_dims: ``None``: one batch (b, …) for all members; 0: every tensor is (n, b, …); or a dict by input name.
            engine: ``fold`` (all members in one batch), ``trunk`` (a fold that computes the part before the first delta
                once), ``vmap``, ``loop``, or ``auto``: trunk if it saves time, else fold if the model allows it.
            chunk_size: members per batch.

        Raises ``EngineError`` if the chosen engine cannot run the model, naming the place and another engine.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> stack = delta.init(0, n=5)
        >>> delta.apply_many(stack, torch.zeros(3, 4)).shape  # one batch for all
        torch.Size([5, 3, 8])
        >>> delta.apply_many(stack, torch.zeros(5, 3, 4), in_dims=0).shape  # a batch for each
        torch.Size([5, 3, 8])
        """
        if engine not in ENGINES:
            raise ParamsError(f"engine={engine!r}: write one of {', '.join(ENGINES)}.")
        stack, whole = self._given_many(stack, args, kwargs, in_dims, inputs)
        chunks = [slice(0, whole.n)] if chunk_size is None else list(slices(whole.n, chunk_size))
        if len(chunks) == 1:
            return self._many(stack, whole, engine)
        # A copy for each chunk, because a call may write into its inputs (caches).
        own = (whole.private().chunk(chunk.start, chunk.stop) for chunk in chunks)
        parts = [self._many(take(stack, chunk), inputs, engine) for chunk, inputs in zip(chunks, own, strict=True)]
        return join_chunks(parts, [chunk.stop - chunk.start for chunk in chunks])

    def _given_many(
        self, stack: Params, args: Any, kwargs: Any, in_dims: InDims, inputs: Mapping[str, Any] | None
    ) -> tuple[Params, Inputs]:
        n, casts = self._stack(stack)
        stack = self._ready(stack, casts)
        if inputs is not None:
            args, kwargs = self._given(args, kwargs, inputs, transformed=False)
        if GIVEN in kwargs:
            kwargs = checked(self.plan, self.backbone, stack, kwargs)
        return stack, self._readings.read(n, args, kwargs, in_dims)

    def _many(self, stack: Params, inputs: Inputs, engine: str) -> Any:
        given, reached, program = tuple(stack), None, self.program
        if not (torch.compiler.is_compiling() or program.is_verified(given)):
            reached = set[str]()
        shared = program.skeletons.plan.shared
        expanded = expand_stack(shared, stack) if shared else stack
        run = BY_NAME.get(engine, run_any)
        output = run(program, expanded, inputs, reached)
        if reached is not None:
            tell_missed(self.program, given, reached)
        return output

    def explain(
        self,
        stack: Params,
        /,
        *args: Any,
        in_dims: InDims = None,
        inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """Which engine ``apply_many`` uses for these inputs, why not the others, and the cost of each.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.explain(delta.init(0, n=5), torch.randn(3, 4)).engine
        'fold'
        """
        stack, whole = self._given_many(stack, args, kwargs, in_dims, inputs)
        return explain(self.program, expand_stack(self.plan.shared, stack), whole)

    def apply_rows(
        self,
        stack: Params,
        index: Index,
        /,
        *args: Any,
        inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The output whose row i is computed with member ``index[i]``, or the bare backbone for -1; leaves (b, …).

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.apply_rows(delta.init(0, n=5), [4, -1, 0], torch.zeros(3, 4)).shape
        torch.Size([3, 8])
        """
        n, casts = self._stack(stack)
        if isinstance(stack, Resident):
            stack.check(index)
        args, kwargs = self._given(args, kwargs, inputs, transformed=True)
        if GIVEN in kwargs:
            kwargs = checked(self.plan, self.backbone, stack, kwargs)
        ready = self._ready(stack, casts)
        reached = None if torch.compiler.is_compiling() or self.program.is_verified(ready) else set[str]()
        expanded = expand_stack(self.plan.shared, ready)
        output = route_rows(self.program, stack, expanded, n, index, args, kwargs, reached)
        if reached is not None:
            tell_missed(self.program, ready, reached)
        return output

    # -- elsewhere -------------------------------------------------------------------------------------------------

    def bind(self, params: Params) -> nn.Module:
        """A module of the backbone's class that runs with copies of ``params``: for ``generate``, Trainer, pipelines.

        Only the delta's leaves require grad, and ``state_dict()`` has only those. ``fd.unbind(view)`` returns params.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> view = delta.bind(delta.init(0))
        >>> type(view).__name__, list(view.state_dict())
        ('Sequential', ['0.lora.lora_A', '0.lora.lora_B', '0.lora.scale'])
        """
        self.program.skeletons.check()
        return bind(self, self._member(params))

    def bind_rows(self, stack: Params, index: Index) -> nn.Module:
        """A module of the backbone's class whose row i runs with member ``index[i]``, -1 with the bare backbone.

        For ``generate``, which may make k rows of each (beams, sequences): in a batch of k times as many rows, row i
        runs with ``index[i // k]``. The view reads ``stack`` itself, not a copy: the next call sees what is written
        into it, or into a :class:`Resident`, and gradients reach its leaves if they require grad. ``view.route(index)``
        assigns other members to the rows; ``fd.unbind(view)`` copies the stack.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> stack, x = fd.tree.randn_like(delta.init(0, n=5), seed=0), torch.ones(3, 4)
        >>> view = delta.bind_rows(stack, [4, -1, 0])
        >>> type(view).__name__, torch.equal(view(x), delta.apply_rows(stack, [4, -1, 0], x))
        ('Sequential', True)
        """
        _, casts = self._stack(stack)
        self.program.skeletons.check()
        return bind_rows(self, stack if isinstance(stack, Resident) else self._ready(stack, casts), index)

    def merge(self, params: Params, untie: bool = False) -> dict[str, Tensor]:
        """A new state dict with the delta written into the weights; do not load it into a backbone and still ``apply``.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> list(delta.merge(delta.init(0)))
        ['0.weight', '0.bias']
        """
        return merge(self, expand_member(self.plan.shared, self._member(params)), untie)

    def merged(self, params: Params, untie: bool = False) -> nn.Module:
        """A new module of the backbone's class with the merged weights in its own storage.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> params, x = fd.tree.map(torch.ones_like, delta.init(0)), torch.ones(3, 4)
        >>> torch.allclose(delta.merged(params)(x), delta.apply(params, x))
        True
        """
        return merged(self, expand_member(self.plan.shared, self._member(params)), untie)

    def bake(self, params: Params) -> tuple[DeltaModel, dict[str, Tensor]]:
        """``(delta, params)`` with the same outputs but no shared leaves: each site has the leaves they expand to.

        Takes one member or a stack. A reparameterised prefix becomes plain prefixes, which are far smaller.

        Raises ``ConfigError`` if no method of this delta expands shared leaves.

        >>> from transformers import GPT2Config, GPT2Model
        >>> delta = fd.PrefixModel(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2)))
        >>> baked, params = delta.bake(delta.init(0))
        >>> list(params)
        ['h.0.attn.prefix.past_key', 'h.0.attn.prefix.past_value']
        """
        is_stack = self._checks.is_stack(params)
        params = self._ready(params)
        expanding = {group.name for group in self.plan.shared if group.expanded}
        named = zip(self.configs, self.plan.names, strict=True)
        configs = [config.baked() if not expanding or name in expanding else config for config, name in named]
        baked = DeltaModel(self.backbone, *configs, example=self.example, prepare=self.prepare)
        found = (expand_stack if is_stack else expand_member)(self.plan.shared, params)
        return baked if self.mode_flag is None else baked.mode(train=self.mode_flag), {
            name: found[name] for name in baked.names if name in found
        }

    def save_finetuned(
        self, params: Params | None = None, path: str | os.PathLike[str] | None = None, **options: Any
    ) -> Any:
        """Write ``config.json`` and ``delta.safetensors`` to the folder ``path``, atomically; one member or a stack.

        With ``push_to_hub`` (``True``, or a repository's name) they are then uploaded; ``private``, ``token`` and
        ``commit_message`` apply to that. ``hash_backbone=False`` leaves out the backbone's fingerprint.

        >>> import tempfile
        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> stack = delta.init(0, n=5)
        >>> folder = delta.save_finetuned(stack, tempfile.mkdtemp() + "/run")
        >>> _, loaded = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=delta.backbone)
        >>> all(torch.equal(loaded[name], stack[name]) for name in delta.names)
        True
        """
        options = without_dead_options("save_finetuned", options)
        if not isinstance(path, str | os.PathLike) or not isinstance(params, Mapping):
            raise ParamsError(
                f"A delta holds no params, so save_finetuned needs both: write delta.save_finetuned(params, path); "
                f"found {type(params).__name__} and {type(path).__name__}."
            )
        return save(self._facts(), params, path, **options)

    def log(
        self,
        params: Params | None = None,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> DeltaStatistics:
        """Print the folded tree of the backbone with ``params`` in it, ratios and memory; returns the figures.

        ``params`` is one member, a stack, ``{}`` (the bare backbone), or ``None`` for the shapes of fresh params.
        Setting a flag to ``False`` leaves out that part of the printout.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
        >>> stats = delta.log(delta.init(0), delta_ratio=False, cuda_memory=False)
        Sequential
        └── 0 (Linear) weight:[8, 4] bias:[8]
            └── lora (LoraConfig) lora_A*:[2, 4] lora_B*:[8, 2] scale:[]
        * trained, of the delta   frozen   constant of the delta
        Trainable ratio: 24/64 = 37.5000 %
        >>> stats.delta_parameters, stats.constant_parameters
        (24, 1)
        """
        from .apps.inspect import log

        return log(self.program, params, delta_ratio, trainable_ratio, visualization, cuda_memory)

    def push_to_hub(self, params: Params | None = None, repo_id: str | None = None, **options: Any) -> str:
        """Upload what :meth:`save_finetuned` writes to the hub repository ``"user/name"``; returns its full name.

        ``options`` may have ``private``, ``token``, ``commit_message`` and ``hash_backbone``. Needs the package
        ``huggingface_hub``, and a login or a token.

        >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
        >>> delta.push_to_hub(delta.init(0), "not/a/name")
        Traceback (most recent call last):
        ...
        funcdelta.errors.CheckpointError: 'not/a/name' is not the name of a hub repository: write "user/name".
        """
        options = without_dead_options("push_to_hub", options)
        if repo_id is None or not isinstance(params, Mapping):
            raise ParamsError('A delta holds no params, so pass them: write delta.push_to_hub(params, "user/name").')
        return push(self._facts(), params, repo_id, **options)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        configs = [storable(type(config).__name__, config.to_dict()) for config in self.configs]
        return Facts(configs, self.backbone, self._shapes, self.plan.fixed)

    def _member(self, params: Params) -> dict[str, Tensor]:
        if self._generation != self.program.skeletons.generation:
            self._follow_refresh()
        key = _structure("member", params)
        found = self._passed(key) or self._checks.member(params, key)
        return self._ready(params, found[1])

    def _passed(self, key: Hashable | None) -> tuple[int, Mapping[str, torch.dtype]] | None:
        """What earlier checks found for params of that structure; ``None`` if there were none."""
        try:
            return self._checks.passed.get(key)
        except TypeError:  # unhashable: keys that are not strings, symbolic sizes
            return None

    def _stack(self, stack: Params) -> tuple[int, Mapping[str, torch.dtype]]:
        """The number of members of a stack, and the constants to convert with their dtypes."""
        if self._generation != self.program.skeletons.generation:
            self._follow_refresh()
        key = _structure("stack", stack)
        return self._passed(key) or self._checks.stack(stack, key)

    def _ready(self, params: Params, casts: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
        """Params for a call: constants detached, and without the backbone's own tensors, which need no swap."""
        own = self._tensors
        ready = dict(params)
        if torch.compiler.is_compiling() or not own.keys().isdisjoint(ready):
            ready = {name: leaf for name, leaf in ready.items() if leaf is not own.get(name)}
        # Detach only where a derivative could ask: an alias of every constant would cost more than all the rest here.
        every = torch.compiler.is_compiling() or current_transform() is not None or forward_ad._current_level >= 0
        for name in self.constants:
            leaf = ready.get(name)
            if leaf is not None and (every or leaf.requires_grad):
                ready[name] = leaf.detach()
        return ready | {name: ready[name].to(dtype) for name, dtype in casts.items()} if casts else ready

    def _given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Mapping[str, Any] | None, transformed: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs is not None:
            if isinstance(inputs, Mapping) and not all(isinstance(name, str) for name in inputs):
                raise ParamsError(f"inputs= takes a dict with names as keys; found the keys {[*inputs][:3]}.")
            kwargs = {**inputs, **kwargs} if isinstance(inputs, Mapping) else {**kwargs, "inputs": inputs}
        # A cache in the output can be neither mapped nor split by member.
        return args, without_cache(self.backbone, kwargs) if transformed else kwargs


def _structure(what: str, params: Any) -> Hashable | None:
    """A key of all facts that the checks of ``params`` depend on, read in C for speed; ``None`` if there is none."""
    if torch.compiler.is_compiling() or not isinstance(params, Mapping):
        return None
    try:
        return what, tuple(params), tuple(map(FACTS, params.values()))
    except (AttributeError, TypeError, RuntimeError):  # leaves that are not tensors, or nested tensors
        return None


def _rebuilt(backbone: nn.Module, configs: Any, example: Any, prepare: Any, mode: bool | None) -> DeltaModel:
    delta = DeltaModel(backbone, *configs, example=example, prepare=prepare)
    return delta if mode is None else delta.mode(train=mode)


def _seed(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ParamsError(f"A seed must be a whole number; found {value!r}.") from None


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
