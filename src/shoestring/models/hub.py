"""Files of repositories on the hub, and the one error for a repository that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from shoestring.errors import CheckpointError
from shoestring.models.quiet import muted

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CLIENT = "huggingface_hub.utils._http"
"""Which logs every attempt to reach the hub."""


def fetch_file(repository: str, file: str, revision: str | None = None) -> Path:
    """One file of a repository, in the hub's cache; raises `CheckpointError`."""
    with _asking(repository):
        return Path(hf_hub_download(repository, file, revision=revision))


def fetch_folder(
    repository: str,
    wanted: Collection[str] | None = None,
    *,
    unwanted: Collection[str] | None = None,
    revision: str | None = None,
    cached: bool = False,
) -> Path:
    """The folder in the hub's cache with a repository's files, those that match patterns.

    `cached` asks for what an earlier download left, without a connection. Raises `CheckpointError`.
    """
    patterns, others = (None if each is None else list(each) for each in (wanted, unwanted))
    with _asking(repository):
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=others,
            local_files_only=cached,
        )
    return Path(folder)


def list_files(repository: str, revision: str | None = None) -> list[str]:
    """Names of a repository's files; raises `CheckpointError`, also without a connection."""
    with _asking(repository):
        return HfApi().list_repo_files(repository, revision=revision)


def first_line(error: Exception) -> str:
    """The first sentence of a library's long message."""
    return str(error).strip().split("\n")[0].rstrip(".").strip() or type(error).__name__


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """What the hub's client raises, its own errors and its transport's, becomes the one error.

    A name that is a file here, or has not the form of a hub id, is refused without asking.
    """
    if Path(name).is_file() or not _ID.fullmatch(name):
        raise _unreadable(name, "not of the form OWNER/NAME")
    try:
        with muted(CLIENT):
            yield
    except Exception as error:
        raise _unreadable(name, first_line(error)) from error


def _unreadable(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: neither a folder here nor a hub repository that can be read ({reason}). Give a run, a "
        "pipeline, a network's folder, a file of weights or a hub id."
    )
