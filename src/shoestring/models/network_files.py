"""Where a network's files lie - a run, a pipeline, a folder, the hub - and its tensors, read lazily.

folder or repository/
  model_index.json  scheduler/scheduler_config.json      of a pipeline
  unet/ or transformer/ (or the folder itself)
    config.json
    diffusion_pytorch_model.safetensors                  or .fp16., or an index of several
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.hub import fetch_file, fetch_folder, list_files
from shoestring.storage import exported, read_json

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
NETWORKS = ("unet", "transformer")

_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp16", ".bf16")
"""Of several precisions in one folder the fullest is read."""

_KEPT = (".json", ".txt", ".model", ".safetensors")
"""What a pipeline's part is made of; other formats of the same weights lie beside them on the hub."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files by name, each read (mapped) when it is asked for and not kept.

    `places` gives the file, and the name in it, of each. Raises `CheckpointError` for a damaged file.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = dict(places)
        self._files = {path: open_safetensors(path) for path in {path for path, _ in self._places.values()}}

    def __getitem__(self, name: str) -> Tensor:
        path, there = self._places[name]
        try:
            tensor: Tensor = self._files[path].get_tensor(there)
        except SafetensorError as error:
            raise damaged(path, error) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a Mapping would read the tensor


@dataclass(frozen=True)
class NetworkFolder:
    """A network's place: `root`, a pipeline's folder or its own, and `part`, where it lies below it or ""."""

    root: Path
    part: str
    given: str

    @property
    def path(self) -> Path:
        return self.root / self.part

    @property
    def in_pipeline(self) -> bool:
        """Whether a whole pipeline was given."""
        return bool(self.part) and (self.root / INDEX).is_file()

    def config(self) -> dict[str, Any]:
        """Its `config.json`, with the class's name."""
        return read_config(self.path / CONFIG)

    def kind(self) -> str:
        """The class that its `config.json` names, as diffusers does or as transformers do."""
        config = self.config()
        return str(config.get("_class_name") or (config.get("architectures") or ["nameless"])[0])

    def scheduler(self) -> dict[str, Any] | None:
        """Configuration of the scheduler beside it, where there is one."""
        homes = (
            [self.root] if self.part else [self.root, self.root.parent]
        )  # unet/ itself may have been given
        found = [home / SCHEDULER for home in homes if (home / SCHEDULER).is_file()]
        return read_config(found[0]) if found else None

    def tensors(self) -> LazyTensors:
        """Its weights; raises `CheckpointError` where they are no safetensors, damaged or not all there."""
        name = _weight_file({path.name for path in self.path.iterdir()})
        if name is None:
            raise CheckpointError(
                f"{self.given}: no {_WEIGHTS}.safetensors in {self.path}, nor an index of several. Other "
                "formats are not read; save the network with save_pretrained."
            )
        path = self.path / name
        if path.suffix == ".safetensors":
            names = list(open_safetensors(path).keys())
            return LazyTensors({each: (path, each) for each in names})
        places = {each: self.path / shard for each, shard in _shards(path).items()}
        if missing := {shard for shard in places.values() if not shard.is_file()}:
            raise CheckpointError(f"{min(missing)}: missing, though {name} names it. Download it again.")
        return LazyTensors({each: (shard, each) for each, shard in places.items()})


def find_network(
    path_or_id: str | Path, networks: Collection[str] = NETWORKS, *, revision: str | None = None
) -> NetworkFolder:
    """The folder of the network of a run (its newest export), a pipeline, a folder of its own or a hub id.

    `networks` names the parts of a pipeline to look for. Of the hub, the network's configuration and
    safetensors, the index and the scheduler are downloaded and no more; without a connection, what an earlier
    download left is taken. Raises `CheckpointError` where there is none, saying what there is.
    """
    given = str(path_or_id)
    root = exported(given) if Path(given).is_dir() else _download(given, networks, revision)
    names = {path.relative_to(root).as_posix() for path in (*root.glob("*.json"), *root.glob("*/*.json"))}
    part = _part(names, networks)
    if part is None:
        raise CheckpointError(f"{given}: {_what_instead(root, networks)}")
    return NetworkFolder(root, part, given)


