"""The probe: learns where the rows of an input structure are, and checks a fold before it is trusted.

It takes two members, moved away from their initial values, and a few of the rows at hand:

1. Each member runs alone. This shows which modules are called and which tensors are read outside of their module, and
   hence which modules have to run once per member because a tensor in them differs by member.
2. Both run folded, and every operation is watched for what it does to the rows (:mod:`.tracking`). If one mixes rows,
   the innermost module around it whose inputs are not mixed runs once per member instead: its inputs are split by
   member, so that each gets what it gets alone, by construction. If only the model itself would do, fold is refused.
3. The outputs of both members have to equal those of step 1.

If no module's tensors differ by member, step 2 comes first. If then nothing is read outside of its module and nothing
has to run once per member, step 1 could add nothing; otherwise the probe starts again with step 1. Step 3 is left to
callers that compare outputs themselves, with all rows and the first and last member (:mod:`.first_time`).

Why this is enough. The axis of every hidden value is followed from the inputs on, by operations and not by sizes, so
axes that happen to have equal sizes are not confused. An operation that combines rows of several members is recognised
by what it is, whether or not that shows in these values; so is Python that branches on values. Anything that the
watched run cannot see, such as another structure of inputs or another branch on a number, has another key
(:func:`.inputs.input_key`) and is probed anew; and each later call checks every size before it splits. Step 3 is
independent evidence for the same claim: anything that passes rows on in either direction would change the first or the
last member's outputs.

Dropout is off while a probe runs, and random numbers come from a private generator.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EngineError, FoldError, FuncdeltaError
from ..match import within
from ..plan.sharing import expand_stack
from ..structures.rowwise import is_rowwise
from ..transforms import eager, outside_transforms
from ..trees.opaque import PLAIN, spare, tensors_in
from .backward import check_backward, grown, roots, written_in_python
from .call import TENSOR, Call, Params
from .containers import is_cache
from .fold import Folded
from .layout import Ends, Hidden, Layout, MixedBackwardError, Run, close, scalar_message
from .outputs import flatten
from .outputs import names as names_of
from .program import Program
from .skeleton import Skeleton
from .tracking import DRAWN, MIXED, Readings, Rows, Tracking
from .undisturbed import beside, undisturbed
from .values import held
from .written import changed, marks

MEMBERS = 2

OTHER_ENGINES = 'Use engine="auto", which takes the next one that can, or "loop".'

UNCLEAR = (MIXED, DRAWN)
"""Tags of tensors whose rows cannot be assigned to members."""


@dataclass(frozen=True)
class Facts:
    """What a probe is told about its inputs.

    Attributes:
        axes: the axis of rows of every input leaf that has rows, by position.
        deciding: the positions of leaves without rows whose values Python may read.
        rows: how many rows each member has.
        rows_are_members: whether each row has its own member.
        backward: whether the call may be differentiated.
    """

    axes: Mapping[int, int]
    deciding: tuple[int, ...] = ()
    rows: int = 1
    rows_are_members: bool = False
    backward: bool = False


@eager
def learn(
    program: Program,
    members: Params,
    one: list[tuple[tuple[Any, ...], dict[str, Any]]],
    together: tuple[tuple[Any, ...], dict[str, Any]],
    facts: Facts,
    entry: str,
    read: set[int],
    compare: bool,
) -> Layout:
    """The layout of a call of two members.

    Args:
        one, together: the inputs of each member alone, and of both folded.
        entry: the path of the module that is called.
        read: receives the positions of inputs without rows whose values Python reads: with other values the layout may
            be another, or none.
        compare: whether to compare outputs. A caller that does so itself, with all rows at hand, saves two runs if
            nothing runs once per member.

    Raises :class:`FoldError` with the place and the reason if the members cannot share a batch.
    """
    skeleton = program.skeletons.get(program.training)
    with undisturbed():
        members = expand_stack(program.plan.shared, members)
    clean, skeleton.clean = skeleton.clean, False  # if the probe is interrupted, the skeleton is not used again

    def probed(one: Any, together: Any, alone_first: bool) -> Layout:
        probe = Probe(program.plan, skeleton, members, entry, facts, read)
        try:
            return probe.learn(one, together, alone_first)
        finally:
            program.writes_inputs = program.writes_inputs or probe.writes
            probe.tracking.storages.clear()  # the probe is part of a reference cycle: do not wait for the collector

    try:
        if not (compare or program.plan.owners(members)):
            try:
                return probed(spare(one), spare(together), alone_first=False)
            except (AloneFirst, Exception):  # with step 1 first it may succeed, or fail with a better message
                skeleton.settle()
        return probed(one, together, alone_first=True)
    except FoldError as error:
        # No advice for routed rows, which simply run one after the other instead.
        advice = "" if entry or facts.rows_are_members or "engine=" in str(error) else f" {OTHER_ENGINES}"
        kind = MixedBackwardError if isinstance(error, MixedBackwardError) else FoldError
        stop = "" if str(error).rstrip().endswith(".") or not advice else "."
        raise kind(f"{error}{stop}{advice}{_why_rows_mix(skeleton.module, program.batch_dim)}") from error
    finally:
        skeleton.settle()
        skeleton.clean = clean


class AloneFirst(BaseException):
    """The probe needs step 1 before step 2. A ``BaseException``, so that no model's ``except Exception`` catches it."""


