"""Sizes, captions and encoders added to a finished store: as if encoded at first; nothing else changes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shoestring.data.add import CaptionAddition, SizeAddition, add, source_again
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.encoders import CaptionEncoder, ImageEncoder
from shoestring.data.loader import Loader
from shoestring.data.rows import Row
from shoestring.data.sources import open_source
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, SourceError, StoreError
from shoestring.models.text_encoders import load_text_encoder

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]
Pngs = Callable[..., bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def columns_of(store: Store) -> dict[str, bytes]:
    return files_of(store.path / "columns")


def image_of(store: Store) -> ImageEncoder:
    return ImageEncoder.load(store.manifest["autoencoder"]["id"], log_variance=store.has_log_variance)


def add_size(store: Store, source: Any, size: int, worker: tuple[int, int] = (0, 1), **options: Any) -> Store:
    addition = SizeAddition(store, source, size, image_of(store), **options)
    grown = add(store, addition, worker=worker, log=lambda line: None)
    assert grown is not None
    return grown


def words_of(name: str = "hashing", dtype: str = "float16", pad: str = "none") -> CaptionEncoder:
    return CaptionEncoder.load(name, dtype, pad=pad, max_tokens=None)


def add_captions(store: Store, source: Any, text: CaptionEncoder | None = None, **options: Any) -> Store:
    said = options.pop("said", [])
    addition = CaptionAddition(store, source, text or words_of(), **{"name": "better", **options})
    grown = add(store, addition, log=said.append)
    assert grown is not None
    return grown


def with_captions(rows: list[Row], captions: Callable[[int], tuple[str, ...]]) -> list[Row]:
    return [Row(row.key, row.image, captions(n), row.split, row.extra) for n, row in enumerate(rows)]


def better(number: int) -> tuple[str, ...]:
    return tuple(f"a far better caption {part} of {number}" for part in range(1 + number % 2))


@pytest.fixture
def big(pictures: Callable[..., Any]) -> list[Row]:
    """Rows of pictures that can be taken at several sizes; some captions say a side."""
    captions = [(f"number {n}", "on the left") if n % 4 == 0 else (f"number {n}",) for n in range(23)]
    return [Row(f"row{n}", pictures(n, 40 + n % 5, 36 + n % 3), captions[n]) for n in range(23)]


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "later"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("autoencoder", ["pixels", "kl"])
def test_a_size_added_equals_one_encoded_at_first(
    autoencoder: str,
    first: int,
    later: int,
    big: list[Row],
    list_source: Any,
    make_store: MakeStore,
    kl_folder: Path,
) -> None:
    """Byte for byte, with mirrored versions, log-variances and a row that was left out."""
    big[7] = Row("bad", b"", ("x",))
    kl = {"autoencoder": str(kl_folder), "log_variance": True} if autoencoder == "kl" else {}
    options = {"flip": True, "max_bad": 0.1, **kl}
    both = make_store(big, "both", sizes=(16, 32), **options)
    before = make_store(big, "grown", sizes=(first,), **options)
    there = columns_of(before)
    grown = add_size(before, list_source(big), later)
    assert grown.sizes == (16, 32)
    assert {name: data for name, data in columns_of(grown).items() if name in there} == there
    latents = f"latents-{later}/"
    assert {n: d for n, d in columns_of(grown).items() if n.startswith(latents)} == {
        n: d for n, d in columns_of(both).items() if n.startswith(latents)
    }
    every = np.arange(22)
    for size in (16, 32):
        assert torch.equal(grown.latents(size, every), both.latents(size, every))
        assert torch.equal(grown.size_crop(every, size), both.size_crop(every, size))
    assert grown.verify().files == len(files_of(grown.path)) - 2 - 1  # of work; verified.json


def test_an_addition_changes_no_batch_of_a_run_that_does_not_name_it(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = make_store(big, held_out=3)
    loader = Loader(store, size=16, batch_size=5, seed=4, extra=("size_crop",))
    before = list(loader.batches(0, 60))
    add_captions(store, list_source(with_captions(big, better)))
    add_size(store, list_source(big), 32)
    after = Loader(Store.open(store.path), size=16, batch_size=5, seed=4, extra=("size_crop",))
    for one, other in zip(before, after.batches(0, 60), strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.text, other.text)
        assert one.captions == other.captions
        assert torch.equal(one.extra["size_crop"], other.extra["size_crop"])


def test_an_interrupted_addition_leaves_the_store_as_it_was_and_goes_on(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    class Stops(list_source):  # type: ignore[misc]
        def rows(self, start: int, stop: int) -> Any:
            for row in super().rows(start, stop):
                if row.key == "row17":
                    raise KeyboardInterrupt
                yield row

    store = make_store(big)
    manifest = (store.path / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        add_size(store, Stops(big), 32)
    assert (store.path / "manifest.json").read_bytes() == manifest
    again = Store.open(store.path)
    assert again.sizes == (16,)
    assert again.latents(16, np.arange(23)).shape == (23, 3, 16, 16)
    source = list_source(big)
    grown = add_size(again, source, 32)
    assert source.reads == list(range(10, 23))
    assert torch.equal(
        grown.latents(32, np.arange(23)), make_store(big, "b", sizes=(32,)).latents(32, np.arange(23))
    )


def test_workers_share_an_addition_and_the_last_one_seals(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store, one = make_store(big), make_store(big, "one")
    sources = [list_source(big) for _ in range(3)]
    grown = []
    for rank in (2, 0, 1):
        addition = SizeAddition(store, sources[rank], 32, image_of(store))
        grown.append(add(store, addition, worker=(rank, 3), log=lambda line: None))
    assert [each is None for each in grown] == [True, True, False]
    assert [source.reads for source in sources] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 23)),
    ]
    assert columns_of(store) == columns_of(add_size(one, list_source(big), 32))
    said = Store.open(store.path).manifest["added"]["latents-32"]["work"]
    assert [(each["worker"], each["rows"]) for each in said] == [("0/3", 10), ("1/3", 10), ("2/3", 3)]


def test_two_additions_at_once_are_both_kept(big: list[Row], list_source: Any, make_store: MakeStore) -> None:
    """One is finished while the other, which opened the store before, still works."""

    class Meanwhile(list_source):  # type: ignore[misc]
        def rows(self, start: int, stop: int) -> Any:
            if start == 20:
                add_captions(store, list_source(with_captions(big, better)))
            yield from super().rows(start, stop)

    store = make_store(big)
    grown = add_size(store, Meanwhile(big), 32)
    assert grown.sizes == (16, 32)
    assert list(grown.text_sets) == ["main", "better"]
    assert list(grown.manifest["added"]) == ["latents-32", "text-better"]


# --- another source --------------------------------------------------------------------------------------


def swapped(rows: list[Row]) -> list[Row]:
    return [*rows[:12], rows[13], rows[12], *rows[14:]]


def other_picture(rows: list[Row]) -> list[Row]:
    turned = np.ascontiguousarray(np.asarray(rows[10].image)[::-1])
    return [*rows[:10], Row("row10", turned, rows[10].captions), *rows[11:]]


def other_size(rows: list[Row]) -> list[Row]:
    cut = np.ascontiguousarray(np.asarray(rows[14].image)[:, 1:])
    return [*rows[:14], Row("row14", cut, rows[14].captions), *rows[15:]]


CHANGES: list[Any] = [
    (swapped, StoreError, "the source has 'row13' where the store has 'row12'"),
    (lambda rows: rows[:-1], StoreError, "the source has no row 'row22' any more"),
    (lambda rows: [*rows, Row("new", b"", ())], StoreError, "has 'new' where the store has no more rows"),
    (other_size, StoreError, "'row14' was a picture of 44 x 38 pixels and is one of 43 x 38 now"),
    (
        lambda rows: [*rows[:3], Row("row3", b"", ("x",), problem="missing file"), *rows[4:]],
        SourceError,
        "'row3': missing file, though the store has it",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), CHANGES)
@pytest.mark.parametrize("what", ["size", "captions"])
def test_a_source_of_other_rows_is_refused_naming_the_first(
    what: str,
    change: Callable[[list[Row]], list[Row]],
    kind: type[Exception],
    message: str,
    big: list[Row],
    list_source: Any,
    make_store: MakeStore,
) -> None:
    store = make_store(big)
    manifest = (store.path / "manifest.json").read_bytes()
    source = list_source(change(big))
    with pytest.raises(kind, match=message):
        _ = add_size(store, source, 32) if what == "size" else add_captions(store, source)
    assert (store.path / "manifest.json").read_bytes() == manifest


def test_another_picture_of_the_same_name_and_size_is_found(
    big: list[Row], list_source: Any, make_store: MakeStore, kl_folder: Path
) -> None:
    """The first of each chunk is encoded as before and compared: pixels and a real autoencoder."""
    for number, options in enumerate(({}, {"autoencoder": str(kl_folder)})):
        store = make_store(big, f"s{number}", **options)
        with pytest.raises(StoreError, match="row 'row10' of the source is another picture"):
            add_size(store, list_source(other_picture(big)), 32)


def test_a_row_without_the_new_size_is_told_and_may_be_enlarged(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = make_store(big)
    with pytest.raises(SourceError, match=r"row 'row0': too small for 64 pixels.*--upscale"):
        add_size(store, list_source(big), 64)
    (store.path / "added/latents-64.json").unlink()
    assert add_size(store, list_source(big), 64, upscale=True).sizes == (16, 64)


def test_sizes_and_weights_that_cannot_be_added_are_refused(
    big: list[Row], list_source: Any, make_store: MakeStore, kl_folder: Path
) -> None:
    store = make_store(big, autoencoder=str(kl_folder))
    with pytest.raises(StoreError, match="holds 16 pixels already"):
        add_size(store, list_source(big), 16)
    with pytest.raises(StoreError, match="multiples of 2; nearest: 14 or 16"):
        add_size(store, list_source(big), 15)
    with pytest.raises(StoreError, match=r"made by .* with other weights than pixels has"):
        SizeAddition(store, list_source(big), 32, ImageEncoder.load("pixels"))


def test_an_addition_begun_otherwise_says_how_to_begin_anew(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = make_store(big)
    addition = SizeAddition(store, list_source(big), 32, image_of(store))
    assert add(store, addition, worker=(0, 2), log=lambda line: None) is None
    with pytest.raises(StoreError, match=r"upscale False there, True now.*rm -r .*added/latents-32\.json"):
        add_size(store, list_source(big), 32, upscale=True)
    add_size(store, list_source(big), 32)
    source = list_source(with_captions(big, better))
    add_captions(store, source)
    with pytest.raises(StoreError, match="add it with another --name"):
        add_captions(
            Store.open(store.path), list_source(with_captions(big, better)), words_of("hashing", "int8")
        )


# --- captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_added_captions_are_drawn_when_named(
    dtype: str, big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    """Alone, or together with those of the first encoding, each about as often; tokens are the encoder's."""
    store = make_store(big, text_dtype=dtype)
    grown = add_captions(store, list_source(with_captions(big, better)), words_of(dtype=dtype))
    every = np.arange(23)
    alone, together = grown.drawing(["better"]), grown.drawing(["main", "better"])
    for row in range(23):
        assert tuple(alone.captions(row)) == better(row)
        assert together.captions(row) == [*grown.captions(row), *better(row)]
    choice = np.random.default_rng(0).random(23)
    words = together.chosen_captions(every, choice)
    expected = [together.captions(row)[int(choice[row] * len(together.captions(row)))] for row in range(23)]
    assert list(words) == expected
    exact = load_text_encoder("hashing").encode(words).tokens
    text, mask = together.padded_text(every, choice)
    for row, tokens in enumerate(exact):
        kept = text[row][mask[row]]
        assert (1 - torch.nn.functional.cosine_similarity(kept, tokens, dim=1)).max() < 1e-4
        assert torch.equal(together.text(every, choice)[row], kept)
    drawn = [
        each
        for batch in Loader(together, size=16, batch_size=50, seed=0).batches(0, 2300)
        for each in batch.captions
    ]
    share = sum(each.startswith("a far better") for each in drawn) / 2300
    wanted = np.mean([len(better(n)) / (len(better(n)) + len(big[n].captions)) for n in range(23)])
    assert abs(share - wanted) < 0.05
    with pytest.raises(StoreError, match="has no captions 'best'; there are: main, better"):
        grown.drawing(["best"])


