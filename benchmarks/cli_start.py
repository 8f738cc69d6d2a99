"""Claim: `shoestring --help` answers in under 0.3 s, since it imports neither torch nor pydantic.

python benchmarks/cli_start.py [--tiny]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from functools import partial

from parts.figures import alternated, tell

LIMIT = 0.3


def run(*arguments: str) -> None:
    """One fresh process."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Time the command and, for comparison, an empty interpreter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="5 runs instead of 30")
    runs = 5 if parser.parse_args().tiny else 30
    works = {"help": partial(run, "-m", "shoestring", "--help"), "python_alone": partial(run, "-c", "pass")}
    median = alternated(works, runs)
    settings = {"runs": runs, "python": platform.python_version()}
    tell("cli_start", "help", median["help"], "s", limit=LIMIT, holds=median["help"] < LIMIT, **settings)
    tell("cli_start", "python_alone", median["python_alone"], "s", **settings)


if __name__ == "__main__":
    main()
