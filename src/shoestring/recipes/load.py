"""Reading recipes: YAML, one `base:`, `--set key=value`, and errors that name the file, the key and the cure.

    builtin or file <- base      file      --set (all of them are one layer)
          lowest layer    <-    next   <-    last

A later layer wins key by key. Three exceptions: a list is replaced whole, unless the layer gives a mapping
from item numbers (`phases: {0: {images: 1k}}`); a section that gets another `kind` is replaced whole;
`data.store` and `data.scenes` displace each other.

A recipe with `stages:` is several recipes that are trained in order: each stage is a layer on top of all the
rest, runs under NAME-STAGE, and `stage:a` in it stands for the run of stage a.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shoestring.errors import RecipeError
from shoestring.recipes.messages import did_you_mean, nearest, requirement, shown
from shoestring.recipes.schema import Recipe

_STAGE = re.compile(r"[a-z][a-z0-9_]*")

Path_ = tuple[str | int, ...]
"""Where in a recipe: ("phases", 0, "lr")."""


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a built-in name or a YAML file, with `--set` assignments on top.

    Raises `RecipeError` with one line that names the file (or `--set`), the key, and what is allowed; also
    for a recipe of several stages.
    """
    stages = load_stages(name_or_path, sets)
    if set(stages) != {""}:
        raise RecipeError(f"recipe {name_or_path}: has stages: {', '.join(stages)}. Choose one with --stage.")
    return stages[""]


def load_stages(
    name_or_path: str | Path, sets: Sequence[str] = (), runs: Path = Path("runs")
) -> dict[str, Recipe]:
    """The resolved recipes of all stages by their names, in order; {"": recipe} where there are no stages.

    `runs` is the folder that holds their runs.
    """
    layers = _Layers()
    for label, values in reversed(_chain(str(name_or_path))):
        layers.add(values, label)
    assigned = _assignments(sets)
    if assigned:
        layers.add(assigned, "--set")
    return {stage: part.recipe() for stage, part in layers.stages(runs, assigned).items()}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every key; `load_recipe` reads it back equal."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def builtin_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("shoestring.recipes") / "builtin"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def describe(name: str) -> str:
    """What a built-in recipe is, in one line: the comment that its file begins with."""
    return _builtin(name).splitlines()[0].removeprefix("#").strip()


def changed_keys(
    old: Recipe, new: Recipe, *, only: Sequence[str] = ("*",), but: Sequence[str] = ()
) -> list[str]:
    """Each key whose value differs, as "phases.0.lr: 0.001 -> 0.002"; empty for equal recipes.

    `only` and `but` are patterns such as "train.*": keys that are asked for, and keys that are not.
    """
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [
        f"{key}: {shown(before.get(key))} -> {shown(after.get(key))}"
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key) != after.get(key) and _matches(key, only) and not _matches(key, but)
    ]