def test_rows_without_the_new_caption_keep_their_own(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = make_store(big)
    given = with_captions(big, lambda n: () if n in (3, 15) else better(n))
    with pytest.raises(SourceError, match=r"2 of 23 rows have no caption to add, .*--max-bad 0\.09"):
        add_captions(store, list_source(given))
    assert list(Store.open(store.path).text_sets) == ["main"]
    source, said = list_source(given), list[str]()
    grown = add_captions(store, source, max_bad=0.09, said=said)
    assert source.reads == []
    assert said == ["2 of 23 rows have no caption to add and keep their own"]
    assert grown.drawing(["better"]).captions(15) == list(big[15].captions)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_second_text_encoder_reads_the_stores_own_captions(
    dtype: str, rows: MakeRows, make_store: MakeStore, list_source: Any, clip_folder: Path
) -> None:
    """No source is needed; the two cannot stand in one batch; captions added under it join its set."""
    given = rows(23)
    store = make_store(given)
    clip = words_of(str(clip_folder), dtype)
    grown = add_captions(store, None, clip, name="clip", words=["--text-encoder", str(clip_folder)])
    under = grown.drawing(["clip"])
    assert (under.text_width, under.max_tokens, grown.text_width) == (16, 8, 64)
    under.check(text_encoder=str(clip_folder))
    choice = np.linspace(0, 0.99, 23)
    words = under.chosen_captions(np.arange(23), choice)
    assert words == grown.chosen_captions(np.arange(23), choice)
    exact = load_text_encoder(str(clip_folder)).encode(words)
    for ours, theirs in zip(under.text(np.arange(23), choice), exact.tokens, strict=True):
        assert (1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=1)).max() < 1e-3
    assert exact.pooled is not None
    torch.testing.assert_close(under.pooled(np.arange(23), choice), exact.pooled, atol=2e-3, rtol=2e-3)
    assert grown.pooled(np.arange(2)) is None
    with pytest.raises(StoreError, match="'clip' were encoded otherwise than 'main'"):
        grown.drawing(["main", "clip"])
    with pytest.raises(StoreError, match=r"has its captions under this text encoder already \('clip'\)"):
        add_captions(grown, None, clip, name="again")
    more = with_captions(given, lambda n: (f"caption of {n} of {n}",))
    grown = add_captions(grown, list_source(more), clip, name="more-clip")
    assert grown.drawing(["clip", "more-clip"]).captions(5)[-1] == "caption of 5 of 5"
    assert (
        grown.manifest["texts"]["more-clip"]["text_channels"]
        == grown.manifest["texts"]["clip"]["text_channels"]
    )


