"""Loading a backbone: the built-in one, an open_clip model by tag or local file, or seeded random weights."""

from __future__ import annotations

import json
import logging
import os
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, hf_hub_download
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbone.hub import hub, place, reason
from backbone.model import Backbone
from backbone.room import check_room
from backbone.tokenizer import FILES, FolderTokenizer
from backbone.towers import UnsupportedBackbone

BUILTIN = "builtin"
RANDOM = "random"
REPOSITORY = re.compile(r"(?:hf-hub:)?[\w.-]+/[\w.-]+")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of a file that is not there


class BackboneNotFound(ValueError):
    """No architecture, tag or file of this name."""


def pretrained_tags(name: str) -> list[str]:
    """The weights that open_clip knows for an architecture, and `random`; none where there is no such architecture."""
    return [*open_clip.list_pretrained_tags_by_model(name), RANDOM] if name in open_clip.list_models() else []


def load_backbone(
    name: str = BUILTIN,
    pretrained: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
) -> Backbone:
    """A frozen backbone on `device`, whose blocks compute in `dtype`.

    `name` is `builtin` or an open_clip architecture (`ViT-B-32`); `pretrained` is one of its tags (`openai`), a local
    file (safetensors, or a checkpoint that loads with `weights_only=True`), a repository of the hub (`owner/name`), or
    `random` for weights drawn from `seed`. `tokenizer` is the folder of a tokenizer that does not come with open_clip; by
    default POLYCLIP_TOKENIZER, else the file's own folder, else the hub.
    Raises BackboneNotFound or UnsupportedBackbone with a one-line reason.
    """
    if name == BUILTIN:
        return _load_builtin(device, pretrained, dtype)
    if name not in open_clip.list_models():
        raise BackboneNotFound(f"no backbone named {name!r}: take 'builtin' or an open_clip model such as 'ViT-B-32'")
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise BackboneNotFound(f"{name} needs --pretrained: a tag ({', '.join(tags)}), a file, or 'random'")
    try:
        words = _tokenizer(name, pretrained, tokenizer)
        with _quiet():
            check_room(name, device, copies=1 if pretrained == RANDOM else 2)
        model, config = _create(name, pretrained, seed)
        return Backbone(name, model, words, device=device, dtype=dtype, **config)
    except (BackboneNotFound, UnsupportedBackbone):
        raise
    except ValueError as error:
        raise UnsupportedBackbone(f"{name}: {error}") from error
    except (MemoryError, RuntimeError) as error:  # what torch raises on a CPU has no class of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise UnsupportedBackbone(f"{name} needs more memory than there is on {device}: take a smaller one") from error


def _tokenizer(name: str, pretrained: str, folder: Path | None) -> Any:
    text = open_clip.get_model_config(name)["text_cfg"]
    source = text.get("hf_tokenizer_name")
    if source is None:
        return open_clip.get_tokenizer(name)
    options = text.get("tokenizer_kwargs", {})
    readable = "hf_model_name" not in text and options.keys() <= {"clean"}
    folder = folder or _folder(pretrained)
    if readable and folder is not None:
        try:
            return FolderTokenizer(folder, text["context_length"], text["vocab_size"], **options)
        except (ValueError, OSError) as error:
            raise BackboneNotFound(f"{folder} holds no tokenizer of {name}: {_line(error)}") from error
    try:
        with hub():
            if not readable:
                return open_clip.get_tokenizer(name)
            folder, _ = (Path(hf_hub_download(source, file)).parent for file in FILES)
            return FolderTokenizer(folder, text["context_length"], text["vocab_size"], **options)
    except ModuleNotFoundError as error:
        raise _lacks(name, error) from error
    except Exception as error:  # what the hub's client raises without a network is not documented
        raise BackboneNotFound(
            f"the tokenizer of {name} could not be had from {constants.ENDPOINT}/{source} ({reason(error)}):"
            f" without a network, name a folder with its {' and '.join(FILES)} in POLYCLIP_TOKENIZER"
        ) from error


