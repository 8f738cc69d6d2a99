"""Sources that are tables: Parquet files, and data sets of `datasets`, saved in a folder or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.data.rows import (
    Row,
    SequentialSource,
    captions_of,
    files_fingerprint,
    pick_caption_columns,
    pick_image_column,
)
from shoestring.errors import SourceError


class ParquetSource(SequentialSource):
    """Parquet files with a column of images (bytes, or {bytes, path}) and columns of captions."""

    BATCH = 64  # rows turned into Python objects at a time

    def __init__(
        self, files: Sequence[Path], image_column: str | None, caption_columns: Sequence[str], spec: str
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(spec)
        self.files, self._parquet = list(files), pq
        self._starts: list[tuple[int, int, int]] = []  # (first row, file, row group)
        total, schema = 0, pa.schema([])
        for index, path in enumerate(self.files):
            try:
                file = pq.ParquetFile(path)
            except (OSError, pa.ArrowInvalid) as error:
                raise SourceError(f"{path}: not a Parquet file that can be read ({error}).") from None
            if index and not file.schema_arrow.equals(schema):
                raise SourceError(f"{path}: its columns differ from those of {self.files[0].name}.")
            schema = file.schema_arrow
            for group in range(file.num_row_groups):
                self._starts.append((total, index, group))
                total += file.metadata.row_group(group).num_rows
        self._end = total
        columns = {each.name: str(each.type) for each in schema}
        self.image_column = pick_image_column(columns, image_column, spec)
        self.caption_columns = pick_caption_columns(
            [name for name, kind in columns.items() if "string" in kind], caption_columns, spec
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "parquet",
            "path": self.spec,
            "rows": self.num_rows,
            "files": files_fingerprint(None, self.files),
            "columns": [self.image_column, *self.caption_columns],
        }

    def _base(self, start: int) -> int:
        return max((first for first, _, _ in self._starts if first <= start), default=0)

    def _records(self, base: int) -> Iterator[tuple[Any, int]]:
        columns = [self.image_column, *self.caption_columns]
        for first, index, group in self._starts:
            if first >= base:
                try:
                    with self._parquet.ParquetFile(self.files[index]) as file:
                        for batch in file.iter_batches(self.BATCH, row_groups=[group], columns=columns):
                            yield from ((batch, row) for row in range(batch.num_rows))
                except OSError as error:  # pyarrow's word for damaged pages as well
                    raise SourceError(
                        f"{self.files[index]}, row group {group}: damaged ({error})."
                    ) from error

    def _load(self, number: int, record: tuple[Any, int]) -> Row:
        batch, row = record
        values = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
        root = self.files[0].parent
        return _row_of(f"{number:09d}", values, self.image_column, self.caption_columns, root)


class HubSource(SequentialSource):
    """A streamed data set of `datasets`: nothing is downloaded before it is read.

    `commit` is what fixes its content on the hub, empty where that is not known.
    """

    def __init__(
        self,
        dataset: Any,
        spec: str,
        image_column: str | None = None,
        caption_columns: Sequence[str] = (),
        split: str = "train",
        commit: str = "",
    ) -> None:
        import datasets

        super().__init__(spec)
        self.dataset, self.split, self.commit = spec.partition("@")[0], split, commit
        if commit:
            self.words = [f"{self.dataset}@{commit}"]  # the same content, whatever becomes of its branch
        self._root: Path | None = None  # of images that are paths
        features = dataset.features
        if features is None:
            first: dict[str, Any] = next(iter(dataset), {})
            kinds = {name: _kind_of(value) for name, value in first.items()}
        else:
            kinds = {name: str(feature) for name, feature in features.items()}
        self.image_column = pick_image_column(kinds, image_column, spec)
        strings = [name for name, kind in kinds.items() if "string" in kind and name != self.image_column]
        self.caption_columns = pick_caption_columns(strings, caption_columns, spec)
        self._dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))

    def describe(self) -> dict[str, Any]:
        content = {"dataset": self.dataset, "commit": self.commit, "split": self.split}
        columns = [self.image_column, *self.caption_columns]
        return {"kind": "hub", "path": self.spec, **content, "columns": columns}

    def _base(self, start: int) -> int:
        return self._at if self._iterator is not None and self._at <= start else start

    def _records(self, base: int) -> Iterator[Any]:
        try:
            yield from self._dataset.skip(base) if base else self._dataset
        except Exception as error:  # as many kinds as when it is opened
            raise SourceError(
                f"{self.spec}: cannot be read on ({_reason(error)}). Check the connection and run the same "
                "command again, which keeps finished chunks."
            ) from error

    def _load(self, number: int, record: Any) -> Row:
        return _row_of(f"{number:09d}", record, self.image_column, self.caption_columns, self._root)


class SavedSource(HubSource):
    """A data set in a folder, as `save_to_disk` of `datasets` leaves it: its length is known."""

    def __init__(
        self,
        dataset: Any,
        root: Path,
        spec: str,
        image_column: str | None,
        caption_columns: Sequence[str],
        split: str,
    ) -> None:
        super().__init__(dataset, spec, image_column, caption_columns, split)
        self._root, self._end = root, len(dataset)
        self._files = files_fingerprint(root, root.glob("*.arrow"))

    def describe(self) -> dict[str, Any]:
        columns = [self.image_column, *self.caption_columns]
        said = {"kind": "saved", "path": self.spec, "split": self.split, "columns": columns}
        return {**said, "rows": self.num_rows, "files": self._files}


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, in this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(
    folder: Path, spec: str, image_column: str | None, caption_columns: Sequence[str], split: str
) -> SavedSource:
    """What `save_to_disk` left in a folder: one data set, or a split of several."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged file raises what pyarrow, json or the library's own reading does
        raise SourceError(
            f"{spec}: a data set saved by `datasets` that cannot be read ({_reason(error)}). Save it again."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise SourceError(f"{spec}: no split {split!r}; there are: {', '.join(found)}. Use --split.")
        found, folder = found[split], folder / split
    elif split != "train":
        raise SourceError(f"{spec}: has no splits. Leave out --split.")
    return SavedSource(found, folder, spec, image_column, caption_columns, split)


def open_hub(spec: str, image_column: str | None, caption_columns: Sequence[str], split: str) -> HubSource:
    """Stream `owner/name` or `owner/name@revision` from the hub, at the commit that is there now."""
    import datasets

    name, _, revision = spec.partition("@")
    commit = _commit_of(name, revision)
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=True, revision=commit or None)
    except Exception as error:  # the hub client raises many kinds, from connection to repository errors
        raise SourceError(
            f"{spec}: no such file or folder, and as a hub data set it cannot be opened ({_reason(error)}). "
            "Check the name, the connection and, for a closed set, the login."
        ) from error
    return HubSource(dataset, spec, image_column, caption_columns, split, commit)


def _commit_of(name: str, revision: str) -> str:
    """The commit that a revision (empty: the main branch) is now; the revision where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision or None, timeout=30).sha or revision
    except Exception:  # of many kinds too; what cannot be opened either is told there
        return revision


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _row_of(
    key: str, record: Mapping[str, Any], image_column: str, columns: Sequence[str], root: Path | None
) -> Row:
    """A table's record as a row; an image is bytes, or {bytes, path} of which the path may be alone."""
    captions = captions_of(record, columns)
    value: Any = record.get(image_column)
    path: Any = None
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        value, path = None, value
    if value is None and path and root is not None:
        try:
            value = (root / path).read_bytes()
        except OSError:
            return Row(key, b"", captions, problem="missing file")
    if not isinstance(value, bytes):
        return Row(key, b"", captions, problem="no image")
    return Row(key, value, captions)


def _kind_of(value: Any) -> str:
    """A type's name as `pick_*_column` reads it, from a first value."""
    if isinstance(value, (bytes, Mapping)) or hasattr(value, "convert"):
        return "binary Image"
    texts = value if isinstance(value, list) else [value]
    return "string" if texts and isinstance(texts[0], str) else type(value).__name__
