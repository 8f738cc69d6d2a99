"""A store's manifest, its checksum, and the names of a store's files (docs/data.md, "Integrity").

The manifest lists every shard with its size, CRC-32, SHA-256 and origin, every record (markers, settings,
what was left out) with its SHA-256, and last the SHA-256 of all that. Origin is a short hash of the source
and the encoder that a shard was made with, which the shard itself carries too: files of two encodings cannot
mix unseen.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.errors import CorruptStoreError, StoreError
from shoestring.storage import fingerprint, parse_json, read_json, sha256

FORMAT = 2  # adds to 1: checksums of the manifest and the records, int8 text, columns added later
MANIFEST = "manifest.json"
BEGUN = "begun.json"
SKIPPED = "skipped.jsonl"
VERIFIED = "verified.json"  # which files `shoestring store verify` found whole; see integrity.py

_CHECKSUM = "sha256"
_NAMES = ("path", "id", "revision")  # of sources and encoders: change no number

_NAME = r"[\w-][\w.-]*"  # of a column or an addition: never `..`, never a folder elsewhere
_ADDITION = re.compile(_NAME)
_SHARD = re.compile(rf"columns/{_NAME}/\d+\.(safetensors|jsonl)")
_RECORD = re.compile(rf"chunks/({_NAME}/)?\d+\.json|added/{_NAME}\.json|begun\.json|skipped\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(column: str, chunk: int) -> str:
    """A shard's file, relative to the store."""
    return f"columns/{column}/{chunk:05d}.{'jsonl' if column.startswith('json') else 'safetensors'}"


def marker_name(chunk: int, addition: str = "") -> str:
    """The file that says a chunk is finished, of the store or of an addition to it; relative to the store."""
    return f"chunks/{addition}/{chunk:05d}.json" if addition else f"chunks/{chunk:05d}.json"


def addition_name(addition: str) -> str:
    """The file that says what an addition is made of, relative to the store."""
    return f"added/{addition}.json"


def addition_of(manifest: Mapping[str, Any], name: str) -> str:
    """The addition that a file belongs to; empty for what the store was first made with."""
    folder, *rest = name.split("/")
    if folder == "columns":
        added = manifest.get("added", {})
        return next((each for each, said in added.items() if rest[0] in said["columns"]), "")
    if folder == "added":
        return rest[0].removesuffix(".json")
    return rest[0] if folder == "chunks" and len(rest) > 1 else ""


def first_columns(begun: Mapping[str, Any]) -> list[str]:
    """The columns that a store is first made with, by what it was begun with."""
    return [*(f"latents-{size}" for size in begun["sizes"]), "text", "rows", "json"]


def chunk_of(name: str) -> int:
    """The chunk of a shard or marker."""
    return int(Path(name).name.split(".")[0])


def column_of(name: str) -> str:
    """The column of a shard."""
    return name.split("/")[1]


def origin_of(begun: Mapping[str, Any], column: str) -> str:
    """What a column's numbers come from, as a short hash: source, encoder and form, whatever their names."""
    kind, _, name = column.partition("-")
    made_of: list[Any] = [_unnamed(begun["source"])]
    if kind == "latents":
        made_of.append(_unnamed(begun["autoencoder"]))
    elif kind == "text":
        of = {**begun, **begun.get("texts", {}).get(name, {})}
        made_of += [_unnamed(of["text_encoder"]), of.get("text_dtype"), of.get("text_channels")]
    return fingerprint(made_of)


