"""`shoestring recipes`: the built-in recipes, one line each, or one of them resolved."""

from __future__ import annotations

from typing import Annotated

import typer

from shoestring.recipes import load


def recipes(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A built-in recipe or a YAML file; leave out to list."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in `shoestring train`."),
    ] = None,
) -> None:
    """List the built-in recipes, or print one with every key resolved."""
    if recipe is not None:
        stages = load.load_stages(recipe, set_ or ())
        typer.echo("---\n".join(load.dump(each) for each in stages.values()), nl=False)
        return
    names = load.builtin_names()
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:{width}}  {load.describe(name)}")
