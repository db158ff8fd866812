"""Loading a backbone: the built-in one, any native open_clip ViT by tag or local file, or seeded random weights."""

from __future__ import annotations

import json
import logging
import socket
import urllib.request
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbone.model import Backbone, UnsupportedBackbone

BUILTIN = "builtin"
RANDOM = "random"
REACH_SECONDS = 5.0


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
    hub = _needs(name)
    model = _create(name, pretrained, seed)
    config = open_clip.get_model_preprocess_cfg(model)
    if not hasattr(model, "visual") or config.get("resize_mode", "shortest") != "shortest":
        raise UnsupportedBackbone(f"{name}: only ViT towers with a shortest-side resize are supported")
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # of the hub's client and of transformers
        raise BackboneNotFound(f"{name} needs the tokenizer {hub} of {_host()}, which cannot be had: {_line(error)}") from error
    return Backbone(name, model, tokenizer, tuple(config["mean"]), tuple(config["std"]), device, dtype)


def _needs(name: str) -> str:
    """The repository of the model's tokenizer on the hub, empty where open_clip brings it.

    Raises BackboneNotFound where the package for it is missing, before anything is made.
    """
    text: dict[str, Any] = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    hub = str(text.get("hf_tokenizer_name") or text.get("hf_model_name") or "")
    if hub and find_spec("transformers") is None:
        raise BackboneNotFound(f"{name} needs the package transformers for its tokenizer: pip install transformers")
    if hub:
        _is_reached(_host())
    return hub


def _host() -> str:
    return urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""


def _is_reached(host: str) -> bool:
    """Whether a connection to `host` can be made within seconds. If not, the hub's client is told to look into its cache alone:
    by itself it tries for most of a minute."""
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((host, 443), REACH_SECONDS).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _create(name: str, pretrained: str, seed: int) -> torch.nn.Module:
    if pretrained == RANDOM:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            return open_clip.create_model(name)  # type: ignore[no-any-return]
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        # OpenAI's weights (and some others) were trained with quick GELU; the plain name alone computes with GELU.
        config = open_clip.get_pretrained_cfg(name, pretrained)
        quick_gelu = bool(config.get("quick_gelu"))
        folder, _, file = str(config.get("hf_hub") or "").rpartition("/")
        where = f"{file or 'open_clip_model.safetensors'} of {_host()}/{folder}" if folder else str(config.get("url"))
        reached = _is_reached(_host() if folder else urlsplit(where).hostname or "")
        try:
            with _quiet():
                return open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick_gelu)  # type: ignore[no-any-return]
        except Exception as error:  # what the hub's client raises without a network is not documented
            fitting = f"{name}-quickgelu" if quick_gelu and f"{name}-quickgelu" in open_clip.list_models() else name
            reason = _line(error) if reached else "there is no connection to it, and the file is not in the cache"
            raise BackboneNotFound(
                f"the weights {pretrained!r} of {name} are {where}, and could not be downloaded: {reason}."
                f" Bring that file here and give it: --backbone {fitting} --pretrained FILE"
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


class _quiet:
    """open_clip warns that random weights are random, which who asks for them knows, and logs what it then raises."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
