"""Commands given malformed input: a table of mistakes, junk under recipes' keys, and random bytes in files.

Whatever is given, a command ends with exit code 0, or with 2 and exactly one line that begins with `error:`
(or `Error:`, where the parser of command lines refuses) on stderr; never with a traceback. One that refuses
leaves every file as it was.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from parts.faults_jobs import RECIPE, make_pictures
from parts.faults_mistakes import Content, Mistake
from parts.faults_processes import Ended, Server

from shoestring.data.chunks import WORK
from shoestring.recipes.load import builtin_names, dump, load_stages

LONG = 60.0  # seconds
_PICTURES = 12


@dataclass
class World:
    """A folder with a run, a store, pictures and tables: what commands are pointed at."""

    server: Server
    folder: Path

    def prepare(self) -> None:
        """Make all of it with the commands themselves."""
        self.whole = self.folder / "whole"
        self.whole.mkdir(parents=True)
        make_pictures(self.whole / "pictures", _PICTURES)
        shutil.copyfile(RECIPE, self.whole / "quick.yaml")
        _make_tables(self.whole)
        for line in (
            "encode pictures --out store --size 16 --held-out 4 --chunk-rows 5",
            "encode pictures --out half --size 16 --chunk-rows 5",
            "train quick.yaml --runs . --name run --device cpu",
        ):
            ended = self.server.run(shlex.split(line), self.whole)
            if ended.code:
                raise RuntimeError(f"{line} fails in a world that is well: {ended}")
        (self.whole / "half" / "manifest.json").unlink()
        self.leaves = [key for name in builtin_names() for each in _resolved(name) for key in _leaves(each)]

    # --- a table of mistakes -----------------------------------------------------------------------------

    def mistake(self, folder: Path, mistake: Mistake) -> list[str]:
        """Make a mistake; what did not hold. It must be refused."""
        shutil.copytree(self.whole, folder)
        for name, content in mistake.files.items():
            _put(folder / name, content)
        return self._meet(folder, mistake.line, refused=True)

    # --- junk --------------------------------------------------------------------------------------------

    def junk_key(self, folder: Path, chance: random.Random) -> list[str]:
        """Set a key of a built-in recipe, or of one that is nearly a key, to junk."""
        folder.mkdir(parents=True)
        words = [chance.choice(builtin_names())]
        for _ in range(chance.choice((1, 1, 1, 2))):
            key = chance.choice(self.leaves)
            if chance.random() < 0.2:
                key = chance.choice((key.rpartition(".")[0], key + ".x", key.replace(".", "..", 1), key[:-1]))
            words += ["--set", f"{key}={_junk_value(chance)}"]
        return self._meet(folder, shlex.join(["train", *words, "--dry-run"]))

    def junk_bytes(self, folder: Path, chance: random.Random) -> list[str]:
        """Change some bytes of a file that a command reads."""
        shutil.copytree(self.whole, folder)
        pattern, lines = chance.choice(_READ)
        file = chance.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        line = chance.choice(lines)
        content = file.read_bytes()
        for _ in range(chance.choice((1, 1, 2, 5))):
            content = _junk_bytes(content, chance)
        file.unlink()
        file.write_bytes(content)
        problems = self._meet(folder, line)
        return [f"{problem} with {file.relative_to(folder)} = {content[:200]!r}" for problem in problems]

    # --- how a command met it ----------------------------------------------------------------------------

    def _meet(self, folder: Path, line: str, *, refused: bool = False) -> list[str]:
        before = _state(folder)
        ended = self.server.run(shlex.split(line), folder, LONG)
        problems = []
        if ended.late:
            problems.append("does not end")
        elif ended.code not in ((2,) if refused else (0, 2)):
            problems.append(f"exit code {ended.code}")
        if "Traceback" in ended.err:
            problems.append("a traceback")
        if ended.code == 2:
            lines = [each for each in ended.err.splitlines() if each.startswith(("error: ", "Error: "))]
            if len(lines) != 1:
                problems.append(f"{len(lines)} lines of error")
            problems += _changed(before, folder)
        return [f"shoestring {line}: {problem}: {_brief(ended)}" for problem in problems]


_READ: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("run/recipe.yaml", ("train run/recipe.yaml --dry-run", "report run", "recipes run/recipe.yaml")),
    ("run/recipe.yaml", ("train run --resume --dry-run", "evaluate run --prompts 1 --seeds 1 --steps 1")),
    ("run/metrics.jsonl", ("report run", "compare run run")),
    ("run/ledger.json", ("report run", "compare run run")),
    ("run/previews/*", ("report run",)),
    ("run/pipeline/*.json", ("sample run/pipeline x --out new --steps 1",)),
    ("run/pipeline/*/*.json", ("sample run/pipeline x --out new --steps 1",)),
    ("run/pipeline/*/*.safetensors", ("sample run x --out new --steps 1", "convert run new.safetensors")),
    ("store/*.json", ("store info store", "store verify store", "encode pictures --out store --size 16")),
    ("store/chunks/*", ("store info store", "store verify store")),
    ("half/begun.json", ("encode pictures --out half --size 16 --chunk-rows 5",)),
    ("half/chunks/*", ("encode pictures --out half --size 16 --chunk-rows 5",)),
    (f"half/{WORK}/*", ("encode pictures --out half --size 16 --chunk-rows 5",)),
    (
        "pictures/*",
        (
            "encode pictures --out new --size 16 --max-bad 0.5",
            "encode pictures --out new --size 16 --max-bad 0",
        ),
    ),
    ("table/metadata.jsonl", ("encode table --out new --size 16 --max-bad 0.5",)),
    ("csv/metadata.csv", ("encode csv --out new --size 16 --max-bad 0.5",)),
    ("rows.parquet", ("encode rows.parquet --out new --size 16 --max-bad 0.5",)),
)
"""Files, and commands that read them."""

_JUNK = (
    *(
        "",
        " ",
        "null",
        "~",
        "true",
        "nan",
        "-.inf",
        ".nan",
        "1e999",
        "-1",
        "0",
        "-0.0",
        "1e-400",
        "0x1F",
        "0o7",
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        "[1, 2",
        "{a: 1",
        "{a: {b: {c: 1}}}",
        "'",
        '"',
        "\\",
        "%",
        "*a",
        "&a",
        "&a [*a]",
        "!x y",
    ),
    *(
        "!!python/object/apply:os.system [ls]",
        "!!binary aGk=",
        "2024-01-01",
        "1:30",
        "1_000",
        "9" * 400,
        "[" * 999,
    ),
    *(
        "a\nb: c",
        "\t",
        "\0",
        "\x1b[31m",
        "\u202e",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ),
    *(
        "../..",
        "/",
        "/dev/null",
        "~root",
        "$HOME",
        "-",
        "--help",
        "=",
        "==",
        "a=b",
        ".",
        "..",
        "50k",
        "1.5",
        "1e12",
    ),
    *(
        "same",
        "fresh",
        "yes",
        "None",
        "ddp",
        "adamw",
        "edm",
        "flow",
        "x0",
        "microdit",
        "[a, b]",
        "[0.5, 0.5]",
    ),
    *(
        "123456789012345678901234567890",
        "-9223372036854775809",
        "3.0000000000000001",
        "0.9999999999999999999",
    ),
)


def _junk_value(chance: random.Random) -> str:
    value = chance.choice(_JUNK)
    return value if chance.random() < 0.8 else value + chance.choice(_JUNK)


def _junk_bytes(content: bytes, chance: random.Random) -> bytes:
    """Content with a change: bits, a stretch gone, twice, or exchanged; words of formats put in."""
    at = chance.randint(0, len(content))
    upto = min(len(content), at + chance.choice((1, 4, 64, 1 << 20)))
    kind = chance.choice(("bit", "bit", "gone", "twice", "random", "word", "word", "number", "all"))
    if kind == "bit" and at < len(content):
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    if kind == "gone":
        return content[:at] + content[upto:]
    if kind == "twice":
        return content[:upto] + content[at:]
    if kind == "random":
        return content[:at] + chance.randbytes(upto - at) + content[upto:]
    if kind == "number":  # a number or name becomes another value
        parts = content.split(b" ")
        parts[chance.randrange(len(parts))] = _word(chance)
        return b" ".join(parts)
    return _word(chance) if kind == "all" else content[:at] + _word(chance) + content[at:]


def _word(chance: random.Random) -> bytes:
    return chance.choice(_JUNK).encode("utf-8", "replace")


def _resolved(name: str) -> list[Any]:
    return [yaml.safe_load(dump(recipe)) for recipe in load_stages(name).values()]


def _leaves(value: Any, path: str = "") -> Iterable[str]:
    """Every key of a recipe, sections' too."""
    if path:
        yield path
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return
    for key, each in items:
        yield from _leaves(each, f"{path}.{key}".lstrip("."))