def test_names_that_cannot_be_folders_are_refused(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = make_store(big)
    for name in ("main", "../x", "a b", ""):
        with pytest.raises(StoreError, match="give a name of letters"):
            add_captions(store, list_source(big), name=name)


# --- damage ----------------------------------------------------------------------------------------------


def test_damage_to_an_added_column_is_told_with_the_command_that_mends_it(
    big: list[Row], list_source: Any, make_store: MakeStore
) -> None:
    store = add_size(make_store(big), list_source(big), 32, words=["list"])
    before = files_of(store.path)
    path = store.path / "columns/latents-32/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptStoreError) as caught:
        Store.open(store.path).latents(32, np.array([12]))
    marker = store.path / "chunks/latents-32/00001.json"
    assert f"rm -f {marker} && shoestring store add {store.path} list --size 32" in str(caught.value)
    marker.unlink()
    source = list_source(big)
    add_size(Store.open(store.path), source, 32)
    assert source.reads == list(range(10, 20))
    after = files_of(store.path)
    assert {n: d for n, d in after.items() if n.startswith(("columns", "chunks"))} == {
        n: d for n, d in before.items() if n.startswith(("columns", "chunks"))
    }


def test_encoding_a_damaged_chunk_again_keeps_what_was_added(
    big: list[Row], list_source: Any, make_store: MakeStore, tmp_path: Path
) -> None:
    store = add_captions(make_store(big), list_source(with_captions(big, better)))
    (store.path / "chunks/00001.json").unlink()
    settings = EncodeSettings(sizes=(16,), chunk_rows=10)
    again = encode(list_source(big), store.path, settings, log=lambda line: None)
    assert again is not None
    assert again.drawing(["better"]).captions(11) == list(better(11))
    assert again.verify().damaged == {}


# --- the command line ------------------------------------------------------------------------------------


def shoestring(*words: str) -> None:
    from shoestring.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    if ended.value.code:
        raise AssertionError(ended.value.code)


@pytest.fixture
def tables(tmp_path: Path, pngs: Pngs) -> Path:
    """Parquet with two caption columns, and a third made later."""

    def write(columns: dict[str, list[Any]]) -> None:
        pq.write_table(pa.table({"image": [pngs(n) for n in range(12)], **columns}), tmp_path / "t.parquet")

    short = {
        "text": [f"short {n}" for n in range(12)],
        "long": [f"a longer caption of {n}" for n in range(12)],
    }
    write(short)
    shoestring(
        *("encode", str(tmp_path / "t.parquet"), "--caption-column", "text", "--caption-column", "long"),
        *("--size", "16", "--size", "32", "--chunk-rows", "5", "--out", str(tmp_path / "s")),
    )
    write({**short, "best one": [f"the best caption of {n}" for n in range(12)]})
    return tmp_path


def test_two_sizes_and_two_caption_columns_in_one_store(tables: Path) -> None:
    """Both sizes of every picture, both captions of every row, drawn by the position in the run."""
    store = Store.open(tables / "s")
    assert store.captions(3) == ["short 3", "a longer caption of 3"]
    for size in (16, 32):
        batches = list(Loader(store, size=size, batch_size=12, seed=0).batches(0, 600))
        assert batches[0].latents.shape == (12, 3, size, size)
        captions = [caption for batch in batches for caption in batch.captions]
        assert abs(sum(each.startswith("short") for each in captions) - 300) < 5 * 150**0.5
        assert {int(caption.split()[-1]) for caption in captions} == set(range(12))


def test_commands_add_a_size_captions_and_an_encoder(
    tables: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source is known to the store; the caption column was made after it."""
    place = str(tables / "s")
    shoestring("store", "add", place, "--size", "24", "--size", "8")
    shoestring("store", "add", place, "--caption-column", "best one", "--text-dtype", "int8")
    shoestring("store", "add", place, "--text-encoder", str(clip_folder), "--pad", "masked")
    store = Store.open(place)
    assert store.sizes == (8, 16, 24, 32)
    assert list(store.text_sets) == ["main", "best-one", "clip"]
    assert store.drawing(["best-one"]).captions(7) == ["the best caption of 7"]
    assert store.drawing(["clip"]).pad == "masked"
    assert store.drawing(["clip"]).padded_text(np.arange(3))[0].shape == (3, 8, 16)
    shoestring("store", "verify", place)
    capsys.readouterr()
    shoestring("store", "info", place)
    told = capsys.readouterr().out
    for words in (
        "best-one: 1.0 a sample, 5.0 tokens each",
        "int8 token x channel",
        "24 px",
        "worker 0/1 on",
        "1 - cos",
    ):
        assert words in told
    for name, said in store.manifest["added"].items():  # each says how to go on with it
        chunk = store.path / f"chunks/{name}/00001.json"
        before = chunk.read_bytes()
        chunk.unlink()
        shoestring("store", "add", place, *shlex.split(said["words"]))
        assert chunk.read_bytes() == before
    shoestring("store", "verify", place)


def test_scenes_are_drawn_again_for_another_size(tmp_path: Path) -> None:
    """As the store knows them; scenes of another seed are other scenes."""
    place = str(tmp_path / "s")
    shoestring("encode", "scenes", "--images", "40", "--held-out", "4", "--seed", "3", "--out", place)
    shoestring("store", "add", place, "--size", "16", "--size", "64")
    store = Store.open(place)
    scenes = {"images": 40, "held_out": 4, "seed": 3}
    drawn = next(iter(open_source("scenes", scenes={**scenes, "size": 64}).rows(7, 8))).image
    assert isinstance(drawn, np.ndarray)
    latent = store.latents(64, np.array([7]))[0]
    assert torch.equal(latent, torch.from_numpy(drawn.copy()).permute(2, 0, 1).float() / 127.5 - 1)
    other = open_source("scenes", scenes={**scenes, "seed": 4})
    with pytest.raises(StoreError, match="row '000000000' of the source is another scene than the store's"):
        add_size(store, other, 48)
    assert source_again(store).describe() == store.manifest["source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "what to add: give --size N"),
        (["--size", "8", "--caption-column", "text"], "what to add: give --size N"),
        (["--size", "8", "--name", "x"], "--name has no effect without --caption-column or --text-encoder"),
        (["--caption-column", "text", "--upscale"], "--upscale has no effect without --size"),
        (["--caption-column", "text", "--pad", "encoder"], "--pad has no effect without --text-encoder"),
        (
            ["x.parquet", "--text-encoder", "hashing"],
            "SOURCE has no effect without --size or --caption-column",
        ),
        (["--caption-column", "none"], "no text column 'none'; there are: text, long, best one"),
        (["nowhere.parquet", "--size", "8"], "no such file or folder"),
        (["--size", "16"], "holds 16 pixels already"),
    ],
)
def test_bad_additions_end_with_two_and_one_line(
    words: list[str], message: str, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(AssertionError, match="2"):
        shoestring("store", "add", str(tables / "s"), *words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert json.loads((tables / "s/manifest.json").read_text()).get("added") in (None, {})
