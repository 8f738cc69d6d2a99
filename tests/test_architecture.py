"""The shape of the code: layers, sizes, frozen names, what is forbidden, and that all is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from shoestring.cli.main import COMMANDS, main
from shoestring.recipes.load import builtin_names, load_stages

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "shoestring"

ROWS = (
    ("errors", "interfaces"),
    ("runtime", "storage", "processes"),
    ("models", "objectives", "recipes"),
    ("sampling", "data"),
    ("pipelines", "distill", "cost"),
    ("training", "evaluation"),
    ("build", "server"),
    ("measure", "estimate"),
    ("cli",),
)
"""Parts of the package, lowest first: a part imports lower rows, never a neighbour in its row."""

WITHIN_MODELS = {"text_encoders", "autoencoders", "semantic_compressor"}
"""All that `data` may know of models: what encodes."""

TOP = {"__init__", "__main__"}
"""The door of the package: lazy public names and `python -m`."""

FILE_LINES = 500
LONG_FILES: dict[str, str] = {}
"""File -> reason."""

FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {
    "cli/encode.py:encode": "a command's options with their help, then one call",
    "models/microdit.py:MicroDiT.__init__": "the whole architecture in one place, one line an argument",
    "pipelines/microdit.py:MicroDiTPipeline.__call__": "diffusers' one-call protocol",
    "pipelines/wuerstchen.py:WuerstchenCombinedPipeline.__call__": "diffusers' one-call protocol",
    "pipelines/wuerstchen.py:WuerstchenCombinedPipeline.__init__": "all stages' parts and numbers",
    "pipelines/wuerstchen_decoder.py:WuerstchenDecoderPipeline.__call__": "diffusers' one-call protocol",
    "pipelines/wuerstchen_prior.py:WuerstchenPriorPipeline.__call__": "diffusers' one-call protocol",
}
"""File:function -> reason."""

NO_TORCH = ("errors.py", "cli/main.py", "recipes/")
"""Files and folders that must not import torch, nor anything that does."""

FROZEN = {
    "models/microdit.py": {"MicroDiT"},
    "models/autoencoders.py": {"PixelAutoencoder"},
    "models/text_encoders.py": {"HashingTextEncoder"},
    "models/latent_previewer.py": {"LatentPreviewer"},
    "models/semantic_compressor.py": {"SemanticCompressor"},
    "models/wuerstchen_autoencoder.py": {"WuerstchenAutoencoder"},
    "models/wuerstchen_decoder.py": {"WuerstchenDiffNeXt"},
    "models/wuerstchen_prior.py": {"WuerstchenPrior"},
    "models/wuerstchen_vqgan.py": {"PaellaVQModel"},
    "pipelines/microdit.py": {"MicroDiTPipeline"},
    "pipelines/unet.py": {"UNetPipeline"},
    "pipelines/wuerstchen.py": {"WuerstchenCombinedPipeline"},
    "pipelines/wuerstchen_decoder.py": {"WuerstchenDecoderPipeline"},
    "pipelines/wuerstchen_prior.py": {"WuerstchenPriorPipeline"},
    "sampling/edm_heun.py": {"EDMHeunScheduler"},
}
"""Names that saved pipelines hold (`model_index.json`): moving one breaks every file ever saved."""

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in FILES]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def type_checking_only(path: Path) -> set[ast.AST]:
    """Nodes below `if TYPE_CHECKING:`, which never run."""
    guards = [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {inner for guard in guards for child in guard.body for inner in ast.walk(child)}


def imports(path: Path) -> Iterator[str]:
    """Every module (or module.name) that a file imports, anywhere in it, relative ones resolved."""
    package = ("shoestring", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row_of(part: str) -> int:
    return next(number for number, parts in enumerate(ROWS) if part in parts)


def allowed(path: Path, part: str, target: list[str]) -> bool:
    """Whether a file of `part` may import shoestring.<target>."""
    other = target[0]
    if other == part:
        return True
    if part == "data" and other == "models":
        return len(target) > 1 and target[1] in WITHIN_MODELS
    if path.relative_to(PACKAGE).as_posix() == "training/loop.py":
        return row_of(other) <= 1
    return row_of(other) < row_of(part)


def definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, node) of every function and method, nested ones left to their parents."""
    stack: list[tuple[str, ast.AST]] = [("", tree(path))]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                stack.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child


