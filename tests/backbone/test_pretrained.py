"""Weights and tokenizers that do not come with open_clip: from a file, a folder, or a repository of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small import WORDS, tokenizer_in

from backbone import BackboneNotFound, load_backbone

SIGLIP = "ViT-B-32-SigLIP2-256"


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small SigLIP 2 under its own architecture's name: open_clip's model with few ids, and its weights in a file."""
    config = open_clip.get_model_config(SIGLIP)
    assert config is not None
    config["text_cfg"]["vocab_size"] = len(WORDS)
    folder = tmp_path_factory.mktemp("siglip")
    (folder / f"{SIGLIP}.json").write_text(json.dumps(config))
    before = open_clip.factory._MODEL_CONFIGS[SIGLIP]
    open_clip.factory._MODEL_CONFIGS[SIGLIP] = config
    torch.manual_seed(0)
    save_file(open_clip.create_model(SIGLIP).state_dict(), folder / "weights.safetensors")
    yield folder / "weights.safetensors"
    open_clip.factory._MODEL_CONFIGS[SIGLIP] = before


def test_a_tokenizer_is_read_from_a_folder_or_beside_the_weights(siglip: Path, tmp_path: Path) -> None:
    told = load_backbone(SIGLIP, str(siglip), tokenizer=tokenizer_in(tmp_path))
    tokenizer_in(siglip.parent)
    for backbone in (told, load_backbone(SIGLIP, str(siglip))):
        tokens = backbone.tokenize(["A red, RED ball!", "a " * 64, "a " * 63])
        assert tokens.ids.shape == (3, 64) and tokens.truncated == (False, True, False)
        assert tokens.ids[0].tolist() == [4, 5, 5, 6, 1] + [0] * 59, "canonical: small letters, no punctuation"
        assert tokens.ids[1].tolist() == tokens.ids[2].tolist() == [4] * 63 + [1]
        few = backbone.tokenize(["a " * 64], words=8)
        assert few.ids[0].tolist() == [4] * 7 + [1] + [0] * 56
        with torch.inference_mode():
            expected = backbone._model.encode_text(tokens.ids)
            torch.testing.assert_close(backbone.encode_text(tokens.ids), expected, atol=1e-5, rtol=1e-5)
        assert backbone.form.resize_mode == "squash" and backbone._mean == (0.5, 0.5, 0.5), "as the published weights"


def test_a_folder_without_a_fitting_tokenizer_is_told_in_one_line(siglip: Path, tmp_path: Path) -> None:
    for folder, reason in (
        (tmp_path / "none", "tokenizer.json: .*"),
        (tokenizer_in(tmp_path / "left", padding_side="left"), "tokenizer_config.json fills up on the left"),
        (
            tokenizer_in(tmp_path / "flags", add_eos_token=False),
            "tokenizer.json and tokenizer_config.json disagree on add_eos_token",
        ),
        (tokenizer_in(tmp_path / "pad", pad_token="[PAD]"), "tokenizer_config.json names no pad_token of tokenizer.json"),
    ):
        with pytest.raises(BackboneNotFound, match=f"^{folder} holds no tokenizer of {SIGLIP}: {reason}$"):
            load_backbone(SIGLIP, str(siglip), tokenizer=folder)


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """A hub with these files, by path."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            data = files.get(self.path) if self.path != "/" else b""
            self.send_response(404 if data is None else 200)
            if data is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{len(data or b"")}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def load(address: str, home: Path, pretrained: str) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfrom backbone import load_backbone\n"
    code += f"try: b = load_backbone('ViT-S-32-alt', {pretrained!r}); print(b.fingerprint, b._mean, b.form)\n"
    code += "except ValueError as error: sys.exit(str(error))"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_weights_come_from_a_repository_of_the_hub_with_its_own_pictures(tmp_path: Path) -> None:
    model = open_clip.create_model("ViT-S-32-alt")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = {
        "model_cfg": {"quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    root = "/owner/name/resolve/main"
    files = {
        f"{root}/open_clip_config.json": json.dumps(config).encode(),
        f"{root}/open_clip_model.safetensors": (tmp_path / "weights.safetensors").read_bytes(),
    }
    with hub(files) as address:
        found = load(address, tmp_path / "home", "hf-hub:owner/name")
        missing = load(address, tmp_path / "home", "owner/none")
    assert found.returncode == 0, found.stderr
    assert "(0.5, 0.5, 0.5) Form(side=224, resize_mode='squash', interpolation='bicubic')" in found.stdout
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert missing.stderr.startswith(f"the weights of ViT-S-32-alt could not be downloaded from {address}/owner/none (")
    assert missing.stderr.endswith("without a network, give a file: --backbone ViT-S-32-alt --pretrained FILE\n")


def test_a_file_of_another_architecture_is_told_in_one_line(siglip: Path) -> None:
    for name in ("ViT-S-32-alt", "PE-Core-T-16-384"):
        with pytest.raises(BackboneNotFound, match=f"does not hold weights of {name}") as caught:
            load_backbone(name, str(siglip))
        assert "\n" not in str(caught.value)


def test_a_backbone_that_does_not_fit_in_memory_is_told_in_one_line(tmp_path: Path) -> None:
    """In a process that may have no more than it has with the libraries loaded."""
    code = (
        "import resource, sys, torch\nfrom backbone import UnsupportedBackbone, load_backbone\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20),) * 2)\n"
        "try: load_backbone('ViT-L-14', 'random')\nexcept UnsupportedBackbone as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ViT-L-14 needs more memory than there is on cpu: take a smaller one\n"