def _make_tables(world: Path) -> None:
    """The same pictures with captions in a table of each kind."""
    names = [f"{number:03d}.png" for number in range(_PICTURES)]
    for kind in ("table", "csv"):
        shutil.copytree(world / "pictures", world / kind, ignore=shutil.ignore_patterns("*.txt"))
    rows = [{"file_name": name, "text": f"picture {name}"} for name in names]
    (world / "table" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    (world / "csv" / "metadata.csv").write_text("\n".join(lines) + "\n")
    images = [{"bytes": (world / "pictures" / name).read_bytes(), "path": name} for name in names]
    table = pa.table({"image": images, "text": [row["text"] for row in rows]})
    pq.write_table(table, world / "rows.parquet")


def _put(path: Path, content: Content) -> None:
    """Write a file (a folder for None) where there may be another thing."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _state(folder: Path) -> Mapping[str, Any]:
    """When each file below a folder changed last, and what folders are empty.

    The claim of a training that was refused stays in the folder of its run, and means nothing by itself.
    """
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not any(path.iterdir()):
            found[name] = "empty"
        elif path.is_file() and path.name != ".claim":
            found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def _changed(before: Mapping[str, Any], folder: Path) -> list[str]:
    """Files that are not as they were. What is new in a store that was begun may stay: one goes on there."""
    after = _state(folder)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    stores = {path.parent.name for path in folder.glob("*/begun.json")}
    names = [name for name in names if name in before or name.split("/")[0] not in stores]
    return [f"refused, but changed {', '.join(names[:6])}"] if names else []


def _brief(ended: Ended) -> str:
    return f"code {ended.code}, {ended.err[-600:]!r}"