def test_every_part_has_a_row() -> None:
    parts = {part_of(path) for path in FILES} - TOP
    assert parts <= {part for row in ROWS for part in row}


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    if part in TOP:
        return
    targets = [name.split(".")[1:] for name in imports(path) if name.split(".")[0] == "shoestring"]
    targets = [target for target in targets if target and target[0] not in {"__version__", *TOP}]
    wrong = [".".join(target) for target in targets if not allowed(path, part, target)]
    assert not wrong, f"{part} (row {row_of(part)}) must not import {wrong}"


@pytest.mark.parametrize("path", MODULES)
def test_file_has_a_docstring_and_fits(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    name = path.relative_to(PACKAGE).as_posix()
    assert ast.get_docstring(tree(path)), f"{name} has no docstring"
    assert lines < FILE_LINES or name in LONG_FILES, f"{name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES)
def test_functions_fit(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    for function, node in definitions(path):
        lines = node.end_lineno - node.lineno + 1
        assert lines < FUNCTION_LINES or f"{name}:{function}" in LONG_FUNCTIONS, (
            f"{function} has {lines} lines"
        )


def test_no_exception_is_stale() -> None:
    long = {
        f"{path.relative_to(PACKAGE).as_posix()}:{function}"
        for path in FILES
        for function, node in definitions(path)
        if node.end_lineno - node.lineno + 1 >= FUNCTION_LINES
    }
    assert set(LONG_FUNCTIONS) <= long
    assert all((PACKAGE / name).is_file() for name in LONG_FILES)


@pytest.mark.parametrize("path", MODULES)
def test_nothing_unsafe_is_read_and_no_foreign_code_is_run(path: Path) -> None:
    """No pickle, `torch.load` with weights_only=True alone, no trust_remote_code, no eval or exec."""
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called != "torch.load" or keywords.get("weights_only") == "True"
        assert called not in {"eval", "exec", "yaml.unsafe_load"}
        assert keywords.get("trust_remote_code", "False") == "False"
        assert keywords.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("path", MODULES)
def test_light_files_import_nothing_heavy(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith(NO_TORCH):
        heavy = {"torch", "diffusers", "transformers", "datasets", "numpy", "pandas"}
        assert not heavy & {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize(("name", "classes"), FROZEN.items())
def test_saved_names_stay_where_they_are(name: str, classes: set[str]) -> None:
    defined = {node.name for node in tree(PACKAGE / name).body if isinstance(node, ast.ClassDef)}
    assert classes <= defined


def test_models_are_flat() -> None:
    """A folder named like a diffusers pipeline would collide when a pipeline is loaded."""
    assert not [
        path for path in (PACKAGE / "models").iterdir() if path.is_dir() and path.name != "__pycache__"
    ]


def test_no_grab_bags() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes"], ["recipes", "demo"]])
def test_command_line_starts_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from shoestring.cli.main import main
try:
    main({arguments!r})
except SystemExit as done:
    assert not done.code, done.code
heavy = {{"torch", "diffusers", "transformers", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
assert {arguments!r} != ["--help"] or "pydantic" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light_and_its_names_are_there() -> None:
    code = """
import sys
import shoestring
assert "torch" not in sys.modules
for name in shoestring.__all__:
    getattr(shoestring, name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert not caught.value.code
    assert capsys.readouterr().out.startswith(f"Usage: shoestring {name} ")


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_recipe_is_valid(name: str) -> None:
    assert all(recipe.images > 0 for recipe in load_stages(name).values())


@cache
def documentation() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"\bshoestring {name}\b", documentation())


@pytest.mark.parametrize("name", builtin_names())
def test_every_recipe_is_documented(name: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", documentation())


def test_every_key_of_a_recipe_is_documented() -> None:
    reference = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    fields = [
        node.target.id
        for name in ("schema.py", "architectures.py", "losses.py")
        for node in ast.walk(tree(PACKAGE / "recipes" / name))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    missing = [name for name in fields if not re.search(rf"`{name}`|\b{name}:|^### {name}$", reference, re.M)]
    assert not missing


def test_documents_have_no_gaps_and_no_dead_links() -> None:
    """No placeholder is left in README or docs, and every relative link leads somewhere."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        assert "@@" not in text, page
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"
