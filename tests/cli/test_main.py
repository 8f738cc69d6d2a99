"""The command line's frame: exit codes, one line for a user's mistake, a traceback only when asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from shoestring import __version__
from shoestring.cli import main as cli
from shoestring.errors import CorruptStoreError, RecipeError, TrainingDiverged
from shoestring.recipes.load import builtin_names, dump, load_recipe


def run(*arguments: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def command(monkeypatch: pytest.MonkeyPatch, function: Callable[[], None]) -> None:
    """Put `function` in the place of the command `report`."""
    module = ModuleType("shoestring.cli.report")
    module.report = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shoestring.cli.report", module)


def fails_with(error: BaseException) -> Callable[[], None]:
    def report() -> None:
        raise error

    return report


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out and summary in out for name, summary in cli.COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"shoestring {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["--frobnicate"], ["recipes", "--frobnicate"], ["recipes", "a", "b"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error: " in captured.err
    assert "Traceback" not in captured.err


def test_misspelt_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    run("recpes")
    assert "Did you mean 'recipes'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("a\nb"), 2), (CorruptStoreError("a b"), 2), (TrainingDiverged("a b"), 1)],
)
def test_expected_error_is_one_line_and_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, fails_with(error))
    assert run("report") == code
    assert capsys.readouterr() == ("", "error: a b\n")


def test_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "0")  # restored afterwards
    command(monkeypatch, fails_with(RecipeError("a b")))
    assert run("report") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run("--traceback", "report") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("\nerror: a b\n")


def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, fails_with(KeyboardInterrupt()))
    assert run("report") == 130


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, fails_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


def test_recipes_lists_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == builtin_names()


def test_recipes_prints_one_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "microdit-tiny", "--set", "seed=3") == 0
    assert capsys.readouterr().out == dump(load_recipe("microdit-tiny", ["seed=3"]))


def test_recipes_with_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "demo", "--set", "model.depht=3") == 2
    assert capsys.readouterr().err == "error: --set model.depht: unknown key. Did you mean 'depth'?\n"


def test_module_and_script_are_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoestring", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: shoestring ")
