"""What starting costs: `import funcdelta` and `funcdelta --help` against `import torch`, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import funcdelta as fd
from funcdelta.apps.bench.measure import Effort, Notify, Row, Table, Target, silent
from funcdelta.apps.bench.timing import Ratio, spread

TORCH = "import torch"
STARTS = {
    TORCH: TORCH,
    "import funcdelta": "import funcdelta",
    "funcdelta --help": "import contextlib, io\nfrom funcdelta.apps.cli import main\n"
    "with contextlib.redirect_stdout(io.StringIO()):\n    main(['--help'])",
}
BEFORE = {"import funcdelta": 2.2, "funcdelta --help": 2.2}
ALLOWED = {"import funcdelta": 1.2, "funcdelta --help": 1.5}


def starting(code: str) -> float:
    """Seconds of processor time that a fresh process of Python takes to start and to run `code`.

    >>> 0 < starting("pass") < starting("import json, asyncio")
    True
    """
    # Bytecode is kept between runs, as it is once the package is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = [str(Path(fd.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    ask = [sys.executable, "-c", f"{code}\nimport time\nprint(time.process_time())"]
    ended = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
    return float(ended.stdout.split()[-1])


def starting_table(effort: Effort, notify: Notify = silent) -> Table:
    """Processor time of fresh processes, taken in turn."""
    title = "starting, fresh processes"
    seconds: dict[str, list[float]] = {label: [] for label in STARTS}
    rounds = 2 * effort.repeats - 1
    for index in range(rounds):
        notify(f"{title}: round {index + 1} of {rounds}")
        for label, code in STARTS.items():
            seconds[label].append(starting(code))
    # Other processes, and modules compiled for the first time, can only make a run slower.
    least = {label: min(values) for label, values in seconds.items()}
    rows = []
    for label, value in least.items():
        ratio = value / least[TORCH]
        target = Target.at_most(f"x {TORCH}", ALLOWED[label], ratio) if label in ALLOWED else None
        note = f"before: {BEFORE[label]} x" if label in BEFORE else ""
        rows.append(Row(label, 1e3 * value, Ratio(ratio, ratio, ratio), None, target, note))
    kept = {label: tuple(values) for label, values in seconds.items()}
    facts: dict[str, Any] = {"seconds": kept, "what": "processor time", "compared": ""}
    return Table(title, "fresh processes", TORCH, tuple(rows), spread(seconds[TORCH]), **facts)
