"""The `shoestring` command: finds the subcommand, and turns errors into one line and an exit code.

Only the module of the command that is called is imported, so that `shoestring --help` needs neither torch
nor pydantic. Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from shoestring import __version__
from shoestring.errors import ShoestringError

COMMANDS = {
    "demo": "Train a small model on a CPU in minutes, score it, report.",
    "encode": "Encode captioned images, or scenes, into a store.",
    "store": "Show a store (info), check it (verify), copy it, add to it.",
    "train": "Train a model by a recipe, or resume a run.",
    "sample": "Make pictures from prompts.",
    "evaluate": "Measure a run: exact scene accuracy, loss on held-out images.",
    "report": "Write a run's report.html: curves, pictures, scores, cost.",
    "compare": "Compare runs: curves, differences, scores, cost: compare.html.",
    "average": "Average the weights of several runs into one pipeline.",
    "compress": "Cut a U-Net or a transformer to a smaller student.",
    "convert": "A published MicroDiT checkpoint to a pipeline folder, or back.",
    "convert-lora": "A LoRA of a teacher to one of its student.",
    "recipes": "List the built-in recipes, or print one resolved.",
}
"""Each command in its own module of this folder, as a function (or a group of subcommands) of its name."""

TRACEBACK = "SHOESTRING_TRACEBACK"

TALKATIVE = ("torchao", "diffusers.quantizers.torchao", "torch.utils._pytree")
"""Loggers that tell every command what torchao could not load; diffusers imports it where it is installed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends by raising `SystemExit`, but for mistakes of our own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "WORLD_SIZE" in os.environ:  # torch's remarks would come from every process; its errors stay
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        _run(arguments)
    except SystemExit as done:
        if "WORLD_SIZE" in os.environ:
            from shoestring.processes import end

            end(done.code if isinstance(done.code, int) else int(done.code is not None))
        raise


def _run(arguments: Sequence[str]) -> None:
    try:
        make_app(arguments)(args=arguments, prog_name="shoestring")
    except ShoestringError as error:
        if os.environ.get(TRACEBACK, "0") not in {"", "0"}:
            traceback.print_exc()
        _say_once(error)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from shoestring.processes import lost_another

        if _say_once(error) and not lost_another(error):
            traceback.print_exc()
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _say_once(error: Exception) -> bool:
    """Print an error as one line, unless another process of the run says the cause; whether it was said."""
    if "WORLD_SIZE" in os.environ:
        from shoestring.processes import explained

        text = explained(error)
    else:
        text = " ".join(str(error).split())
    if text is not None:
        typer.echo(f"error: {text}", err=True)
    return text is not None


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The application: the command that `arguments` call in full, the others by name and summary."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_options)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name != called:
            app.command(name, help=summary, short_help=summary)(_not_called)
            continue
        module = name.replace("-", "_")
        command = getattr(import_module(f"shoestring.cli.{module}"), module)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=summary)
        else:
            app.command(name, short_help=summary)(command)
    return app


def _not_called() -> None:
    """Stands for a command that these arguments do not call; it is only listed."""


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=lambda on: _version(on))
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.", envvar=TRACEBACK)
    ] = False,
) -> None:
    """Text-to-image diffusion on a shoestring budget: train, compress and run.

    Start with `shoestring demo`. Every command explains itself: `shoestring train --help`.
    """
    if show_traceback:
        os.environ[TRACEBACK] = "1"  # and in processes that the command starts


def _version(on: bool) -> None:
    if on:
        typer.echo(f"shoestring {__version__}")
        raise typer.Exit
