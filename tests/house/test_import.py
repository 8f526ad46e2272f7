"""What `import funcdelta` and `funcdelta --help` bring with them: torch, and next to nothing else."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LATER = {
    *("transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "datasets", "torchao", "gguf"),
    *("flask", "werkzeug", "matplotlib", "pandas", "scipy", "sklearn", "rich", "tqdm", "webbrowser", "IPython"),
    *("sympy", "mpmath", "torchvision", "triton", "dp_accounting", "optree", "requests", "httpx"),
    *("torch._dynamo", "torch._inductor", "torch._export", "torch.onnx", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.testing", "torch.fx.experimental.symbolic_shapes"),
}
"""What is imported where it is used; torch itself imports some of it."""

STARTS = {
    "import funcdelta": "import funcdelta",
    "funcdelta --help": "from funcdelta.apps.cli import main; main(['--help'])",
    "funcdelta --version": "from funcdelta.apps.cli import main; main(['--version'])",
}


@functools.cache
def modules_after(code: str) -> set[str]:
    """The modules that a fresh process has after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_torch() -> set[str]:
    return modules_after("import torch")


@pytest.mark.parametrize("start", STARTS)
def test_what_is_used_later_is_imported_later(start: str, of_torch: set[str]) -> None:
    assert sorted((modules_after(STARTS[start]) & LATER) - of_torch) == []


def test_little_comes_besides_torch_and_the_library_itself(of_torch: set[str]) -> None:
    more = modules_after("import funcdelta") - of_torch
    others = {name for name in more if name.partition(".")[0] not in {"funcdelta", "torch", *sys.stdlib_module_names}}
    assert {name.partition(".")[0] for name in others} <= {"safetensors"}
    assert len([name for name in more if name.startswith("torch.")]) <= 5


def test_commands_and_namespaces_are_imported_when_they_are_asked_for() -> None:
    packages = {"bench", "train", "costs", "picker", "packing", "recipes", "algebra", "optim", "interop", "inspect"}
    assert modules_after("import funcdelta").isdisjoint(f"funcdelta.{package}" for package in packages)


def test_calls_and_gradients_in_plain_python_need_no_compiler() -> None:
    code = (
        "import torch, funcdelta as fd\n"
        "delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 4)), lora_r=2, modified_modules=['0'])\n"
        "stack, x = delta.init(0, n=2), torch.ones(3, 4)\n"
        "delta.apply(fd.take(stack, 0), x), delta.apply_rows(stack, [0, 1, -1], x)\n"
        "for engine in ('auto', 'loop', 'vmap', 'fold'):\n"
        "    delta.apply_many(stack, x, engine=engine)\n"
        "fd.value_and_grad(lambda stack: delta.apply_many(stack, x).square().mean((1, 2)))(stack)\n"
    )
    assert modules_after(code).isdisjoint({"transformers", "torch._dynamo", "sympy"})


def test_what_breaks_compiled_code_off_is_run_as_plain_python() -> None:
    """The marks that torch's decorators set are read by the compiler, also where it is imported later."""
    code = (
        "import torch\n"
        "from funcdelta.transforms import constant_while_tracing, eager, eager_alone\n"
        "seen = []\n"
        "def inner(x):\n"
        "    seen.append(torch.compiler.is_compiling())\n"
        "    return x + 1\n"
        "@eager\n"
        "def all_plain(x):\n"
        "    return inner(x)\n"
        "@eager_alone\n"
        "def plain(x):\n"
        "    return inner(x) if not torch.compiler.is_compiling() else x\n"
        "@constant_while_tracing\n"
        "def known():\n"
        "    return len(sorted(sys.modules))\n"
        "import sys\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "x = torch.ones(2)\n"
        "graphs = []\n"
        "def backend(graph, inputs):\n"
        "    graphs.append(graph)\n"
        "    return graph.forward\n"
        "def around(function, x):\n"
        "    return function(x * 2) * 3\n"
        "for function in (all_plain, plain):\n"
        "    run = torch.compile(lambda x, f=function: around(f, x), backend=backend)\n"
        "    for _ in range(2):\n"
        "        assert torch.equal(run(x), torch.full((2,), 9.0))\n"
        "    try:\n"
        "        torch.compile(lambda x, f=function: around(f, x), backend='eager', fullgraph=True)(x)\n"
        "    except torch._dynamo.exc.Unsupported as error:\n"
        "        assert function.__name__ in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('traced')\n"
        "    torch._dynamo.reset()\n"
        "assert seen[:2] == [False, False], seen\n"
        "value = torch.compile(lambda x: x * known(), backend='eager', fullgraph=True)(x)\n"
        "assert float(value[0]) > 1000, value\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