def _unnamed(described: Mapping[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in described.items() if key not in _NAMES}


def records_of(store: Path, num_chunks: int) -> dict[str, str]:
    """SHA-256 of a folder's settings, list of what was left out, and markers, by name."""
    names = [BEGUN, SKIPPED, *map(marker_name, range(num_chunks))]
    return {name: sha256(store / name) for name in names if (store / name).is_file()}


def signed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with a checksum of all the rest of it as its last entry."""
    rest = {key: each for key, each in value.items() if key != _CHECKSUM}
    return {**rest, _CHECKSUM: _checksum(rest)}


def signature_holds(value: Mapping[str, Any], *, needed: bool = True) -> bool:
    """Whether a value carries the checksum of all the rest of it, or none where none is needed."""
    return value == signed(value) or not (needed or _CHECKSUM in value)


def parse_manifest(text: bytes, place: str, cure: str) -> dict[str, Any]:
    """The manifest that a file holds; raises `StoreError` with `cure` for a damaged, edited or newer one.

    Whoever made it may have meant harm, and signed it: it names files of a store and SHA-256s, nothing else.
    """
    try:
        manifest = parse_json(text)
        version = int(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{place}/{MANIFEST}: cannot be read ({_brief(error)}). {cure}") from error
    if not signature_holds(manifest, needed=version != 1):
        raise CorruptStoreError(
            f"{place}/{MANIFEST}: is damaged or was edited: it does not match its own checksum. {cure}"
        )
    if version > FORMAT:
        raise StoreError(_newer(place, manifest))
    try:
        strange = next(_strange(manifest), None)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{place}/{MANIFEST}: cannot be read ({_brief(error)}). {cure}") from error
    if strange is not None:
        raise CorruptStoreError(f"{place}/{MANIFEST}: names {strange!r}, which no store holds. {cure}")
    return dict(manifest)


def _strange(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What a manifest names that is no file, SHA-256 or addition of a store: paths that lead out of it."""
    shards = [(entry["path"], entry["sha256"]) for entry in manifest["files"]]
    for pattern, named in ((_SHARD, shards), (_RECORD, manifest.get("records", {}).items())):
        for name, hashed in named:
            if not pattern.fullmatch(name):
                yield name
            if not _SHA256.fullmatch(hashed):
                yield hashed
    yield from (name for name in manifest.get("added", {}) if not _ADDITION.fullmatch(name))


def read_begun(store: Path, addition: str = "") -> dict[str, Any]:
    """The settings a store, or an addition to it, was begun with; raises `StoreError` for unusable ones."""
    path = store / (addition_name(addition) if addition else BEGUN)
    words = "store add" if addition else "encode"
    remove = f"rm -f {shlex.quote(str(path))} {shlex.quote(str(store / MANIFEST)) * (not addition)}".rstrip()
    cure = f"Run the same `shoestring {words}` again, which keeps finished chunks, after: {remove}"
    try:
        begun = read_json(path)
        version = int(begun["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path}: cannot be read ({_brief(error)}). {cure}") from error
    if not signature_holds(begun, needed=version != 1):
        raise CorruptStoreError(f"{path}: is damaged or was edited. {cure}")
    if version > FORMAT:
        raise StoreError(_newer(str(store), begun))
    return {key: each for key, each in begun.items() if key != _CHECKSUM}


def check_origins(place: Path | str, begun: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> None:
    """Raise `StoreError` where some shards were made by other encoders or from another source than the rest.

    `entries` are those of the files of `begun`, which says what they should come from.
    """
    expected: dict[str, str] = {}
    foreign = []
    for entry in entries:
        column, origin = column_of(entry["path"]), entry.get("origin")
        if column not in expected:
            expected[column] = origin_of(begun, column)
        if origin and origin != expected[column]:
            foreign.append(str(entry["path"]))
    if foreign:
        raise CorruptStoreError(
            f"{place}: {listed(foreign)} made by other encoders or from another source than the rest. "
            f"{encode_again(place, begun, foreign)}"
        )


def listed(names: Sequence[str]) -> str:
    """`a`, `a, b`, or the first five and how many more, with its verb."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'was' if len(names) == 1 else 'were'}"


def encode_again(place: Path | str, begun: Mapping[str, Any], names: Iterable[str]) -> str:
    """The commands that encode the chunks of some shards again."""
    markers: dict[str, list[str]] = {}
    for addition, chunk in sorted({(addition_of(begun, name), chunk_of(name)) for name in names}):
        markers.setdefault(addition, []).append(shlex.quote(f"{place}/{marker_name(chunk, addition)}"))
    again = "this chunk" if sum(map(len, markers.values())) == 1 else "these chunks"
    steps = [f"rm -f {' '.join(each)} && {command_of(place, begun, of)}" for of, each in markers.items()]
    return f"Encode {again} again with: {' && '.join(steps)}"


def command_of(place: Path | str, begun: Mapping[str, Any], addition: str = "") -> str:
    """The command that made a store or an addition to it, which also mends it."""
    out = shlex.quote(str(place))
    if addition:
        words = _quoted(begun["added"][addition]["words"], [])
        return f"shoestring store add {out} {words or 'WHAT'}"
    return f"{made_by(begun)} --out {out}"


def made_by(begun: Mapping[str, Any]) -> str:
    """The command that a store says made it, safe to print as one to run: one `shoestring encode`, quoted."""
    return _quoted(begun.get("command"), ["shoestring", "encode"]) or "shoestring encode SOURCE"


def _quoted(command: Any, begins: list[str]) -> str:
    """The words of a command that begins with those of `begins`, quoted anew; empty where it is none.

    A store may come from anywhere, and what it says must not end or follow a command in a user's shell.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) and command.isprintable() else []
    except ValueError:
        return ""
    return shlex.join(words) if words[: len(begins)] == begins else ""


def mend_manifest(path: Path) -> str:
    """What writes the manifest of a folder anew."""
    remove = f"rm -f {shlex.quote(str(path / MANIFEST))}"
    return f"Write it anew from what is there with: {remove} && {_command_of(path)}"


def why_not(path: Path) -> str:
    """Why a folder without a manifest is no store."""
    if not path.exists():
        return f"{path}: no such store. Make one with `shoestring encode SOURCE --out {path}`."
    if (path / BEGUN).is_file():
        done = len(list((path / "chunks").glob("*.json")))
        return f"{path}: this store is unfinished ({done} chunks done). Go on with: {_command_of(path)}"
    return (
        f"{path}: not a store (no {MANIFEST} in it). "
        "Give the folder that `shoestring encode SOURCE --out STORE` made."
    )


def _newer(place: str, made: Mapping[str, Any]) -> str:
    return (
        f"{place}: store format {made['format']}, made by Shoestring {made.get('shoestring')}; "
        f"this version reads up to {FORMAT}. Upgrade with `pip install --upgrade shoestring`."
    )


def _command_of(path: Path) -> str:
    try:
        begun = dict(read_json(path / BEGUN))
    except (OSError, ValueError, TypeError):
        begun = {}
    return command_of(path, begun)


def _checksum(value: Mapping[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _brief(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