def components(found: NetworkFolder, *, revision: str | None = None) -> list[str]:
    """The parts of the pipeline around a network, each a folder below `found.root`; of the hub, downloaded.

    The network itself is not among them. Raises `CheckpointError` where one is missing or empty.
    """
    index = read_config(found.root / INDEX)
    parts = [name for name in index_parts(index) if name != found.part]
    if not Path(found.given).is_dir():
        _download_parts(found.given, parts, revision)
    for name in parts:
        folder = found.root / name
        if not (folder.is_dir() and any(folder.iterdir())):
            problem = "its folder is empty" if folder.is_dir() else "there is no such folder"
            raise CheckpointError(
                f"{found.given}: its {INDEX} names {name}, and {problem}. Export or download it again."
            )
    return parts


def index_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts in a pipeline's index, {name: (library, class)}: no settings, and none left out (null)."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(each, str) for each in value)
        and not name.startswith("_")  # where diffusers says how, such as a class of one's own
    }


def download_file(name: str, revision: str | None = None) -> Path:
    """One file of a hub repository, given as OWNER/NAME/FILE; raises `CheckpointError`."""
    parts = name.split("/")
    if len(parts) < 3 or not all(parts) or parts[0] in {".", ".."}:
        raise CheckpointError(f"{name}: no such file. Give a .safetensors file, a folder or a hub id.")
    return fetch_file("/".join(parts[:2]), "/".join(parts[2:]), revision)


def open_safetensors(path: Path) -> Any:
    """An open safetensors file; raises `CheckpointError` for one that is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError`."""
    try:
        content = read_json(path)
        return {**content}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Download or export it again.") from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """What to raise for a safetensors file that cannot be read."""
    return CheckpointError(f"{path}: not a whole safetensors file ({error}). Download or export it again.")


def _part(names: Collection[str], networks: Collection[str]) -> str | None:
    """Where below a folder or repository the network lies, by the names of the files."""
    for network in networks:
        if f"{network}/{CONFIG}" in names:
            return network
    return "" if CONFIG in names and INDEX not in names else None


def _weight_file(names: Collection[str]) -> str | None:
    """The file of weights to read, or the index of several, among a network's files."""
    for variant in _VARIANTS:
        for name in (f"{_WEIGHTS}{variant}.safetensors", f"{_WEIGHTS}.safetensors.index{variant}.json"):
            if name in names:
                return name
    return None


def _shards(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index of sharded weights."""
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map. Download or export it again.")
    return {str(name): Path(str(shard)).name for name, shard in weight_map.items()}


def _download(name: str, networks: Collection[str], revision: str | None) -> Path:
    """The folder in the hub's cache that holds a repository's network and scheduler and no more."""
    try:
        files = set(list_files(name, revision))
    except CheckpointError as error:
        return _cached(name, revision, error)
    part = _part(files, networks)
    inside = f"{part}/" if part else ""
    weights = None if part is None else _weight_file({each.removeprefix(inside) for each in files})
    wanted = [INDEX, SCHEDULER] if part is None else [INDEX, SCHEDULER, inside + CONFIG]
    if weights is not None:
        wanted.append(inside + weights)
        if weights.endswith(".json"):
            index = fetch_file(name, inside + weights, revision)
            wanted += sorted({inside + shard for shard in _shards(index).values()})
    return fetch_folder(name, wanted, revision=revision)


def _download_parts(name: str, parts: Collection[str], revision: str | None) -> None:
    """Bring configurations, vocabularies and weights of some parts of a repository into the hub's cache."""
    try:
        files = list_files(name, revision)
    except CheckpointError:
        return  # not to be asked now: what is there is there
    wanted = [each for each in files if each.split("/")[0] in parts and Path(each).suffix in _KEPT]
    for variant in _VARIANTS[1:]:  # not both precisions of the same weights
        wanted = [each for each in wanted if variant not in each or each.replace(variant, "") not in wanted]
    fetch_folder(name, [*wanted, INDEX], revision=revision)


def _cached(name: str, revision: str | None, error: CheckpointError) -> Path:
    """What an earlier download left, where the hub cannot be asked now."""
    try:
        return fetch_folder(name, revision=revision, cached=True)
    except CheckpointError:
        raise error from None


def _what_instead(root: Path, networks: Collection[str]) -> str:
    """What a folder without such a network holds."""
    wanted = " or ".join(f"{network}/" for network in networks)
    if not (root / INDEX).is_file():
        return f"no network here (no config.json, no {wanted}). Give a run, a pipeline or a network's folder."
    index = read_config(root / INDEX)
    parts = [index.get(part) for part in (*NETWORKS, "prior", "decoder")]
    others = " and ".join(str(part[1]) for part in parts if isinstance(part, list) and part[1])
    return (
        f"a {index.get('_class_name')}, whose network is {others or 'of a kind not known here'}: "
        f"no {wanted} in it. Give another."
    )
