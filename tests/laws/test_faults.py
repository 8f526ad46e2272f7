"""What users reported of other libraries, done with this one: each script computes the right value and says PASS."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

import funcdelta

SCRIPTS = sorted(path.name for path in (SHARED / "faults").glob("*.py"))
NEEDS = {"16_diffusers_unet.py": "diffusers", "01_scaled_embedding.py": "peft"}
PATIENCE = 300

pytestmark = pytest.mark.slow


def lines_of(script: Path) -> tuple[str, str]:
    """What the script prints, and the end of what it says of errors, with the package that these tests import."""
    path = [str(Path(funcdelta.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-W", "ignore", script.name]
    done = subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("name", SCRIPTS or [pytest.param("none", id="no folder of faults")])
def test_the_script_says_pass(name: str, shared_folder) -> None:
    folder = shared_folder("faults")
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}: pip install {package}")
    said, errors = lines_of(folder / name)
    verdicts = [line for line in said.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert verdicts, f"no verdict; it printed {said!r} and ended with\n{errors}"
    assert verdicts[-1].startswith("PASS"), "\n".join(verdicts)
