"""Trains the built-in backbone from scratch on the daylight world: `python -m demo.builtin` (two CPU cores, under an hour).

Writes `backbone/weights/builtin.{json,safetensors,log}`. The held-out scenes of the final table have another seed; the shifted
worlds in it are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from backbone import Backbone, mean_pool, to_pixels
from demo.drawing import Picture
from demo.worlds import WORLDS, Scene, scenes
from training.dataset import ArrayClips
from training.evaluation import encode_clips, encode_texts
from training.metrics import Recall, recall
from training.optimiser import warmup_cosine

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
HELD_OUT = 500
HELD_OUT_SEED = 7_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("backbone/weights"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=128, help="scenes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=40_000, help="training scenes, drawn once, two frames each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (options.out / "builtin.log").open("w") as log:

        def tell(line: str) -> None:
            stamped = f"[{time.monotonic() - started:7.1f} s] {line}\n"
            log.write(stamped)
            log.flush()
            sys.stdout.write(stamped)

        arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if name != "out")
        tell(f"python -m demo.builtin {arguments}")
        tell(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads")
        torch.manual_seed(options.seed)
        model = build()
        tell(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        train(model, options, tell)
        state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, options.out / "builtin.safetensors", {"trained_by": f"python -m demo.builtin {arguments}"})
        (options.out / "builtin.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        for world in WORLDS:
            found = held_out_recall(model, world)
            tell(f"held-out {world}: {json.dumps(found.to_json())}")


def build() -> CLIP:
    return CLIP(
        embed_dim=CONFIG["embed_dim"],
        vision_cfg=CLIPVisionCfg(**CONFIG["vision_cfg"]),
        text_cfg=CLIPTextCfg(**CONFIG["text_cfg"]),
        quick_gelu=CONFIG["quick_gelu"],
    )


def train(model: CLIP, options: argparse.Namespace, tell: object) -> None:
    """Symmetric cross-entropy over a batch of scenes, one frame and one phrasing of each."""
    assert callable(tell)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    drawn = scenes("daylight", options.scenes, options.seed)
    pixels = draw(drawn)  # (S, 2, 3, 64, 64) uint8
    tell(f"{len(drawn)} scenes drawn")
    tokens = tokenizer([caption for scene in drawn for caption in scene.captions]).view(len(drawn), -1, 77)
    tokens = tokens[..., : int(tokens.argmax(-1).max()) + 1]  # causal: what follows the longest text's end changes nothing
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, options.steps, 0.05))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    mask = model.attn_mask[: tokens.shape[-1], : tokens.shape[-1]]
    rng = np.random.default_rng(options.seed)
    target = torch.arange(options.batch)
    model.train()
    order: list[int] = []
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order += rng.permutation(len(drawn)).tolist()
        batch, order = order[: options.batch], order[options.batch :]
        frames = torch.from_numpy(pixels[batch, rng.integers(2, size=len(batch))]).float() / 255
        texts = tokens[torch.tensor(batch), torch.from_numpy(rng.integers(tokens.shape[1], size=len(batch)))]
        images = F.normalize(model.encode_image((frames - mean) / std), dim=-1)
        x = model.token_embedding(texts) + model.positional_embedding[: texts.shape[1]]
        x = model.ln_final(model.transformer(x, attn_mask=mask))
        words = F.normalize(x[target, texts.argmax(-1)] @ model.text_projection, dim=-1)
        logits = model.logit_scale.exp() * words @ images.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 25 == 0 or step == 1:
            tell(f"step {step} loss {loss.item():.4f} scale {model.logit_scale.exp().item():.1f}")
        if step % 500 == 0:
            tell(f"step {step} held-out daylight: {json.dumps(held_out_recall(model, 'daylight').to_json())}")


def held_out_recall(model: CLIP, world: str) -> Recall:
    """Text to video among HELD_OUT scenes that were never trained on: first phrasing, mean of 12 frames."""
    held = scenes(world, HELD_OUT, HELD_OUT_SEED)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    training = model.training
    requires = [p.requires_grad for p in model.parameters()]
    backbone = Backbone("builtin", model, tokenizer, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.inference_mode():
        videos = encode_clips(backbone, None, ArrayClips(draw(held, frames=12)), range(len(held)))
        texts = encode_texts(backbone, None, [scene.captions[0] for scene in held])
        found = recall(mean_pool(texts, videos).numpy(), range(len(held)))
    model.train(training)
    for parameter, required in zip(model.parameters(), requires, strict=True):
        parameter.requires_grad_(required)
    return found


def draw(drawn: list[Scene], frames: int = 2) -> Picture:
    """(scenes, frames, 3, 64, 64) uint8: frames at the centres of equal slices of each scene."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(_draw_one, drawn, [frames] * len(drawn), chunksize=64))
    return np.stack(parts)


def _draw_one(scene: Scene, frames: int) -> Picture:
    times = [scene.duration * (i + 0.5) / frames for i in range(frames)]
    return np.stack([to_pixels(Image.fromarray(scene.frame(t)), 64) for t in times])


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
