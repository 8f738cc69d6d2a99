"""The ledger adds up, survives JSON, and keeps the machine's facts of now."""

from __future__ import annotations

import json
from pathlib import Path

from shoestring.cost.ledger import Ledger


def filled() -> Ledger:
    ledger = Ledger("cpu x 2", "cpu", 1, "float32", 1000)
    for name, images, memory in (("masked", 40, 7_000), ("dense", 60, 5_000)):
        phase = ledger.phase(name, 32, 0.5 if name == "masked" else 0.0)
        phase.images += images
        phase.steps += images // 20
        phase.flops += 10.0 * images
        phase.seconds += images / 100
        phase.process_seconds += images / 50
        phase.data_wait_seconds += 0.125
        phase.peak_memory_bytes = memory
    ledger.spend("checkpoint_seconds", 1.0)
    ledger.spend("checkpoint_seconds", 0.5)
    return ledger


def test_totals_are_sums_and_memory_is_the_highest_peak() -> None:
    total = filled().to_json()["total"]
    assert total == {
        "images": 100,
        "steps": 5,
        "flops": 1000.0,
        "seconds": 1.0,
        "process_seconds": 2.0,
        "data_wait_seconds": 0.25,
        "peak_memory_bytes": 7_000,
    }
    assert (filled().flops, filled().seconds) == (1000.0, 1.0)
    assert filled().extra == {"checkpoint_seconds": 1.5}


def test_a_phase_asked_for_again_is_the_same_entry() -> None:
    ledger = filled()
    assert ledger.phase("masked", 32, 0.5) is ledger.phases[0]
    assert [phase.name for phase in ledger.phases] == ["masked", "dense"]


def test_a_resumed_ledger_goes_on_from_the_costs_on_the_machine_of_now(tmp_path: Path) -> None:
    filled().write(tmp_path / "ledger.json")
    resumed = Ledger("other cpu x 64", "cuda", 8, "bfloat16", 1000)
    saved = json.loads((tmp_path / "ledger.json").read_text())
    saved["phases"][0]["a key of a later version"] = 1
    resumed.restore(saved)
    assert resumed.phases == filled().phases
    assert resumed.extra == filled().extra
    assert (resumed.hardware, resumed.threads) == ("other cpu x 64", 8)
    resumed.phase("dense", 32, 0.0).images += 1
    assert resumed.to_json()["total"]["images"] == 101


def test_an_empty_ledger_is_all_noughts() -> None:
    total = Ledger("", "", 0, "", 0).to_json()["total"]
    assert set(total.values()) == {0}
