"""The main job from start to end: data, backbone, sweep, training, evaluation, saving, checking what was saved."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files.atomic import replace_folder
from ...files.configfile import funcdelta_version
from ...files.fingerprint import fingerprint
from . import backbones, loop, progress, resume
from .data import load_news, read_file
from .errors import PACKAGES, JobError, require
from .options import Options, Settings
from .plot import plot
from .report import PARTS, results, show
from .split import Split, split
from .sweep import Member, batches, grid

if TYPE_CHECKING:
    from ...model import DeltaModel

LAYERS = 2
"""How many of the last layers are adapted by default: what lies below them is computed once for all members."""
MEMBERS, PLOT = "members", "plot.png"


class InterruptedRunError(JobError):
    """The user stopped the run; its state is saved.

    >>> issubclass(InterruptedRunError, JobError)
    True
    """


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, checked and loaded; nothing has been written yet."""

    settings: Settings
    source: str
    split: Split
    inputs: dict[str, dict[str, Tensor]]
    labels: dict[str, Tensor]
    members: list[Member]
    delta: DeltaModel

    def start(self) -> resume.State:
        """The state before the first step; members with equal seeds start equal."""
        stack = self.delta.init([member.seed for member in self.members])
        optimizer = loop.optimizer_for(self.members, self.delta, self.settings.steps)
        return resume.State(0, stack, optimizer.init(stack), torch.zeros(0, len(self.members)))

    def batches(self) -> Tensor:
        """Which training rows every member sees at each step, (steps, n, b)."""
        rows, run = len(self.split.train), self.settings
        orders = {seed: batches(rows, run.steps, run.batch_size, seed) for seed in range(run.seeds)}
        return torch.stack([orders[member.seed] for member in self.members], dim=1)

    def describe(self) -> resume.Run:
        """What identifies the run on disk."""
        versions = {"funcdelta": funcdelta_version(), "torch": torch.__version__, "python": platform.python_version()}
        backbone = fingerprint(self.delta.backbone, exclude=self.delta.names)
        return resume.Run(self.settings, self.split.digest(), backbone, versions)


def run(options: Options) -> dict[str, Any]:
    """Run a job and return its report, which is also written to ``report.json`` in the out folder.

    While the run goes on, the out folder holds ``run.json`` and the last saved state; once it has finished,
    ``members/`` (for `fd.AutoDeltaModel.from_finetuned`), ``report.json``, ``plot.png`` and ``run.json``. It is
    replaced as a whole each time. Raises `FuncdeltaError` if the options are wrong, before anything is written, and
    `InterruptedRunError` on Ctrl-C, after which ``resume`` continues.
    """
    began = time.perf_counter()
    require(PACKAGES)
    out, given = options.out, _absolute(options.given)
    saved = resume.load_run(out, given) if options.resume else None
    if saved is None and (out.exists() or out.is_symlink()):
        raise JobError(f"{out} exists: give another --out, or continue the run in it with --resume.")
    finished = out / resume.REPORT
    if saved is not None and finished.is_file():
        report = json.loads(finished.read_text(encoding="utf-8"))
        _say(options, f"The run in {out} has finished; this is its report.")
        if not options.quiet:
            show(report)
        return report
    settings = saved.settings if saved else Settings(**given)
    threads = torch.get_num_threads()
    settings = dataclasses.replace(settings, threads=settings.threads or threads)
    torch.set_num_threads(settings.threads or threads)
    try:
        return _run(options, settings, saved, began)
    finally:
        torch.set_num_threads(threads)


def prepare(settings: Settings) -> Job:
    """Check the settings and load what they name; raises a `FuncdeltaError` of one line if anything is wrong."""
    settings.config()
    members = grid(settings.sweep, settings.seeds)
    source = backbones.locate(settings.backbone)
    data = read_file(settings.data, settings.text, settings.label) if settings.data else load_news()
    test = read_file(settings.test_data, settings.text, settings.label) if settings.test_data else None
    parts = split(data, test)
    tokenize = backbones.load_tokenizer(source, settings.length)
    texts = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    inputs = {part: tokenize(rows.texts) for part, rows in texts.items()}
    labels = {part: torch.tensor(parts.numbers(rows)) for part, rows in texts.items()}
    model = backbones.load_model(source, len(parts.classes), settings.length)
    delta = build_delta(settings, model)
    return Job(settings, source, parts, inputs, labels, members, delta)


def build_delta(settings: Settings, model: backbones.TextClassifier) -> DeltaModel:
    """The delta that the settings describe, on the last layers unless they name the sites themselves."""
    from ...model import DeltaModel

    config = settings.config()
    delta = DeltaModel(model, config)
    layers = settings.layers or (LAYERS if config.modified_modules is None else None)
    sites = backbones.last_layers(list(delta.sites), layers) if layers is not None else []
    # A method whose own sites are in no layer (a soft prompt) keeps them.
    if sites or settings.layers is not None:
        if not sites:
            raise JobError(
                "No site lies in a numbered layer, so --layers means nothing here; name the sites with "
                "--set modified_modules=NAME,NAME."
            )
        # The others are excluded by name, so that what is named at a site (a part of its output) does not change.
        others = [path for path in delta.sites if path not in sites]
        config = config.replace(exclude_modules=(*(config.exclude_modules or ()), *others) or None)
        delta = DeltaModel(model, config)
    return delta.mode(train=False)


