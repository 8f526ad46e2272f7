"""A stand-in for the package huggingface_hub: repositories are folders, and calls have to fit the real signatures."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any


class FakeHub:
    """The three calls that funcdelta makes; ``calls`` has ``(function, arguments by name)`` in order."""

    def __init__(self, root: Path, real: ModuleType, user: str = "me") -> None:
        self.root, self.real, self.user = root, real, user
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given("create_repo", args, kwargs)
        name = given["repo_id"]
        if name.startswith("forbidden/"):
            raise PermissionError("not yours")
        full = name if "/" in name else f"{self.user}/{name}"
        (self.root / full).mkdir(parents=True, exist_ok=given.get("exist_ok", False))
        return self.real.RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, *args: Any, **kwargs: Any) -> str:
        given = self._given("upload_folder", args, kwargs)
        repository = self.root / given["repo_id"]
        if not repository.is_dir():
            raise FileNotFoundError(f"no repository {given['repo_id']}")
        for file in Path(given["folder_path"]).iterdir():
            if file.name in given["allow_patterns"]:
                shutil.copy(file, repository / file.name)
        return "commit"

    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        given = self._given("snapshot_download", args, kwargs)
        repository = self.root / given["repo_id"]
        if not repository.is_dir():
            raise FileNotFoundError(f"no repository {given['repo_id']}\nand more lines")
        cache = Path(given.get("cache_dir") or self.root.parent / "cache") / given["repo_id"]
        if given.get("local_files_only") and not cache.is_dir():
            raise FileNotFoundError(f"{given['repo_id']} is not in the cache")
        if given.get("force_download") or not cache.is_dir():
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(repository, cache)
        return str(cache)

    def _given(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(getattr(self.real, function)).bind(*args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.calls.append((function, given))
        return given
