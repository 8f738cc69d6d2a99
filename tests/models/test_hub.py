"""Files of the hub: whatever its client raises is one error, and what cannot be an id is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shoestring.errors import CheckpointError
from shoestring.models import hub

ASKED = {
    "hf_hub_download": partial(hub.fetch_file, file="config.json"),
    "snapshot_download": hub.fetch_folder,
    "HfApi.list_repo_files": hub.list_files,
}


class Unreachable(Exception):
    """As the transport of the hub's client raises: of no class that the hub itself names."""


def refuse(*given: Any, **options: Any) -> None:
    raise Unreachable("Name or service not known.\nmore")


@pytest.mark.parametrize(("client", "asked"), ASKED.items())
def test_no_connection_is_one_line(
    client: str, asked: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"shoestring.models.hub.{client}", refuse)
    with pytest.raises(CheckpointError) as caught:
        asked("owner/name")
    assert str(caught.value) == (
        "owner/name: neither a folder here nor a hub repository that can be read "
        "(Name or service not known). "
        "Give a run, a pipeline, a network's folder, a file of weights or a hub id."
    )


@pytest.mark.parametrize("name", ["a/b/c", "./name", "../name", "/name", "", "two words", "here.py"])
@pytest.mark.parametrize(("client", "asked"), ASKED.items())
def test_what_cannot_be_a_repository_is_not_asked_for(
    name: str,
    client: str,
    asked: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.py").touch()
    monkeypatch.setattr(f"shoestring.models.hub.{client}", lambda *given, **options: pytest.fail("was asked"))
    with pytest.raises(CheckpointError, match="not of the form OWNER/NAME"):
        asked(name)
