"""Loading a backbone: the built-in one, an open_clip model by tag or local file, or seeded random weights."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, get_session
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbone.model import Backbone
from backbone.towers import UnsupportedBackbone

BUILTIN = "builtin"
RANDOM = "random"
HUB_SECONDS = 5.0  # for the hub's first answer; its client alone would try for 70


class BackboneNotFound(ValueError):
    """No architecture, tag or file of this name."""


def load_backbone(
    name: str = BUILTIN,
    pretrained: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """A frozen backbone on `device`, whose blocks compute in `dtype`.

    `name` is `builtin` or an open_clip architecture (`ViT-B-32`); `pretrained` is one of its tags (`openai`), a local
    file (safetensors, or a checkpoint that loads with `weights_only=True`), or `random` for weights drawn from `seed`.
    Raises BackboneNotFound or UnsupportedBackbone with a one-line reason.
    """
    if name == BUILTIN:
        return _load_builtin(device, pretrained, dtype)
    if name not in open_clip.list_models():
        raise BackboneNotFound(f"no backbone named {name!r}: take 'builtin' or an open_clip model such as 'ViT-B-32'")
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise BackboneNotFound(f"{name} needs --pretrained: a tag ({', '.join(tags)}), a file, or 'random'")
    tokenizer = _tokenizer(name)
    model = _create(name, pretrained, seed)
    config = _pictures(name, pretrained, model)
    try:
        return Backbone(name, model, tokenizer, device=device, dtype=dtype, **config)
    except ValueError as error:
        raise UnsupportedBackbone(str(error)) from error


def _pictures(name: str, pretrained: str, model: torch.nn.Module) -> dict[str, Any]:
    """How pictures are resized and normalised for these weights.

    A file does not tell: it is taken to be like the published weights of its architecture where these agree with each
    other, else like open_clip's own default.
    """
    keys = ("mean", "std", "resize_mode", "interpolation")
    tags = open_clip.list_pretrained_tags_by_model(name)
    told = [open_clip.get_pretrained_cfg(name, tag) for tag in ([pretrained] if pretrained in tags else tags)]
    own = open_clip.get_model_preprocess_cfg(model)
    config = own if not told or any(one[key] != told[0][key] for one in told for key in keys) else told[0]
    return {key: tuple(config[key]) if key in ("mean", "std") else config[key] for key in keys}


def _tokenizer(name: str) -> Any:
    source = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
    try:
        if source is None:
            return open_clip.get_tokenizer(name)
        with _hub():
            return open_clip.get_tokenizer(name)
    except ModuleNotFoundError as error:
        raise _lacks(name, error) from error
    except Exception as error:  # what transformers raises without a network is not documented
        place = f"{constants.ENDPOINT}/{source}"
        raise BackboneNotFound(f"the tokenizer of {name} could not be had from {place} ({_reason(error)})") from error


def _create(name: str, pretrained: str, seed: int) -> torch.nn.Module:
    if pretrained == RANDOM:
        try:
            with torch.random.fork_rng(devices=[]), _quiet():
                torch.manual_seed(seed)
                return open_clip.create_model(name)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            raise _lacks(name, error) from error
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        found = open_clip.get_pretrained_cfg(name, pretrained)
        # OpenAI's weights (and some others) were trained with quick GELU; the plain name alone computes with GELU.
        quick_gelu = bool(found.get("quick_gelu"))
        try:
            with _hub(), _quiet():
                return open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick_gelu)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            raise _lacks(name, error) from error
        except Exception as error:  # what the hub's client raises without a network is not documented
            fitting = f"{name}-quickgelu"
            fitting = fitting if quick_gelu and fitting in open_clip.list_models() else name
            raise BackboneNotFound(
                f"the weights {pretrained!r} of {name} could not be downloaded from {_place(found)} ({_reason(error)}):"
                f" without a network, give a file: --backbone {fitting} --pretrained FILE"
            ) from error
    if not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise BackboneNotFound(f"{name} has no weights {pretrained!r}: neither a file nor one of its tags ({tags})")
    try:
        return open_clip.create_model(name, pretrained=pretrained, weights_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # what torch and safetensors raise on a foreign file is not documented
        raise BackboneNotFound(f"{pretrained} does not hold weights of {name}: {str(error).splitlines()[0]}") from error


def _load_builtin(device: torch.device | str, pretrained: str | None, dtype: torch.dtype) -> Backbone:
    if pretrained is not None and not Path(pretrained).is_file():
        raise BackboneNotFound("the built-in backbone brings its own weights: leave --pretrained out, or give a file")
    weights = files("backbone") / "weights"
    config = json.loads((weights / "builtin.json").read_text())
    with torch.random.fork_rng(devices=[]):
        model = CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
            text_cfg=CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=config["quick_gelu"],
        )
    with as_file(weights / "builtin.safetensors") as shipped:
        path = Path(pretrained or shipped)
        try:
            model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        except (SafetensorError, RuntimeError) as error:
            raise BackboneNotFound(f"{path} does not hold weights of the built-in backbone") from error
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return Backbone(BUILTIN, model, tokenizer, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, device, dtype)


@contextmanager
def _hub() -> Iterator[None]:
    """Inside, the hub's client uses only its cache if the hub does not answer within HUB_SECONDS.

    Raises ConnectionError for what then fails without the hub.
    """
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            if get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code < 500:
                answered.set()

    before = constants.HF_HUB_OFFLINE
    if not before:
        asking = threading.Thread(target=ask, daemon=True)  # the look-up of a name has no time-out of its own
        asking.start()
        asking.join(HUB_SECONDS)
    away = not before and not answered.is_set()
    constants.HF_HUB_OFFLINE = before or away
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if away:
            raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _place(found: dict[str, Any]) -> str:
    """Where open_clip takes these weights from."""
    if "hf_hub" not in found:
        return str(found["url"])
    repository, _, file = found["hf_hub"].rpartition("/")
    return f"{constants.ENDPOINT}/{repository}/resolve/main/{file or 'open_clip_model.safetensors'}"


def _reason(error: Exception) -> str:
    """What went wrong, in one short line."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{' '.join(str(error).split()) or type(error).__name__:.160}"


def _lacks(name: str, error: ModuleNotFoundError) -> BackboneNotFound:
    return BackboneNotFound(f"{name} needs the package {error.name}: `pip install {error.name}`")


class _quiet:
    """Silences open_clip's log: what it warns of is intended, and what it raises is told in one line."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
