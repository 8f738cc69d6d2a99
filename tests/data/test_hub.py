"""A data set of the hub is known by name and commit: another, or a branch that moved, is another source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoestring.data.begun import begin
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.manifest import BEGUN, MANIFEST, origin_of, signed
from shoestring.data.sources import open_source
from shoestring.data.store import Store
from shoestring.errors import ShoestringError, SourceError, StoreError
from shoestring.storage import read_json, write_json

Pngs = Callable[..., bytes]


class Hub:
    """Two data sets whose main branch is at a commit; what was loaded; whether it answers questions."""

    def __init__(self, pngs: Pngs) -> None:
        self.pngs, self.main, self.answers = pngs, "a" * 40, True
        self.loaded: list[tuple[str, str | None]] = []
        self.breaks_at = 10**6

    def dataset_info(self, name: str, *, revision: str | None = None, timeout: float = 0) -> Any:
        if not self.answers:
            raise ConnectionError("no route\nto the hub")
        return SimpleNamespace(sha=revision or self.main)

    def load(self, name: str, *, split: str, streaming: bool, revision: str | None) -> Any:
        import datasets

        self.loaded.append((name, revision))

        def records() -> Any:
            for number in range(7):
                if number >= self.breaks_at:
                    raise ConnectionError("reset by peer\nin the middle")
                yield {"image": {"bytes": self.pngs(number), "path": None}, "text": f"{name} {number}"}

        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        return datasets.IterableDataset.from_generator(records, features=features)


@pytest.fixture
def hub(pngs: Pngs, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets
    import huggingface_hub

    found = Hub(pngs)
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda api, *words, **options: found.dataset_info(*words, **options),
    )
    return found


def make(spec: str, out: Path) -> Store:
    settings = EncodeSettings(sizes=(16,), chunk_rows=3)
    store = encode(open_source(spec), out, settings, log=lambda line: None)
    assert store is not None
    return store


def test_the_commit_that_is_there_is_what_is_read_and_named(hub: Hub, tmp_path: Path) -> None:
    store = make("owner/cats", tmp_path / "s")
    assert hub.loaded == [("owner/cats", "a" * 40)]
    said = store.manifest["source"]
    assert (said["path"], said["dataset"], said["commit"]) == ("owner/cats", "owner/cats", "a" * 40)
    assert store.manifest["command"].startswith(f"shoestring encode owner/cats@{'a' * 40} ")


def test_another_data_set_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    store = make("owner/cats", tmp_path / "s")
    (store.path / MANIFEST).unlink()
    (store.path / "chunks/00001.json").unlink()
    with pytest.raises(StoreError, match=r"source\.dataset owner/cats there, other/dogs now"):
        make("other/dogs", store.path)
    dogs = open_source("other/dogs").describe()
    assert origin_of(store.manifest, "rows") != origin_of({"source": dogs}, "rows")


def test_a_branch_that_moves_is_noticed_and_the_old_commit_goes_on(hub: Hub, tmp_path: Path) -> None:
    store = make("owner/cats", tmp_path / "s")
    (store.path / "chunks/00001.json").unlink()
    hub.main = "b" * 40
    with pytest.raises(StoreError, match=rf"source\.commit {'a' * 40} there, {'b' * 40} now"):
        make("owner/cats", store.path)
    make(f"owner/cats@{'a' * 40}", store.path).verify()


def test_where_the_hub_does_not_say_the_commit_the_name_is_compared_still(hub: Hub, tmp_path: Path) -> None:
    store = make("owner/cats", tmp_path / "s")
    hub.answers = False
    for spec in ("owner/cats", f"owner/cats@{'a' * 40}"):
        (store.path / "chunks/00001.json").unlink()
        make(spec, store.path).verify()
    with pytest.raises(StoreError, match=r"source\.commit"):
        make(f"owner/cats@{'c' * 40}", store.path)
    with pytest.raises(StoreError, match=r"source\.dataset"):
        make("other/dogs", store.path)


def test_a_store_begun_before_commits_were_noted_goes_on_from_its_own_data_set(
    hub: Hub, tmp_path: Path
) -> None:
    store = make("owner/cats", tmp_path / "s")
    begun = read_json(store.path / BEGUN)
    for key in ("dataset", "commit"):
        del begun["source"][key]
    write_json(store.path / BEGUN, signed(begun))
    for path in ((store.path / MANIFEST), *(store.path / "chunks").iterdir()):
        path.unlink()
    with pytest.raises(StoreError, match=r"source\.dataset owner/cats there, other/dogs now"):
        make("other/dogs", store.path)
    make("owner/cats", store.path).verify()


def test_a_stream_that_breaks_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.breaks_at = 4
    with pytest.raises(
        SourceError, match=r"^owner/cats: cannot be read on \(ConnectionError: reset by peer\)"
    ):
        make("owner/cats", tmp_path / "s")
    hub.breaks_at = 10**6
    make("owner/cats", tmp_path / "s").verify()


def test_an_addition_goes_on_where_source_and_encoder_have_moved(tmp_path: Path) -> None:
    """And not where what they are made of has changed."""
    (tmp_path / "added").mkdir()

    def asked(place: str, weights: str) -> dict[str, Any]:
        described = {"kind": "folder", "path": place, "files": "f"}
        encoder = {"id": place, "revision": place, "weights": weights}
        return {"format": 2, "captions": described, "texts": {"path": {"text_encoder": encoder}}}

    def go_on(place: str, weights: str) -> dict[str, Any]:
        return begin(tmp_path, asked(place, weights), dict, addition="text-path")

    first = go_on("/here", "w")
    assert go_on("/there", "w") == first
    with pytest.raises(ShoestringError, match=r"texts\.path\.text_encoder\.weights w there, v now"):
        go_on("/here", "v")
