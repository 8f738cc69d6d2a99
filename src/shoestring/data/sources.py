"""Captioned images as numbered rows: image folder, WebDataset tars, Parquet, saved or hub data set, scenes.

    open_source(spec) -> Source;  source.rows(start, stop) -> Row, Row, ...

Row numbers are stable, so that any stretch can be read on its own: by one of several workers, or again.
A row that lacks its caption or file is yielded all the same, and it is the encoder that counts it as bad.
`datasets` streams hub data sets; local files are read here, because its reader leaves out images without
metadata and `.txt` captions silently, and neither counts nor seeks in Parquet files.
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.data.rows import (
    IMAGE_SUFFIXES,
    Row,
    Source,
    captions_of,
    clean_captions,
    files_fingerprint,
    pick_caption_columns,
)
from shoestring.errors import SourceError
from shoestring.storage import parse_json

__all__ = ["FolderSource", "Row", "SceneRows", "Source", "open_source"]

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SUPPORTED = (
    "an image folder (images with NAME.txt beside them, or metadata.jsonl, .csv or .parquet), "
    "WebDataset tars, Parquet files, a folder that save_to_disk of datasets left, a hub data set "
    "(owner/name), or scenes"
)
_ALL = ""  # a split: whatever files are called
_SPLITS = {"train": "train", "test": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def open_source(
    spec: str,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str | None = None,
    scenes: Mapping[str, Any] | None = None,
) -> Source:
    """The source that `spec` names; raises `SourceError` where there is none, or an option has no effect.

    Where every file or top folder is named after a split, only those of `split` (train) are read. `scenes`
    are the options of `ScenesSource`, for the spec `scenes`.
    """
    options = {
        "--image-column": [image_column] if image_column else [],
        "--caption-column": caption_columns,
        "--split": [split] if split else [],
    }
    if spec == "scenes" and (given := [name for name, values in options.items() if values]):
        raise SourceError(f"{given[0]} has no effect on scenes, which are drawn. Leave it out.")
    source = _open(spec, image_column, caption_columns, split, scenes)
    source.words += [word for name, values in options.items() for value in values for word in (name, value)]
    return source


def _open(
    spec: str,
    image_column: str | None,
    caption_columns: Sequence[str],
    split: str | None,
    scenes: Mapping[str, Any] | None,
) -> Source:
    if spec == "scenes":
        from shoestring.data.scenes import ScenesSource

        return SceneRows(ScenesSource(**(scenes or {})))
    if not spec:
        raise SourceError(f"no source was named. A source is {SUPPORTED}.")
    path = Path(spec).expanduser()
    if any(sign in spec for sign in "*?[") and not path.exists():
        files = sorted(Path(each) for each in glob.glob(str(path), recursive=True))
        root = Path(os.path.commonpath([each.parent for each in files])) if files else path
        return _from_files(root, files, spec, image_column, caption_columns, split)
    if path.is_file():
        if split is not None:
            raise SourceError(f"{spec}: is one file, so --split {split} has no effect. Leave it out.")
        return _from_files(path.parent, [path], spec, image_column, caption_columns, _ALL)
    if path.is_dir():
        from shoestring.data.tables import is_saved, open_saved

        if is_saved(path):
            return open_saved(path, spec, image_column, caption_columns, split or "train")
        return _from_files(path, _walk(path), spec, image_column, caption_columns, split)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", spec):
        from shoestring.data.tables import open_hub

        return open_hub(spec, image_column, caption_columns, split or "train")
    raise SourceError(f"{spec}: no such file or folder. A source is {SUPPORTED}.")


def _from_files(
    root: Path,
    files: list[Path],
    spec: str,
    image_column: str | None,
    caption_columns: Sequence[str],
    split: str | None,
) -> Source:
    """Tars if there are any, else images, else Parquet."""

    def of(suffixes: Iterable[str]) -> list[Path]:
        return [each for each in files if each.suffix.lower() in suffixes]

    if tars := of([".tar"]):
        from shoestring.data.tars import TarSource

        if image_column is not None:
            raise SourceError(f"{spec}: tars have no columns. Leave out --image-column.")
        return TarSource(_of_split(root, tars, split, spec), caption_columns, spec)
    if images := of(IMAGE_SUFFIXES):
        chosen = _of_split(root, images, split, spec, by_file=False)
        return FolderSource(root, chosen, files, image_column, caption_columns, spec)
    if tables := [each for each in of([".parquet"]) if each.name not in METADATA]:
        from shoestring.data.tables import ParquetSource

        return ParquetSource(_of_split(root, tables, split, spec), image_column, caption_columns, spec)
    found = sorted({each.suffix or each.name for each in files})
    there = f"only {', '.join(found[:8])} files" if found else "no files"
    raise SourceError(f"{spec}: {there} there. A source is {SUPPORTED}.")


# --- image folders ---------------------------------------------------------------------------------------


class FolderSource:
    """Images of a folder and all below it, with captions from metadata files or `.txt` files beside them."""

    def __init__(
        self,
        root: Path,
        images: Sequence[Path],
        files: Sequence[Path],
        image_column: str | None,
        caption_columns: Sequence[str],
        spec: str,
    ) -> None:
        self.root, self.spec, self.words = root, spec, [spec]
        self._columns = [*([image_column] if image_column else []), *caption_columns]
        self._captions = _read_metadata(root, files, image_column, caption_columns)
        if self._columns and not self._captions:
            option = "--image-column" if image_column else "--caption-column"
            raise SourceError(
                f"{spec}: has no metadata.jsonl, .csv or .parquet, so {option} {self._columns[0]} has no "
                "effect. Leave it out."
            )
        texts = {each for each in files if each.suffix.lower() == ".txt"}
        if not self._captions and not any(each.with_suffix(".txt") in texts for each in images):
            raise SourceError(
                f"{spec}: {len(images)} images and no captions. Put NAME.txt beside each image (one caption "
                "a line), or a metadata.jsonl, .csv or .parquet with the columns file_name and text."
            )
        there = {each.relative_to(root).as_posix() for each in files}
        absent = sorted(each for each in self._captions if each not in there)
        self._names = [each.relative_to(root).as_posix() for each in images] + absent
        self._fingerprint = files_fingerprint(
            root, [*images, *texts, *(f for f in files if f.name in METADATA)]
        )

    @property
    def num_rows(self) -> int:
        return len(self._names)

    def describe(self) -> dict[str, Any]:
        columns = {"columns": self._columns} if self._columns else {}
        return {"kind": "folder", "path": self.spec, "files": self._fingerprint, **columns}

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for name in self._names[start:stop]:
            path = self.root / name
            captions = self._captions.get(name) or _sidecar(path.with_suffix(".txt"))
            try:
                yield Row(name, path.read_bytes(), captions)
            except OSError as error:
                problem = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
                yield Row(name, b"", captions, problem=problem)


def _read_metadata(
    root: Path, files: Sequence[Path], image_column: str | None, caption_columns: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Captions by file name relative to `root`, from every metadata file; several lines may name one file."""
    captions: dict[str, tuple[str, ...]] = {}
    column = image_column or "file_name"
    for path in (each for each in files if each.name in METADATA):
        below = path.parent.relative_to(root)
        for record in _records_of(path):
            if column not in record:
                raise SourceError(
                    f"{path}: no column {column!r} naming the image files; "
                    f"there are: {', '.join(record)}. Rename one, or give it with --image-column."
                )
            chosen = pick_caption_columns(list(record), caption_columns, str(path))
            name = (below / str(record[column])).as_posix()
            captions[name] = captions.get(name, ()) + captions_of(record, chosen)
    return captions


