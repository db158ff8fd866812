"""Loading a backbone: the built-in one, any native open_clip ViT by tag or local file, or seeded random weights."""

from __future__ import annotations

import json
import logging
from importlib.resources import as_file, files
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbone.model import Backbone, UnsupportedBackbone

BUILTIN = "builtin"
RANDOM = "random"


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
    model = _create(name, pretrained, seed)
    config = open_clip.get_model_preprocess_cfg(model)
    if not hasattr(model, "visual") or config.get("resize_mode", "shortest") != "shortest":
        raise UnsupportedBackbone(f"{name}: only ViT towers with a shortest-side resize are supported")
    return Backbone(name, model, open_clip.get_tokenizer(name), tuple(config["mean"]), tuple(config["std"]), device, dtype)


def _create(name: str, pretrained: str, seed: int) -> torch.nn.Module:
    if pretrained == RANDOM:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            return open_clip.create_model(name)  # type: ignore[no-any-return]
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        # OpenAI's weights (and some others) were trained with quick GELU; the plain name alone computes with GELU.
        quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
        try:
            return open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick_gelu)  # type: ignore[no-any-return]
        except Exception as error:  # what the hub's client raises without a network is not documented
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackboneNotFound(
                f"the weights {pretrained!r} of {name} could not be downloaded ({reason:.200}): without a network, give a file"
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
    """open_clip warns that random weights are random; whoever asks for `random` knows."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