class Visit:
    """One call of a module in a probe.

    Attributes:
        rowwise: whether its class is known to keep rows apart.
        reason: why it cannot run on several members at once.
        mixing: the first operation in it that mixed rows.
    """

    __slots__ = ("mixing", "path", "reason", "rowwise")

    def __init__(self, path: str, rowwise: bool) -> None:
        self.path, self.rowwise = path, rowwise
        self.reason = self.mixing = ""


class Probe:
    """One run of the three steps, for two members; the skeleton calls the methods from ``called`` on (a ``Watch``)."""

    def __init__(
        self, plan: Any, skeleton: Skeleton, members: Params, entry: str, facts: Facts, read: set[int]
    ) -> None:
        self.plan, self.skeleton, self.members, self.entry = plan, skeleton, members, entry
        self.facts, self.rows, self.rows_are_members = facts, facts.rows, facts.rows_are_members
        self.lift = Folded(MEMBERS, self.rows)
        self.tracking = Tracking(MEMBERS, self._on_read, self._on_mix, self.rows, read.update)
        self.readings = Readings(self.tracking)
        self.thread = threading.get_ident()
        self.elsewhere: str | None = None
        self.roots: dict[str, Tensor] = {}
        self.acting = members
        self.stack: list[Visit] = []
        self.visited: set[str] = set()
        self.idle: set[str] = set()
        self.reads: dict[str, str] = {}
        self.sites: dict[str, list[Hidden]] = {}
        self.noted: list[str] = []
        self.runs: dict[str, Run] = {}
        self.folding = self.writes = self.knows_alone = self.ended = False

    # -- the three steps -------------------------------------------------------------------------------------------

    def learn(self, one: Any, together: Any, alone_first: bool) -> Layout:
        """The layout, see :func:`learn`; without ``alone_first`` by step 2 only."""
        once_more = [spare(own) for own in one] if self.facts.backward else []
        alone: list[Any] = []
        if alone_first:
            again = spare(one[0]) if self.plan.owners(self.members) else None
            with self._watched_modules():
                alone = [self._alone(i, one[i]) for i in range(MEMBERS)]
            _refuse_scalars(alone[0])
            self.knows_alone = True
            self.runs = self.owners(lambda keys: self._is_used(keys, again, alone[0]))
        for path in self.runs:
            self.skeleton.open(path)
        with self._watched_modules():
            names, found, dims = self._folded(*together)
        self._check_threads()
        if self.ended:
            raise AloneFirst
        runs = {path: run for path, run in self.runs.items() if run.visits or not self._is_inside_loop(path)}
        layout = Layout(
            {path: tuple(visits) for path, visits in self.sites.items() if visits},
            runs,
            dims,
            names,
            # Owners inside a module that runs once per member act there; called in the batch, they could not.
            frozenset(path for path in (*self.idle, *self.plan.owners(self.members)) if path not in runs),
            self.tracking.drew or self.readings.count > 0,
            alone_first,
        )
        self._compare(alone, found, layout)
        if self.facts.backward:
            self._compare_backward(found, once_more, dims)
        return layout

    def _compare_backward(self, found: list[Any], once_more: list[Any], dims: tuple[int | None, ...]) -> None:
        """Compare the gradients in one batch with those of each member, if Python takes part in the backward pass."""
        own = written_in_python(found)
        if not own and not self.tracking.hooked:
            return

        def alone(member: int, leaves: Mapping[str, Tensor]) -> list[Any]:
            params = grown({name: leaf[member] for name, leaf in self.members.items()}, leaves)
            return flatten(self._alone(member, once_more[member], params))[0]

        what = f"the autograd.Function {own}" if own else "a hook on a tensor"
        with outside_transforms():
            check_backward((found, self.roots), alone, dims, MEMBERS, what)

    def _alone(self, member: int, given: tuple[tuple[Any, ...], dict[str, Any]], params: Params | None = None) -> Any:
        params = params or {name: leaf[member] for name, leaf in self.members.items()}
        call = Call(params, watch=self)
        if self.skeleton.units and self.skeleton.plan is not None:
            call.runs = {path: Run(keys) for path, keys in self.plan.outermost(params).items()}
        tensors = [leaf for leaf in flatten(given)[0] if isinstance(leaf, Tensor)]
        before = marks(tensors)
        try:
            with undisturbed():
                return self.skeleton.run(self.entry, params, *given, call)
        except FuncdeltaError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise FoldError(f"The model fails on {self.rows} of the rows of these inputs: {error}.") from error
        finally:
            self.skeleton.settle()
            self.writes = self.writes or bool(changed(tensors, before))

    def _folded(self, args: Any, kwargs: Any) -> tuple[tuple[str, ...], list[Any], tuple[int | None, ...]]:
        """The leaves of the folded output, with their names, and the axis of rows of each."""
        self.folding = True
        try:
            with beside():
                args, kwargs, members = self._marked(args, kwargs)
                tensors = [leaf for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
                before = marks(tensors)
                call = Call(members, lift=self.lift, runs=self.runs, watch=self)
                with self.tracking, self.readings:
                    output = self.skeleton.run(self.entry, {}, args, kwargs, call)
                self.writes = self.writes or bool(changed(tensors, before))
        except FuncdeltaError:
            raise
        except Exception as error:
            raise FoldError(f"Two members in one batch fail: {error}") from error
        finally:
            self.folding = False
        _refuse_scalars(output)
        found, names = flatten(output)[0], names_of(output)
        dims: list[int | None] = []
        for name, leaf in zip(names, found, strict=True):
            tag = self.tracking.of(leaf) if isinstance(leaf, Tensor) else None
            if tag in UNCLEAR or (tag is not None and tag.outer != 1):
                reason = self.reason()
                raise FoldError(f"The output {name} mixes rows of several members{reason}.")
            dims.append(None if tag is None else tag.axis)
        return tuple(names), found, tuple(dims)

    def _marked(self, args: Any, kwargs: Any) -> tuple[Any, Any, Params]:
        """Private copies of the inputs and members, marked with where their rows are: a call may change them."""
        leaves, tree = flatten((args, kwargs))
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, axis in self.facts.axes.items():
            if isinstance(leaves[i], Tensor):
                self.tracking.mark(leaves[i], Rows(axis))
        for i in self.facts.deciding:
            for tensor in held(leaves[i]):
                self.tracking.mark_input(tensor, frozenset({i}))
        for tensor in (tensor for leaf in leaves if is_cache(leaf) for tensor in tensors_in(leaf)):
            if tensor.ndim and tensor.shape[0] == MEMBERS * self.rows:
                self.tracking.mark(tensor, Rows(0))
        if self.facts.backward:
            self.roots = roots(self.members, self.plan.constants)
        members = self.acting = {name: leaf.clone() for name, leaf in grown(self.members, self.roots).items()}
        for leaf in members.values():
            self.tracking.mark(leaf, Rows(0))
        args, kwargs = tree(leaves)
        return args, kwargs, members

    def _compare(self, alone: list[Any], found: list[Any], layout: Layout) -> None:
        for i, output in enumerate(alone):
            leaves, _ = flatten(output)
            if len(leaves) != len(found):
                raise FoldError("The output has another structure for two members than for one.")
            for name, leaf, expected, dim in zip(layout.names, found, leaves, layout.outputs, strict=True):
                if isinstance(leaf, Tensor) and isinstance(expected, Tensor):
                    own = leaf if dim is None else leaf.unflatten(dim, (MEMBERS, -1)).select(dim, i)
                    if not close(own, expected) and self.unused:
                        raise FoldError(_used_by_the_model(self.unused))
                    if not close(own, expected):
                        raise FoldError(
                            f"Two members in one batch do not get what each gets alone (output {name}): rows are "
                            f"mixed, or random numbers drawn, in a way that cannot be followed."
                        )
                elif self.rows_are_members and is_cache(leaf):
                    self._compare_caches(name, leaf, expected, i)
                elif not isinstance(leaf, Tensor) and unequal(leaf, expected):
                    raise FoldError(f"The output {name} is {leaf!r} for two members but {expected!r} for one.")

    def _compare_caches(self, name: str, cache: Any, expected: Any, member: int) -> None:
        """Compare a cache, which is returned unsplit where rows are members: each row has to be what it is alone."""
        for tensor, own in zip(tensors_in(cache), tensors_in(expected), strict=False):
            tag = self.tracking.of(tensor)
            if tag is None and tensor.shape == own.shape:
                continue
            if tag is None or tag in UNCLEAR or not close(self.tracking.part(tensor, tag, member), own):
                raise FoldError(f"The output {name} mixes rows of several members{self.reason()}.")

    def _is_used(self, keys: Sequence[str], given: Any, expected: Any) -> bool:
        """Whether the output depends on these leaves, whose module is not called: NaN in them would spread."""
        params = {name: leaf[0] for name, leaf in self.members.items()}
        poison = {key: torch.full_like(params[key], torch.nan) for key in keys if params[key].is_floating_point()}
        args, kwargs = spare(given)
        try:
            with undisturbed():
                found = self.skeleton.run(self.entry, {**params, **poison}, args, kwargs, Call({**params, **poison}))
        except Exception:  # it fails because it uses them
            return True
        finally:
            self.skeleton.settle()
        pairs = zip(flatten(found)[0], flatten(expected)[0], strict=True)
        return any(isinstance(a, Tensor) and not close(a, b) for a, b in pairs)

    def owners(self, is_used: Callable[[Sequence[str]], bool] = lambda keys: True) -> dict[str, Run]:
        """Modules that run once per member because a tensor that is used in them differs by member.

        ``is_used(keys)`` decides for leaves of modules that are not called: another module may read them, or none.
        """
        needed: dict[str, list[str]] = {}
        for owner, keys in self.plan.owners(self.members).items():
            if owner not in self.visited:
                # A tied tensor may be used under another of its names. If it is used here as well, step 3 fails.
                ends = {key: [end.rpartition(".")[0] for end in self.plan.trained.get(key, ())] for key in keys}
                keys = [key for key in keys if not any(end in self.visited for end in ends[key])]
            path = owner
            while path and path not in self.visited:
                path = path.rpartition(".")[0]
            if keys and owner not in self.visited and not is_used(keys):
                self.idle.add(owner)
                continue
            if keys and owner and not path:
                # Not used in this call, or else by the model itself; then step 3 fails.
                self.unused = keys[0]
            elif keys:
                needed.setdefault(path, []).extend(keys)
        for site, reader in self.reads.items():
            keys = [key for a in self.plan.attachments[site] if a.among(self.members) for key in a.leaves.values()]
            needed.setdefault(reader, []).extend(keys)
        if self.entry:
            # A part of the model that is called by itself uses nothing outside of it.
            needed = {path: keys for path, keys in needed.items() if within(path, self.entry) and path}
        elif "" in needed:
            raise FoldError(_used_by_the_model(needed[""][0]))
        outermost = [path for path in needed if not any(path != other and within(path, other) for other in needed)]
        found: dict[str, Run] = {}
        for path in outermost:
            keys = [key for other, own in needed.items() if within(other, path) for key in own]
            inside = [a for a in self.plan.all() if a.among(self.members) and self._acts_inside(a, path)]
            found[path] = Run(tuple(dict.fromkeys([*keys, *(key for a in inside for key in a.leaves.values())])))
        return found

    def _is_inside_loop(self, path: str) -> bool:
        """Whether a module above ``path`` runs in a loop, so that no run of this one was noted."""
        return any(run.how == "loop" and other != path and within(path, other) for other, run in self.runs.items())

    def _acts_inside(self, attachment: Any, path: str, itself: bool = False) -> bool:
        """Whether a delta acts inside the module at ``path``; at the module itself hidden values change outside it."""
        inside = [within(end, path) and (itself or end != path) for end in attachment.ends]
        if any(inside) and not all(inside):
            raise FoldError(
                f"{path} runs once per member, but the span from {attachment.site.path} to {attachment.site.exit} has "
                f"only one end in it."
            )
        return all(inside) or (attachment.in_attention and attachment.site.path == path)

    def reason(self) -> str:
        """The first reason why rows were mixed, for a message."""
        return f" ({self.why})" if self.why else ""

    why = unused = ""

    # -- modules ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _watched_modules(self) -> Iterator[None]:
        """A block in which every module's forward is watched."""
        memory = self.skeleton.memory
        kinds: dict[type, bool] = {}
        changed: list[tuple[nn.Module, Any]] = []
        for path, module in self.skeleton.module.named_modules():
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = is_rowwise(kind)
            changed.append((module, memory.give(module, self._watching(path, module.forward, kinds[kind]))))
        try:
            yield
        finally:
            for module, own in changed:
                memory.give(module, own)

    def _watching(self, path: str, forward: Callable[..., Any], rowwise: bool) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                self.elsewhere = path
                self._check_threads()
            self.visited.add(path)
            call = self.skeleton.call
            if not self.folding or self.tracking.paused or call is None or call.lift is None:
                self.stack.append(Visit(path, rowwise))
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.stack.pop()
            return self._visit(path, forward, rowwise, call, args, kwargs)

        return watched

    def _visit(self, path: str, forward: Callable[..., Any], rowwise: bool, call: Call, args: Any, kwargs: Any) -> Any:
        """One call of a module in the folded run: as it is or, if it mixes rows, once per member."""
        visit = Visit(path, rowwise)
        known = self.runs.get(path)
        if known is not None and known.how == "loop":
            return self._each(path, forward, args, kwargs, None, known.why)
        trusted = (
            rowwise
            and self._is_clean(args, kwargs)
            and not any(a.among(self.members) and any(within(end, path) for end in a.ends) for a in self.plan.all())
        )
        error: Exception | None = None
        output: Any = None
        self.stack.append(visit)
        noted, runs = len(self.noted), dict(self.runs)
        try:
            if trusted and not any(within(run, path) for run in self.runs):
                with self.tracking.pause():
                    output = forward(*args, **kwargs)
                self._mark_trusted(output, args, kwargs)
                return output
            output = forward(*args, **kwargs)
        except FuncdeltaError as failure:
            if not isinstance(failure, EngineError):
                raise  # a mistake in a method or in the caller's inputs
            error, visit.reason = failure, visit.reason or str(failure)
        except Exception as failure:
            error = failure
            visit.reason = visit.reason or str(failure)
        finally:
            self.stack.pop()
        mixed = error is None and self._mixed(output)
        if error is None and not visit.reason:
            if not mixed:
                return output
            visit.reason = f"{path or 'the model'} returns values that mix rows of several members"
        if visit.mixing:
            visit.reason = f"{path or 'the model'} mixes rows of several members ({visit.mixing})"
        self.why = self.why or visit.reason
        if path != self.entry and self._is_clean(args, kwargs):
            # Undo what the failed attempt noted, and try this module once per member.
            for site in self.noted[noted:]:
                self.sites[site].pop()
            del self.noted[noted:]
            self.runs.clear()
            self.runs.update(runs)
            try:
                return self._each(path, forward, args, kwargs, output, visit.reason)
            except Exception as failure:  # the next module around it may be able to
                error = error or failure
        if self.stack and not self.stack[-1].reason:
            self.stack[-1].reason = visit.reason
        if error is not None:
            raise error
        if path == self.entry and not mixed:
            raise FoldError(f"{self.why[:1].upper()}{self.why[1:]}.")
        return output

    def _constant_rows(self, value: Tensor) -> Rows | None:
        """Rows on the first axis of an unmarked tensor that has one entry per row, all of them equal."""
        total = MEMBERS * self.rows
        if total == 1 or not value.ndim or value.shape[0] != total or value.layout != torch.strided:
            return None
        with self.tracking.pause():
            return Rows(0) if self.tracking.uniform(value, Rows(0)) else None

    def _is_clean(self, args: Any, kwargs: Any) -> bool:
        tags = [self.tracking.of(t) for t in _tensors_of(*args, *kwargs.values())]
        return all(tag is None or (tag not in UNCLEAR and tag.outer == 1) for tag in tags)

    def _mixed(self, output: Any) -> bool:
        return any(self.tracking.of(t) in UNCLEAR for t in _tensors_of(output))

    def _mark_trusted(self, output: Any, args: Any, kwargs: Any) -> None:
        """Mark the outputs of a module that is known to keep rows apart: rows are on the first axis if it fits."""
        total = MEMBERS * self.rows
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                has = leaf.ndim > 0 and leaf.shape[0] % total == 0
                self.tracking.mark(leaf, Rows(0) if has else MIXED)

    def _each(self, path: str, forward: Any, args: Any, kwargs: Any, whole: Any, why: str) -> Any:
        """The output of a module that runs once per member on that member's rows; noted as a run of the layout."""
        if not self.knows_alone:
            self._begin_again()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tags = [self.tracking.of(t) or self._constant_rows(t) if isinstance(t, Tensor) else None for t in leaves]
        inside = [a for a in self.plan.all() if a.among(self.members) and self._acts_inside(a, path, itself=True)]
        trained = [name for name in self.plan.trained if name in self.members]
        used = [name for name in trained if any(within(end, path) for end in self.plan.trained[name])]
        known = self.runs.get(path)
        keys = dict.fromkeys(
            [*used, *(key for a in inside for key in a.leaves.values()), *(known.keys if known else ())]
        )
        outputs: list[Any] = []
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        before = marks(given)
        with self.tracking.pause(alone=True):
            for i in range(MEMBERS):
                own = [
                    self.tracking.part(leaf, tag, i) if tag else leaf for leaf, tag in zip(leaves, tags, strict=True)
                ]
                p = {key: self.acting[key][i] for key in keys}
                own_args, own_kwargs = pytree.tree_unflatten(own, spec)
                outputs.append(self.skeleton.run_inside(path, forward, p, own_args, own_kwargs, Call(p)))
        with self.tracking.pause():
            joined, dims = self._joined(path, outputs, whole, leaves, tags)
        tensors = [tag for leaf, tag in zip(leaves, tags, strict=True) if isinstance(leaf, Tensor)]
        axes = tuple(None if tag is None else tag.axis for tag in tensors)
        ends = Ends(axes, dims, writes=changed(given, before))
        visits = known.visits if known is not None and known.how == "loop" else ()
        self.runs[path] = Run(tuple(keys), "loop", why, (*visits, ends))
        return joined

    def _joined(
        self, path: str, outputs: list[Any], whole: Any, leaves: list[Any], tags: list[Any]
    ) -> tuple[Any, tuple[int | None, ...]]:
        """The members' outputs joined to one batch, and the axis of rows of each tensor."""
        flat = [pytree.tree_leaves(output) for output in outputs]
        spec = pytree.tree_structure(outputs[0])
        wholes = pytree.tree_leaves(whole) if whole is not None else []
        entered = [(tag.axis, leaf.shape[tag.axis] // MEMBERS) for leaf, tag in zip(leaves, tags, strict=True) if tag]
        joined: list[Any] = []
        dims: list[int | None] = []
        for place, parts in enumerate(zip(*flat, strict=True)):
            first = parts[0]
            if not isinstance(first, Tensor):
                if any(unequal(first, other) for other in parts[1:]):
                    raise FoldError(f"{path} returns {first!r} for one member and {parts[1]!r} for another.")
                joined.append(first)
                continue
            if any(part.shape != first.shape for part in parts):
                raise FoldError(f"The output of {path} has another size for one member than for another.")
            like = wholes[place] if len(wholes) == len(flat[0]) else None
            dim = _axis_of_rows(first, like, entered)
            if dim is None:
                if not all(close(first, part) for part in parts[1:]):
                    raise FoldError(f"The output of {path} differs by member, but has no axis that counts rows.")
                joined.append(first)
            else:
                joined.append(torch.cat(parts, dim))
                self.tracking.mark(joined[-1], Rows(dim))
            dims.append(dim)
        return pytree.tree_unflatten(joined, spec), tuple(dims)

    def _begin_again(self) -> None:
        """End a run that needs step 1 first; ``ended`` says so even if the model catches every exception."""
        self.ended = True
        raise AloneFirst

    def _check_threads(self) -> None:
        """Raise if a module ran in another thread, where operations are not followed."""
        if self.elsewhere is not None:
            raise FoldError(
                f"{self.elsewhere} runs in another thread than the call, where its operations cannot be followed."
            )

    # -- what the skeleton calls -----------------------------------------------------------------------------------

    def _on_read(self, what: str) -> None:
        visit = self.stack[-1] if self.stack else None
        if visit is not None and not visit.rowwise and not visit.reason:
            visit.reason = f"{visit.path or 'the model'} reads values of all rows in Python ({what})"

    def _on_mix(self, what: str) -> None:
        if self.stack:
            self.stack[-1].mixing = self.stack[-1].mixing or what

    def called(self, path: str) -> None:
        """Nothing: the watched forwards note calls already."""

    def paused(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which nothing is noted: what is computed there is no part of the model."""
        return self.tracking.pause()

    def axis(self, site: str, value: Tensor) -> int | None:
        """The axis of a hidden value that counts rows; also for a constant with one entry per row."""
        tag = self.tracking.of(value) or self._constant_rows(value)
        if tag in UNCLEAR or (tag is not None and tag.outer != 1):
            raise FoldError(f"{site or 'the model'} is given or returns values that mix rows of several members")
        return None if tag is None else tag.axis

    def lifted(self, run: Callable[[], tuple[Tensor, int | None]]) -> tuple[Tensor, int | None]:
        """The output of a method for all members, not followed: it is mapped, so each row is its own member's."""
        with self.tracking.pause():
            out, dim = run()
        self.tracking.mark(out, None if dim is None else Rows(dim))
        return out, dim

    def site(self, site: str, x: int | None, y: int | None) -> None:
        """Note one call of a site."""
        self.sites.setdefault(site, []).append(Hidden(x, y))
        self.noted.append(site)

    def read(self, site: str) -> None:
        """Note which module reads a tensor of a site outside of the site's forward: the innermost one running."""
        if not self.knows_alone and self.folding:
            self._begin_again()
        if not self.folding:
            reader = self.stack[-1].path if self.stack else ""
            if site in self.reads:
                # Read in two places: the module around both has to run once per member.
                while not within(self.reads[site], reader) and reader:
                    reader = reader.rpartition(".")[0]
            self.reads[site] = reader

    def run(self, path: str, call: Call, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module with tensors that differ by member, once per member: under vmap if torch can, else in a loop."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        dims = tuple(self.axis(path, tensor) for tensor in tensors)
        run = self.runs[path]
        shape_of_output: list[Any] = []
        found: list[Tensor] = []

        def inside(p: Params, tensors: Sequence[Tensor], call: Call) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(filled, spec)
            return self.skeleton.run_inside(path, forward, p, own_args, own_kwargs, call)

        def member(p: Params, *tensors: Tensor) -> list[Tensor]:
            output = inside(p, tensors, Call(p, watch=_Called(self)))
            out_leaves, out_spec = pytree.tree_flatten(output)
            shape_of_output[:] = [out_spec, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]]
            return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

        params = {key: call.params[key] for key in run.keys}
        with self.tracking.pause(alone=True):
            bare = inside({}, [tensor.clone() for tensor in tensors], Call({}))
            plain = [t for t in pytree.tree_leaves(bare) if isinstance(t, Tensor)]
            own = [tensor.clone() for tensor in tensors]
            before = marks(own)
            split = [t if dim is None else t.unflatten(dim, (MEMBERS, -1)) for t, dim in zip(own, dims, strict=True)]
            try:
                found = self.lift._mapped(member, params, split, dims)
                out_dims = tuple(_where_grown(out[0], whole, path) for out, whole in zip(found, plain, strict=True))
            except Exception as failure:
                said = str(failure).splitlines()[0][:80]
                why = said if isinstance(failure, FoldError) else f"torch.vmap cannot map it ({said})"
                opened = self.skeleton.opened[path]
                return self._each(path, opened.module.forward, args, kwargs, bare, why)
            written = changed(own, before)
            for at in written:
                tensors[at].copy_(own[at])
            joined = []
            for out, dim in zip(found, out_dims, strict=True):
                moved = out if dim is None else out.movedim(0, dim)
                joined.append(self.lift._join(moved, dim, path))
        for out, dim in joined:
            self.tracking.mark(out, None if dim is None else Rows(dim))
        ends = Ends(dims, out_dims, tuple(t.dtype for t in plain), written)
        joined = [(out.to(dtype), dim) for (out, dim), dtype in zip(joined, ends.dtypes, strict=True)]
        self.runs[path] = Run(run.keys, "map", run.why or "its tensors differ by member", (*run.visits, ends))
        results = iter([out for out, _ in joined])
        out_spec, others = shape_of_output
        return pytree.tree_unflatten([next(results) if other is TENSOR else other for other in others], out_spec)


class _Called:
    """The watch inside a module that runs once per member: it notes only which modules are called."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def called(self, path: str) -> None:
        self.probe.visited.add(path)

    def paused(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def axis(self, site: str, value: Tensor) -> int | None:
        return None

    def lifted(self, run: Callable[[], tuple[Tensor, int | None]]) -> tuple[Tensor, int | None]:
        return run()

    def site(self, site: str, x: int | None, y: int | None) -> None:
        pass

    def read(self, site: str) -> None:
        pass

    def run(self, path: str, call: Call, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)


def _used_by_the_model(key: str) -> str:
    return (
        f"{key} differs by member, and the model itself uses it, outside of any module that could run once per member."
    )


def _tensors_of(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, PLAIN):
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _refuse_scalars(output: Any) -> None:
    for name, leaf in zip(names_of(output), flatten(output)[0], strict=True):
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            raise FoldError(scalar_message(name))


def _where_grown(part: Tensor, whole: Tensor, path: str) -> int | None:
    """The axis along which ``whole`` has more blocks than ``part``; ``None`` if both have one shape."""
    if part.shape == whole.shape:
        return None
    axis = _grown(part, whole)
    if axis is None:
        raise FoldError(
            f"{path} returns a tensor {tuple(part.shape)} for one member and {tuple(whole.shape)} for {MEMBERS}"
        )
    return axis


def _grown(part: Tensor, whole: Tensor) -> int | None:
    """The one axis along which ``whole`` is as many times longer as there are members; ``None`` if there is none."""
    if part.ndim != whole.ndim:
        return None
    grown = [axis for axis in range(whole.ndim) if whole.shape[axis] != part.shape[axis]]
    fits = len(grown) == 1 and whole.shape[grown[0]] == MEMBERS * part.shape[grown[0]]
    return grown[0] if fits else None


def _axis_of_rows(part: Tensor, whole: Any, entered: list[tuple[int, int]]) -> int | None:
    if isinstance(whole, Tensor):
        grown = _grown(part, whole)
        if grown is not None or part.shape == whole.shape:
            return grown
    for axis, size in entered:
        if part.ndim > axis and part.shape[axis] == size:
            return axis
    return None


def unequal(a: Any, b: Any) -> bool:
    """Whether two leaves of outputs that are not tensors differ.

    >>> unequal(1, 1), unequal(1, True)
    (False, True)
    """
    try:
        return type(a) is not type(b) or bool(a != b)
    except Exception:  # a class's own __ne__ may raise anything
        return a is not b


def _why_rows_mix(model: nn.Module, batch_dim: int) -> str:
    """Advice for the two usual causes, if the model shows one of them."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            return f" ({path} normalises over the batch in training mode; with delta.mode(train=False) it does not.)"
    if batch_dim == 0 and any(getattr(module, "batch_first", True) is False for module in model.modules()):
        return " (If the inputs are sequence-first, axis 1 counts the rows: write batch_dim=1 in the config.)"
    return ""
