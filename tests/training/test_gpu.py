"""The loop on a GPU: bfloat16, a checkpoint, and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.cli.main import main
from shoestring.storage import read_json

TINY = Path(__file__).resolve().parents[1] / "cli" / "tiny.yaml"


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_on_a_gpu_trains_in_bfloat16_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Resuming from its newest checkpoint, the optimisers' state is where the weights are."""
    monkeypatch.chdir(tmp_path)
    words = ["train", str(TINY), "--name", "gpu", "--device", "cuda", "--dtype", "bfloat16"]
    words += ["--set", f"optimizer.kind={optimizer}"]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code in (0, None)
    newest = max((tmp_path / "runs" / "gpu" / "checkpoints").iterdir())
    (newest / "COMMITTED").unlink()
    with pytest.raises(SystemExit) as resumed:
        main([*words, "--resume"])
    assert resumed.value.code in (0, None)
    assert read_json(tmp_path / "runs" / "gpu" / "ledger.json")["dtype"] == "bfloat16"