class _Layers:
    """Values merged so far, and which layer last touched each place."""

    def __init__(self) -> None:
        self.values: Any = {}
        self.prefix: Path_ = ()  # where in the file these values stand: ("stages", "a")
        self.origins: dict[Path_, str] = {(): "recipe"}

    def add(self, values: Mapping[str, Any], label: str) -> None:
        """Put one layer on top."""
        data = values.get("data")
        if isinstance(data, dict) and data.get("store") is not None and data.get("scenes") is not None:
            raise RecipeError(f"{_place(label, ('data',))}: has both store and scenes. Keep one of them.")
        if label != "--set":
            self.origins[()] = label
        self.values = self._merged(self.values, values, (), label)

    def _merged(self, old: Any, new: Any, path: Path_, label: str) -> Any:
        if path:
            self.origins[path] = label
        if not isinstance(new, dict):
            return new
        if isinstance(old, list):
            return self._edited(old, new, path, label)
        old = dict(old) if isinstance(old, dict) else {}
        if "kind" in old and new.get("kind", old["kind"]) != old["kind"]:
            old = {}
        if path == ("data",):
            for mine, other in (("store", "scenes"), ("scenes", "store")):
                if new.get(mine) is not None:
                    old.pop(other, None)
        for key, value in new.items():
            old[key] = self._merged(old.get(key), value, (*path, key), label)
        return old

    def _edited(self, items: list[Any], edits: dict[Any, Any], path: Path_, label: str) -> list[Any]:
        """A list with some items replaced or merged by their number."""
        items = list(items)
        for key, value in edits.items():
            number = int(key) if str(key).isdecimal() else len(items)
            if number >= len(items):
                numbers = f"0 to {len(items) - 1}" if len(items) > 1 else "0"
                raise RecipeError(
                    f"{_place(label, (*path, key))}: no such item. {_dotted(path)} has items {numbers}."
                )
            items[number] = self._merged(items[number], value, (*path, number), label)
        return items

    def recipe(self) -> Recipe:
        """The merged values, checked."""
        try:
            return Recipe.model_validate(self.values)
        except ValidationError as error:
            raise self.explained(error) from None

    def stages(self, runs: Path, assigned: Mapping[str, Any]) -> dict[str, _Layers]:
        """The layers of each stage; of the recipe itself, under an empty name, where it has no stages.

        What was `assigned` with `--set` lies on top of every stage: first what is for all, then its own.
        """
        if not isinstance(self.values, dict) or "stages" not in self.values:
            return {"": self}
        shared = {key: value for key, value in self.values.items() if key != "stages"}
        stages, place = self.values["stages"], _place(self._origin(("stages",)), ("stages",))
        if not isinstance(stages, dict) or not stages:
            raise RecipeError(f"{place}: must be a section with a recipe for each stage, in order.")
        everywhere = {key: value for key, value in assigned.items() if key not in {"stages", "name"}}
        found: dict[str, _Layers] = {}
        for name, values in stages.items():
            if not isinstance(values, dict) or not _STAGE.fullmatch(str(name)):
                raise RecipeError(f"{place}.{name}: must be a name in small letters, and a section of keys.")
            part = found[str(name)] = _Layers()
            part.origins |= {path: label for path, label in self.origins.items() if path[:1] != ("stages",)}
            part.values = part._merged(shared, values, (), self.origins[()])
            part.values["name"] = f"{shared['name']}-{name}"
            part.origins |= {
                path[2:]: label for path, label in self.origins.items() if path[:2] == ("stages", name)
            }
            for own in (everywhere, assigned.get("stages", {}).get(str(name), {})):
                part.values = part._merged(part.values, own, (), "--set")
            part.prefix = ("stages", str(name))
            runs_before = {each: runs / f"{shared['name']}-{each}" for each in found if each != str(name)}
            part.values = _with_runs(part.values, runs_before, f"{place}.{name}")
        return found

    def explained(self, error: ValidationError) -> RecipeError:
        """The first mistake that pydantic found, unknown keys before all others, in our words."""
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        first = problems[0]
        if first["type"] == "recipe":  # a check between keys: the fault of the topmost layer
            context = first["ctx"]
            path: Path_ = tuple(
                int(part) if part.isdecimal() else part for part in context["path"].split(".")
            )
            label = self._origin(path) if self._origin(path) == "--set" else self.origins[()]
            return RecipeError(f"{_place(label, (*self.prefix, *path))}: {context['message']}")
        path = _real_path(first["loc"], self.values)
        others = [_real_path(problem["loc"], self.values) for problem in problems]
        count = sum(path[: len(other)] != other for other in others)
        more = f" (and {count} more)" if count else ""
        where = _place(self._origin(path), (*self.prefix, *path))
        return RecipeError(f"{where}: {self._message(first, path)}{more}")

    def _message(self, problem: Mapping[str, Any], path: Path_) -> str:
        kind, context, given = problem["type"], problem.get("ctx", {}), problem.get("input")
        if kind == "extra_forbidden":
            return f"unknown key.{did_you_mean(str(path[-1]), _fields_at(path[:-1], self.values))}"
        if kind == "missing" and isinstance(problem["loc"][-1], int):
            return f"{shown(given)} is not allowed: has too few items."
        if kind == "missing":
            return "missing. Add it, or name a recipe that has it as `base:`."
        if kind == "union_tag_not_found":
            return f"has no kind. Allowed: {_kinds(path, self.values)}."
        if kind == "union_tag_invalid":
            return f"kind {shown(context['tag'])} is unknown. Allowed: {_kinds(path, self.values)}."
        if kind == "literal_error":
            choices = [choice.strip(" '") for choice in context["expected"].replace(" or ", ", ").split(",")]
            return f"{shown(given)} is unknown.{did_you_mean(str(given), choices)}"
        return f"{shown(given)} is not allowed: {requirement(problem)}."

    def _origin(self, path: Path_) -> str:
        """The layer that set the place, or else what holds it."""
        return next(self.origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.origins)


def _with_runs(value: Any, runs: Mapping[str, Path], label: str) -> Any:
    """A copy of `value` in which `stage:a` has become the run of stage a; only earlier stages have one."""
    if isinstance(value, dict):
        return {key: _with_runs(each, runs, label) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_runs(each, runs, label) for each in value]
    if not isinstance(value, str) or not value.startswith("stage:"):
        return value
    stage = value.removeprefix("stage:")
    if stage not in runs:
        raise RecipeError(f"{label}: {value} names no earlier stage.{did_you_mean(stage, runs)}")
    return str(runs[stage])