def _records_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metadata file as dictionaries; raises `SourceError` where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _csv_records(path, file) if path.suffix == ".csv" else _json_records(path, file)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise SourceError(f"{path}: cannot be read ({error}). Write it anew.") from error


def _csv_records(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(csv.DictReader(lines), start=2):
        if None in record:
            raise SourceError(
                f"{path}, line {number}: more values than columns. Put captions with commas in quotes."
            )
        yield record


def _json_records(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error}). Correct this line.") from None
        if not isinstance(record, dict):
            raise SourceError(f'{path}, line {number}: not a JSON object like {{"file_name": ...}}.')
        yield record


def _sidecar(path: Path) -> tuple[str, ...]:
    """Captions in a `.txt` file, one a line; none where there is no such file."""
    try:
        return clean_captions(path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    except OSError:
        return ()


# --- scenes ----------------------------------------------------------------------------------------------


class SceneRows:
    """The rows of a `ScenesSource`, drawn in batches."""

    BATCH = 256

    def __init__(self, scenes: Any) -> None:
        self.scenes = scenes
        self.words = ["scenes"]
        for name in ("level", "images", "seed", "held_out", "objects"):
            if name in scenes.describe():
                self.words += [f"--{name.replace('_', '-')}", str(scenes.describe()[name])]

    @property
    def num_rows(self) -> int:
        return len(self.scenes)

    def describe(self) -> dict[str, Any]:
        return dict(self.scenes.describe())

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        stop = min(stop, self.num_rows)
        for first in range(start, stop, self.BATCH):
            numbers = range(first, min(first + self.BATCH, stop))
            for number, image, captions, scene in zip(numbers, *self.scenes.batch(numbers), strict=True):
                split = self.scenes.split(number)
                yield Row(f"{number:09d}", image, captions, split, {"scene": scene.to_json()})


# --- files -----------------------------------------------------------------------------------------------


def _walk(root: Path) -> list[Path]:
    """All files below a folder, sorted; hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda each: each.relative_to(root).as_posix())


def _of_split(
    root: Path, files: list[Path], split: str | None, spec: str, by_file: bool = True
) -> list[Path]:
    """The files of a split where every file (or its top folder) is named after one, else all files.

    Without `split` that is train; one that was asked for must have an effect.
    """

    def split_of(path: Path) -> str | None:
        parts = path.relative_to(root).parts
        names = [parts[0]] if len(parts) > 1 else []
        if by_file:
            names.append(re.split(r"[^A-Za-z]", path.stem, maxsplit=1)[0])
        return next((_SPLITS[name.lower()] for name in names if name.lower() in _SPLITS), None)

    if split == _ALL:
        return files
    splits = [split_of(each) for each in files]
    if None in splits:
        if split is not None:
            raise SourceError(
                f"{spec}: its files are not all named after splits, so --split {split} has no effect. "
                "Leave it out."
            )
        return files
    split = split or "train"
    chosen = [path for path, name in zip(files, splits, strict=True) if name == _SPLITS.get(split, split)]
    if not chosen:
        there = ", ".join(sorted({each for each in splits if each}))
        raise SourceError(f"{spec}: no files of split {split!r}; there are: {there}. Use --split.")
    return chosen