def _run(options: Options, settings: Settings, saved: resume.Run | None, began: float) -> dict[str, Any]:
    job = prepare(settings)
    described = job.describe()
    state = job.start()
    if saved is None:
        resume.save(options.out, described, state)
    else:
        resume.check_same(options.out, saved, described)
        if saved.versions != described.versions:
            _say(options, f"This run began with {saved.versions}; with {described.versions} the result may differ.")
        state = resume.load_state(options.out, state)
    try:
        state, training, steps = _train(job, described, state, options)
        report, chances = _evaluate(job, state, options)
        report["speed"] |= {
            "steps_per_second": steps / training if steps else None,
            "member_steps_per_second": steps * len(job.members) / training if steps else None,
            "steps_timed": steps,
            "training_seconds": training,
            "threads": settings.threads,
        }
        _finish(job, described, state, report, chances, options, began)
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Stopped. Continue with: funcdelta train --out {options.out} --resume") from None
    if not options.quiet:
        show(report)
        print(f"Written to {options.out}: {MEMBERS}/, {resume.REPORT}, {PLOT}")
    return report


def _train(job: Job, described: resume.Run, state: resume.State, options: Options) -> tuple[resume.State, float, int]:
    """The state after the last step, the seconds that steps took, and how many were timed."""
    first, total, seconds = state.step, job.settings.steps, 0.0
    delta = job.delta.mode(train=job.settings.dropout)
    optimizer = loop.optimizer_for(job.members, delta, total)
    bar = progress.bar(f"training {len(job.members)} members", total, first, options.quiet)
    walk = loop.steps(delta, optimizer, state, job.batches(), job.inputs["train"], job.labels["train"])
    written = first
    try:
        while state.step < total:
            start = time.perf_counter()
            state = next(walk)
            seconds += time.perf_counter() - start
            bar.note(f"loss {state.losses[-1].nanmean().item():.3f}")
            bar.advance()
            if state.step % options.save_every == 0 or state.step == total:
                resume.save(options.out, described, state)
                written = state.step
    except KeyboardInterrupt:
        if written != state.step:
            resume.save(options.out, described, state)
        raise
    finally:
        bar.close()
    return state, seconds, total - first


def _evaluate(job: Job, state: resume.State, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report so far, and every member's probabilities by part."""
    start = time.perf_counter()
    total = sum(len(job.labels[part]) for part in PARTS)
    bar = progress.bar("evaluating", total, quiet=options.quiet)
    try:
        chances = {part: loop.probabilities(job.delta, state.stack, job.inputs[part], bar.advance) for part in PARTS}
    finally:
        bar.close()
    figures = results(job.members, chances, job.labels, state.losses)
    data = {
        "classes": list(job.split.classes),
        "train": len(job.split.train),
        "validation": len(job.split.validation),
        "test": len(job.split.test),
        "repeated": job.split.repeated,
        "epochs": job.settings.steps * job.settings.batch_size / len(job.split.train),
    }
    speed = {"evaluation_seconds": time.perf_counter() - start}
    about = {"settings": job.settings.to_dict(), "data": data, "sites": list(job.delta.sites)}
    return about | figures | {"speed": speed}, chances


def _finish(
    job: Job,
    described: resume.Run,
    state: resume.State,
    report: dict[str, Any],
    chances: Mapping[str, Tensor],
    options: Options,
    began: float,
) -> None:
    """Save the members, reload and test them, and replace the state by the finished folder."""
    with tempfile.TemporaryDirectory() as place:
        members = Path(place, MEMBERS)
        job.delta.save_finetuned(state.stack, members)
        report["reloaded"] = _reload(job, members, chances["validation"], options)
        report["speed"]["total_seconds"] = time.perf_counter() - began

        def write(folder: Path) -> None:
            # The files handed over are those that were tested.
            shutil.copytree(members, folder / MEMBERS)
            plot(report, folder / PLOT)
            for name, content in ((resume.RUN, described.to_dict()), (resume.REPORT, report)):
                text = json.dumps(content, indent=2, allow_nan=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8")

        replace_folder(options.out, write)


def _reload(job: Job, folder: Path, chances: Tensor, options: Options) -> dict[str, Any]:
    """Run the members as anyone else would: from the folder, on a freshly loaded backbone.

    The validation texts suffice, and are half as many as the test texts.
    """
    from ...auto import AutoDeltaModel

    model = backbones.load_model(job.source, len(job.split.classes))
    delta, stack = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    bar = progress.bar("checking what was saved", len(job.labels["validation"]), quiet=options.quiet)
    try:
        again = loop.probabilities(delta.mode(train=False), stack, job.inputs["validation"], bar.advance)
    finally:
        bar.close()
    answers = job.labels["validation"]
    same = (again.argmax(-1) == answers).double().mean(-1) == (chances.argmax(-1) == answers).double().mean(-1)
    difference = (again - chances).abs().nan_to_num().max().item()
    if not bool(same.all()):
        wrong = (~same).nonzero().flatten().tolist()
        raise JobError(
            f"The saved members {wrong} do not answer like the trained ones (they differ by {difference:.1e})."
        )
    return {"same_accuracy": int(same.sum()), "largest_difference": difference}


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Paths made absolute, so that a run can be resumed from another folder."""
    paths = {name: given[name] for name in ("data", "test_data", "backbone") if given.get(name)}
    found = {
        name: str(Path(path).resolve()) for name, path in paths.items() if name != "backbone" or Path(path).is_dir()
    }
    return given | found


def _say(options: Options, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr)
