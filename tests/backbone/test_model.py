"""The frozen towers equal open_clip's own, whatever the architecture."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from backbone import Backbone, BackboneNotFound, UnsupportedBackbone, load_backbone, to_pixels

TEXTS = ["a dog runs through snow", "", "two people " * 60, "Ein Hund läuft. 🐕"]


def builtin() -> Backbone:
    return load_backbone("builtin")


@pytest.fixture
def shallow(tmp_path: Path) -> Callable[[str], str]:
    """The name of an architecture that is another's but for its depth, of two blocks a tower."""

    def known(name: str) -> str:
        config = open_clip.get_model_config(name)
        for tower in ("vision_cfg", "text_cfg"):
            config[tower]["layers"] = 2
        path = tmp_path / f"{name}-shallow.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        return path.stem

    return known


@pytest.mark.parametrize("name", ["builtin", "ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14"])
def test_without_adapter_the_outputs_are_open_clips_own(name: str, shallow: Callable[[str], str]) -> None:
    backbone = load_backbone(name) if name == "builtin" else load_backbone(shallow(name), "random")
    model = backbone._model
    side = backbone.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone._mean, backbone._std))
    with torch.inference_mode():
        pixels = torch.from_numpy(images)
        expected = model.encode_image((pixels.float() / 255 - mean) / std)
        torch.testing.assert_close(backbone.encode_frames(pixels), expected, atol=1e-5, rtol=1e-5)
        tokens = backbone.tokenize(TEXTS)
        torch.testing.assert_close(backbone.encode_text(tokens.ids), model.encode_text(tokens.ids), atol=1e-5, rtol=1e-5)
    assert backbone.encode_text(tokens.ids).dtype == torch.float32


def test_the_context_length_cuts_and_tells() -> None:
    tokens = builtin().tokenize(TEXTS)
    assert tokens.truncated == (False, False, True, False)
    assert tokens.ids.shape == (4, 77)


def test_a_text_that_just_fits_is_not_called_cut() -> None:
    backbone = builtin()
    assert backbone.tokenize(["dog " * 75, "dog " * 76]).truncated == (False, True)


def test_frames_as_floats_are_taken_as_normalised() -> None:
    backbone = builtin()
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone._mean, backbone._std))
    normalised = (pixels.float() / 255 - mean) / std
    torch.testing.assert_close(backbone.encode_frames(pixels), backbone.encode_frames(normalised), atol=1e-5, rtol=1e-5)


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\)"):
        builtin().encode_frames(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (64, 64), (65, 1000), (17, 9), (223, 224)])
def test_to_pixels_is_open_clips_own_transform(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    transform = open_clip.image_transform(64, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = (transform(picture) * 255).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(to_pixels(picture, 64), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_to_pixels_of_an_extreme_picture_resizes_no_more_than_its_middle(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized whole, a picture of 16384 x 2 pixels would be 1,835,008 pixels wide."""
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest, **more: sizes.append(size) or resize(self, size, *rest, **more),  # type: ignore[func-returns-value]
    )
    picture = np.zeros((2, 16384, 3), np.uint8)
    picture[:, 8188:8196] = (0, 200, 0)  # around the middle
    pixels = to_pixels(Image.fromarray(picture.swapaxes(0, 1) if turned else picture), 224)
    assert sizes and max(max(size) for size in sizes) <= 16 * 224
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_array_equal(pixels.max(axis=(1, 2)), [0, 200, 0])
    assert pixels[1].min() == 200


def test_weights_from_a_local_checkpoint_give_the_same_vectors(tmp_path: Path, shallow: Callable[[str], str]) -> None:
    """The path that OpenAI's weights take: `--pretrained FILE`."""
    quick, plain = shallow("ViT-B-32-quickgelu"), shallow("ViT-B-32")
    torch.manual_seed(3)
    original = open_clip.create_model(quick)
    torch.save(original.state_dict(), tmp_path / "clip.pt")
    backbone = load_backbone(quick, str(tmp_path / "clip.pt"))
    tokens = backbone.tokenize(TEXTS[:1]).ids
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode_text(tokens), original.eval().encode_text(tokens), atol=1e-5, rtol=1e-5)
    again = load_backbone(quick, str(tmp_path / "clip.pt"))
    assert again.fingerprint == backbone.fingerprint
    assert load_backbone(plain, str(tmp_path / "clip.pt")).fingerprint != backbone.fingerprint, "another activation"


def test_random_weights_come_from_their_seed() -> None:
    a, b, c = (load_backbone("ViT-S-32-alt", "random", seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_every_weight_is_frozen() -> None:
    assert not any(p.requires_grad for p in builtin()._model.parameters())


@pytest.mark.parametrize(
    ("name", "pretrained", "reason"),
    [
        ("ViT-Q-1", "random", "no backbone named"),
        ("ViT-B-32", None, "needs --pretrained"),
        ("ViT-B-32", "no-such-tag", "neither a file nor one of its tags"),
        ("ViT-B-32", "weights/clip.safetensors", "neither a file nor one of its tags"),
        ("builtin", "openai", "brings its own weights"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(name: str, pretrained: str | None, reason: str) -> None:
    with pytest.raises(BackboneNotFound, match=reason) as caught:
        load_backbone(name, pretrained)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"some": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(BackboneNotFound, match="does not hold weights"):
        load_backbone("ViT-B-32", str(tmp_path / "other.pt"))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BackboneNotFound):
        load_backbone("ViT-B-32", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-B-32"])
def test_towers_without_plain_blocks_are_refused(name: str) -> None:
    with pytest.raises((UnsupportedBackbone, BackboneNotFound)):
        load_backbone(name, "random")


@pytest.mark.parametrize("answers", [False, True], ids=["nobody is there", "it fails"])
def test_without_the_hub_one_line_tells_which_file_and_no_second_try_is_made(tmp_path: Path, answers: bool) -> None:
    asked = []

    class Failing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port if answers else 9}"
        code = "import sys\nfrom backbone import load_backbone\n"
        code += "try: load_backbone('ViT-B-32', 'openai')\nexcept ValueError as error: sys.exit(str(error))"
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        hub.shutdown()
    assert done.returncode == 1 and len(asked) == answers
    file = f"{address}/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors"
    assert done.stderr == (
        f"the weights 'openai' of ViT-B-32 could not be downloaded from {file} ({address} does not answer):"
        " without a network, give a file: --backbone ViT-B-32-quickgelu --pretrained FILE\n"
    )


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "roberta-ViT-B-32"])
def test_a_package_that_a_backbone_needs_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneNotFound, match=f"^{name} needs the package transformers: `pip install transformers`$"):
        load_backbone(name, "random")


def test_a_tokenizer_that_cannot_be_had_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub to load the files.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("backbone.load.hf_hub_download", offline)
    told = (
        r"^the tokenizer of ViT-B-16-SigLIP2 could not be had from https://.+/timm/ViT-B-16-SigLIP2 \(.+\): without a network,"
        r" name a folder with its tokenizer.json and tokenizer_config.json in POLYCLIP_TOKENIZER$"
    )
    with pytest.raises(BackboneNotFound, match=told):
        load_backbone("ViT-B-16-SigLIP2", "random")
