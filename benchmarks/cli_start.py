"""Claim: `shoestring --help` answers in under 0.3 s, since it imports neither torch nor pydantic.

Prints one JSON line. `--tiny` times fewer runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

LIMIT = 0.3


def seconds(*arguments: str) -> float:
    """Wall time of one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time the command and, for comparison, an empty interpreter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="5 runs instead of 30")
    runs = 5 if parser.parse_args().tiny else 30
    seconds("-m", "shoestring", "--help")  # fills the file cache and writes bytecode
    times = [seconds("-m", "shoestring", "--help") for _ in range(runs)]
    python = statistics.median(seconds("-c", "pass") for _ in range(runs))
    median = statistics.median(times)
    figures = {
        "benchmark": "cli_start",
        "command": "shoestring --help",
        "runs": runs,
        "median_seconds": round(median, 4),
        "worst_seconds": round(max(times), 4),
        "python_alone_seconds": round(python, 4),
        "limit_seconds": LIMIT,
        "holds": median < LIMIT,
        "machine": f"{platform.machine()} x {os.cpu_count()}, Python {platform.python_version()}",
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
