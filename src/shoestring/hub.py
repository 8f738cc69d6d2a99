"""Files of repositories on the hub, and the one error for a repository that cannot be read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from shoestring.errors import CheckpointError

ABSENT = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError, OSError)
"""What huggingface_hub raises for a name that is none, a file that is not there, and no connection."""


def fetch_file(repository: str, file: str, revision: str | None = None) -> Path:
    """One file of a repository, in the hub's cache; raises `CheckpointError`."""
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except ABSENT as error:
        raise unreadable(repository, error) from error


def fetch_folder(
    repository: str,
    wanted: Collection[str] | None = None,
    *,
    unwanted: Collection[str] | None = None,
    revision: str | None = None,
) -> Path:
    """The folder in the hub's cache with a repository's files, those that match patterns; as `fetch_file`."""
    patterns, others = (None if each is None else list(each) for each in (wanted, unwanted))
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=others)
        )
    except ABSENT as error:
        raise unreadable(repository, error) from error


def list_files(repository: str, revision: str | None = None) -> list[str]:
    """Names of a repository's files; raises `CheckpointError`, also without a connection."""
    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except ABSENT as error:
        raise unreadable(repository, error) from error


def unreadable(name: str, error: Exception) -> CheckpointError:
    """What to raise for a name that is neither a folder nor a repository to be had."""
    return CheckpointError(
        f"{name}: neither a folder here nor a hub repository that can be read ({first_line(error)}). Give a "
        "run, a pipeline, a network's folder, a file of weights or a hub id."
    )


def first_line(error: Exception) -> str:
    """The first sentence of a library's long message."""
    return str(error).strip().split("\n")[0].rstrip(".").strip() or type(error).__name__