def _chain(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, values) of a recipe and its ancestors, nearest first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: list[str] = []
    folder: Path | None = Path()
    base: str | None = name
    while base is not None:
        path, text = _read(base, folder, chain[-1][0] if chain else None)
        identity = base if path is None else str(path.resolve())
        label = f"recipe {base if path is None else path.name}"
        if identity in seen:
            names = " -> ".join([*(Path(each).name for each in seen), Path(identity).name])
            raise RecipeError(f"{label}, base: goes round in a circle: {names}. Remove one `base:`.")
        seen.append(identity)
        values = _parsed(text, label)
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise RecipeError(f"{label}, base: {shown(base)} is not allowed: must be one name or path.")
        values.setdefault("name", Path(identity).stem if path is not None else name)
        folder = None if path is None else path.parent
        chain.append((label, values))
    return chain


def _read(name: str, folder: Path | None, child: str | None) -> tuple[Path | None, str]:
    """(path, text) of a recipe, sought in `folder`; the path is None for a built-in one."""
    if name in builtin_names():
        return None, _builtin(name)
    place = f"{child}, base: " if child else ""
    path = (folder or Path()) / name
    try:
        return path, path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        names = builtin_names()
        raise RecipeError(
            f"{place}recipe {path}: no such file.{nearest(name, names)} "
            f"Built-in recipes: {', '.join(names)}; or give the path of a YAML file."
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"{place}recipe {path}: is a folder. Give a YAML file, such as {path}/recipe.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{place}recipe {path}: cannot be read ({error}).") from None


def _builtin(name: str) -> str:
    return (resources.files("shoestring.recipes") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")


def _parsed(text: str, label: str) -> dict[str, Any]:
    try:
        values = _loaded(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "unreadable"
        raise RecipeError(f"{label}{line}: not valid YAML ({reason}).") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{label}: must be a mapping of keys such as data, model and phases.")
    return values


def _loaded(text: str) -> Any:
    """The value of a YAML text; raises `yaml.YAMLError` for one that is none, has no end, or holds itself."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str, skipkeys=True)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise yaml.MarkedYAMLError(problem=reason) from None
    return value


def _assignments(sets: Sequence[str]) -> dict[str, Any]:
    """`["phases.0.lr=1e-3"]` -> {"phases": {"0": {"lr": "1e-3"}}}, one layer."""
    layer: dict[str, Any] = {}
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not all([*parents, last]):
            raise RecipeError(
                f"--set {assignment}: not an assignment. Write key=value, such as train.keep=3."
            )
        if (parents or [last])[0] == "base":
            raise RecipeError(f"--set {assignment}: base cannot be set. Name another recipe instead.")
        place = layer
        for part in parents:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {assignment}: {part} was given a value by an earlier --set.")
        try:
            place[last] = _loaded(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {assignment}: {text!r} is not valid YAML. Quote it.") from None
    return layer


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which one would have no effect."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [child.value for child, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number] and key != "<<":
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, all else in blocks."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        flat = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _real_path(location: tuple[str | int, ...], values: Any) -> Path_:
    """Pydantic's location without the names of union members, which are no keys of the recipe."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)):
            values = values[part]
            path.append(part)
        elif isinstance(values, dict) and number == len(location) - 1:  # a key that is missing
            path.append(part)
    return tuple(path)


def _models_at(path: Path_, values: Any) -> list[type[BaseModel]]:
    """The sections that the schema allows at a place, narrowed by `kind` where there are several."""
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        values = values[part]
        if isinstance(part, str):
            models = [inner for model in models for inner in _models_in(model.model_fields[part])]
    kind = values.get("kind") if isinstance(values, dict) else None
    narrowed = [
        model
        for model in models
        if "kind" in model.model_fields and model.model_fields["kind"].default == kind
    ]
    return narrowed or models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]


def _fields_at(path: Path_, values: Any) -> list[str]:
    return sorted({field for model in _models_at(path, values) for field in model.model_fields})


def _kinds(path: Path_, values: Any) -> str:
    models = _models_at(path[:-1], values)
    inner = [each for model in models for each in _models_in(model.model_fields[str(path[-1])])]
    return ", ".join(str(model.model_fields["kind"].default) for model in inner)


def _place(label: str, path: Path_) -> str:
    separator = " " if label == "--set" else ", "
    return f"{label}{separator}{_dotted(path)}" if path else label


def _dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _leaves(values: Any, path: Path_ = ()) -> dict[str, Any]:
    """Dotted key -> value of everything that is no section; lists of plain values count as one."""
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {_dotted(path): values}
    if not values:
        return {_dotted(path): values}
    return {
        key: leaf for name, value in values.items() for key, leaf in _leaves(value, (*path, name)).items()
    }
