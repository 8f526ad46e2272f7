"""The error of the main job: one line that says what is wrong with the command, and what to write instead."""

from __future__ import annotations

import importlib.util

from ...errors import FuncdeltaError

PACKAGES = {
    "transformers": "transformers",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
"""The modules that every job needs besides torch, with the names to install them by."""


class JobError(FuncdeltaError):
    """The job cannot run as requested; nothing was written.

    >>> try:
    ...     raise JobError("news.csv is empty: give a file with a header and rows.")
    ... except FuncdeltaError as error:
    ...     print(error)
    news.csv is empty: give a file with a header and rows.
    """


def require(modules: dict[str, str]) -> None:
    """Raise `JobError` naming every package of ``modules`` (``{module: package}``) that is not installed.

    >>> require({"torch": "torch"})
    >>> require({"no_such_module": "no-such-package"})
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: Not installed: no-such-package. Run: pip install "funcdelta[demo]"
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise JobError(f'Not installed: {", ".join(missing)}. Run: pip install "funcdelta[demo]"')
