"""Networks on the hub: what is downloaded of a repository, and what is used without a connection."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shoestring.errors import CheckpointError
from shoestring.models.network_files import components, download_file, find_network
from tests.pipelines.test_unet import scenes

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that its client needs to list and download the files below `root`."""

    def __init__(self, root: Path, *rest: Any) -> None:
        self.root = root
        super().__init__(*rest)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "tree" in parts:
            self.answer(json.dumps([self.described(path) for path in self.files()]).encode())
        elif parts[:2] == ["api", "models"]:
            siblings = [{"rfilename": path.relative_to(self.root).as_posix()} for path in self.files()]
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            path = self.root / "/".join(parts[4:])
            self.answer(path.read_bytes() if path.is_file() else None)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def described(self, path: Path) -> dict[str, Any]:
        return {
            "type": "file",
            "path": path.relative_to(self.root).as_posix(),
            "size": path.stat().st_size,
            "oid": sha256(path.read_bytes()).hexdigest()[:40],
        }

    def answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing to the console."""


@pytest.fixture
def repository(sdxl_folder: Path, tmp_path: Path) -> Path:
    """SDXL as it lies on the hub: networks in two precisions and formats, the U-Net's weights in shards."""
    root = tmp_path / "repository"
    shutil.copytree(sdxl_folder, root)
    for path in [*root.glob("*/*.safetensors")]:
        save_file(load_file(path), path.with_suffix(".fp16.safetensors"))
        path.with_suffix(".bin").write_bytes(b"a pickle")
    unet = root / "unet"
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    shards = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    places = {name: shards[number % 2] for number, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, unet / shard)
    index = {"metadata": {}, "weight_map": places}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, root / "sd_xl_base.safetensors")
    (root / "README.md").write_text("# SDXL")
    return root


@contextmanager
def served(repository: Path) -> Iterator[dict[str, str]]:
    """Within: what tells a process of a hub that holds a folder as owner/name, and of an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repository))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, home = f"http://127.0.0.1:{server.server_port}", repository.parent / "home"
    try:
        yield os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(home)}
    finally:
        server.shutdown()
        server.server_close()


SCRIPT = """
import json, sys
from shoestring.models.network_files import components, download_file, find_network

def here(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

found = find_network("owner/name")
first = here(found.root)
names = len(found.tensors())
parts = components(found)
after = here(found.root)
single = download_file("owner/name/sd_xl_base.safetensors").name
print(json.dumps({"part": found.part, "first": first, "names": names, "parts": parts,
                  "after": after, "single": single}))
"""


def test_of_a_repository_no_more_is_downloaded_than_is_used(repository: Path) -> None:
    with served(repository) as environment:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    network = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    assert told["part"] == "unet"
    assert set(told["first"]) == network
    assert told["names"] == len(load_file(repository / "sd_xl_base.safetensors"))
    added = set(told["after"]) - network
    assert {name.split("/")[0] for name in added} == set(told["parts"]) - {"scheduler"}
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"} <= added
    assert not [name for name in added if ".fp16." in name or name.endswith(".bin")]
    assert told["single"] == "sd_xl_base.safetensors"


def test_without_a_connection_an_earlier_download_is_taken(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--owner--name"
    shutil.copytree(sdxl_folder, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    found = find_network("owner/name")
    assert found.path == folder / "snapshots" / COMMIT / "unet"
    assert set(components(found)) >= {"vae", "text_encoder", "text_encoder_2", "scheduler"}
    shutil.rmtree(found.root / "vae")
    with pytest.raises(
        CheckpointError, match=r"its model_index\.json names vae, and there is no such folder"
    ):
        components(found)
    for asked in (partial(find_network, "owner/other"), partial(find_network, "owner/name", revision="v2")):
        with pytest.raises(CheckpointError, match="neither a folder here nor a hub repository"):
            asked()


def test_settings_of_a_pipeline_are_no_parts_of_it(tmp_path: Path) -> None:
    """Lists among them: statistics of its latents, of two channels even, and diffusers' own of files."""
    pipeline = scenes(latents_mean=[0.1, -0.2, 0.3], latents_std=[1.0, 2.0, 3.0])
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    odd = {"sides": [16, 16], "nothing": [], "_ignore_files": ["a.bin", "b.bin"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | odd))
    there = {name for name, part in pipeline.components.items() if part is not None}
    assert set(components(find_network(tmp_path))) == there - {"unet"}


def test_a_file_that_is_nowhere_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        download_file("model.safetensors")
    with pytest.raises(CheckpointError, match=r"\./a/b\.safetensors: no such file"):
        download_file("./a/b.safetensors")
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub repository"):
        download_file("owner/name/model.safetensors")