def _folder(pretrained: str) -> Path | None:
    """Where a tokenizer lies on this machine: in POLYCLIP_TOKENIZER, or beside the weights."""
    if told := os.environ.get("POLYCLIP_TOKENIZER"):
        return Path(told)
    beside = Path(pretrained).parent
    return beside if Path(pretrained).is_file() and (beside / FILES[0]).is_file() else None


def _create(name: str, pretrained: str, seed: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, and how its pictures are resized and normalised."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    if pretrained == RANDOM:
        try:
            with torch.random.fork_rng(devices=[]), _quiet():
                torch.manual_seed(seed)
                model = open_clip.create_model(name)
        except ModuleNotFoundError as error:
            raise _lacks(name, error) from error
    elif pretrained in tags:
        published = [open_clip.get_pretrained_cfg(name, pretrained)]
        model = _downloaded(name, pretrained, published[0])
    elif Path(pretrained).is_file():
        model = _loaded(name, pretrained)
    elif REPOSITORY.fullmatch(pretrained) and Path(pretrained).suffix not in SUFFIXES:
        file, config = _repository(name, pretrained)
        published = [config["preprocess_cfg"]] if "preprocess_cfg" in config else published
        model = _loaded(name, file, bool(config["model_cfg"].get("quick_gelu")))
    else:
        raise BackboneNotFound(
            f"{name} has no weights {pretrained!r}: neither a file nor one of its tags ({', '.join(tags)}),"
            " nor a repository of the hub (owner/name)"
        )
    return model, _pictures(model, published)


def _pictures(model: torch.nn.Module, published: list[dict[str, Any]]) -> dict[str, Any]:
    """A file does not tell: it is taken to be like the published weights of its architecture where these agree with each
    other, else like open_clip's own default.
    """
    keys = ("mean", "std", "resize_mode", "interpolation")
    own = open_clip.get_model_preprocess_cfg(model)
    told = [{key: one.get(key, own[key]) for key in keys} for one in published]
    config = told[0] if told and all(one == told[0] for one in told) else own
    return {key: tuple(config[key]) if key in ("mean", "std") else config[key] for key in keys}


def _downloaded(name: str, tag: str, found: dict[str, Any]) -> torch.nn.Module:
    # OpenAI's weights (and some others) were trained with quick GELU; the plain name alone computes with GELU.
    quick_gelu = bool(found.get("quick_gelu"))
    try:
        with hub(), _quiet():
            return open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise _lacks(name, error) from error
    except Exception as error:  # what the hub's client raises without a network is not documented
        fitting = f"{name}-quickgelu"
        fitting = fitting if quick_gelu and fitting in open_clip.list_models() else name
        raise BackboneNotFound(
            f"the weights {tag!r} of {name} could not be downloaded from {place(found)} ({reason(error)}):"
            f" without a network, give a file: --backbone {fitting} --pretrained FILE"
        ) from error


def _repository(name: str, repository: str) -> tuple[str, dict[str, Any]]:
    """The weights file of a repository, and its `open_clip_config.json`."""
    repository = repository.removeprefix("hf-hub:")
    try:
        with hub():
            config = json.loads(Path(hf_hub_download(repository, "open_clip_config.json")).read_text())
            return hf_hub_download(repository, "open_clip_model.safetensors"), {"model_cfg": {}} | config
    except Exception as error:  # what the hub's client raises is not documented
        raise BackboneNotFound(
            f"the weights of {name} could not be downloaded from {constants.ENDPOINT}/{repository} ({reason(error)}):"
            f" without a network, give a file: --backbone {name} --pretrained FILE"
        ) from error


def _loaded(name: str, file: str, quick_gelu: bool = False) -> torch.nn.Module:
    try:
        with _quiet():
            return open_clip.create_model(name, pretrained=file, weights_only=True, force_quick_gelu=quick_gelu)  # type: ignore[no-any-return]
    except Exception as error:  # what torch and safetensors raise on a foreign file is not documented
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            raise
        raise BackboneNotFound(f"{file} does not hold weights of {name}: {_line(error)}") from error


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


def _lacks(name: str, error: ModuleNotFoundError) -> BackboneNotFound:
    return BackboneNotFound(f"{name} needs the package {error.name}: `pip install {error.name}`")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _quiet:
    """Silences open_clip's log: what it warns of is intended, and what it raises is told in one line."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
