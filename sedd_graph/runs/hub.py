"""Upload of exports to a model hub, and download from it, by the ``huggingface_hub`` library (extra ``hub``)."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

from sedd_graph.errors import MissingExtraError, UserError
from sedd_graph.store.run_folder import write_folder

__all__ = ["pull", "push", "require_repo"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.yaml", "*.py", "*.md", "*.txt", "*.model"]
"""Patterns of the files that are downloaded: no pickled weights."""


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise MissingExtraError("huggingface_hub", extra="hub", purpose="a model hub") from None


def require_repo(repo: str) -> None:
    """Raise :class:`UserError` unless ``repo`` is the name of a repository, ``owner/name``."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"{repo!r} is not a repository of a model hub: give owner/name, such as me/mdlm-tiny")


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a folder to a repository, which is created if it does not exist.

    The library reads the user's token, and the address of the hub from ``HF_ENDPOINT``.

    Args:
        folder: The exported folder.
        repo: Name of the repository, ``owner/name``.
        private: True to create a repository that only its owner reads. An existing one stays as it is.

    Returns:
        The address of the commit.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    require_repo(repo)
    library = _library()
    api = library.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of sedd_graph")
    except Exception as error:  # of many classes
        raise UserError(f"{repo} was not written: {_reason(error)}") from None
    return str(getattr(done, "commit_url", None) or done)


def pull(repo: str, out: Path, *, revision: str | None = None) -> Path:
    """Download a repository to a folder; no code of it is run.

    Args:
        repo: Name of the repository, ``owner/name``.
        out: The folder, which must be empty or not exist.
        revision: Branch, tag or commit; None: the main branch.

    Returns:
        The folder.

    Raises:
        UserError: The hub refuses or cannot be reached, or ``out`` is not empty.
    """
    require_repo(repo)
    library = _library()

    def write(folder: Path) -> None:
        try:
            library.snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=FILES)
        except Exception as error:  # of many classes
            raise UserError(f"{repo} was not read: {_reason(error)}") from None
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        if not any(folder.iterdir()):
            raise UserError(f"{repo} has none of the files of a model: {', '.join(FILES)}")

    write_folder(out, write)
    return out


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
