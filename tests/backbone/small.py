"""open_clip's architectures made narrow and shallow: every part that the real ones have, in a few milliseconds."""

import copy
import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from backbone import Backbone

WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "a", "red", "ball")
CONFIG = {"add_bos_token": False, "add_eos_token": True, "pad_token": "<pad>", "eos_token": {"content": "<eos>"}}
NAMES = (
    "PE-Core-T-16-384",
    "EVA02-B-16",
    "ViT-B-16-SigLIP2",
)  # class token pooled by attention; alone; none, and text both ways


def shaken(model: torch.nn.Module, seed: int = 1) -> Any:
    """The model with noise on all of its values: scales of one and biases of zero hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


@functools.cache
def small(name: str) -> Backbone:
    """3 vision layers of width 48 over 48 × 48 pixels, 5 text layers of width 32; the tokenizer is CLIP's."""
    config: Any = copy.deepcopy(open_clip.get_model_config(name))
    assert config is not None
    text = config["text_cfg"] | {"width": 32, "heads": 2, "layers": 5, "vocab_size": 49408}
    for transformers_own in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(transformers_own, None)
    narrow = functools.partial(timm.create_model, depth=3, embed_dim=48, num_heads=4, img_size=48)
    with torch.random.fork_rng(devices=[]), mock.patch.object(timm, "create_model", narrow):
        torch.manual_seed(0)
        vision = CLIPVisionCfg(**config["vision_cfg"] | {"image_size": 48})
        siglip = config["vision_cfg"]["timm_proj"] == "none"
        model = CustomTextCLIP(48 if siglip else 24, vision, CLIPTextCfg(**text))
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return Backbone(name, shaken(model), tokenizer, (0.5,) * 3, (0.5,) * 3)


def tokenizer_in(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    return folder
