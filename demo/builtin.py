"""Trains the built-in backbone from scratch on the daylight world: `python -m demo.builtin` (two CPU cores, under an hour).

A scene is told whole and by phrases that tell a part of it (`demo.phrases`). Writes
`backbone/weights/builtin.{json,safetensors,log}`. The held-out scenes of the final tables have another seed; the shifted worlds
in it are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from backbone import Backbone, load_backbone, mean_pool, to_pixels
from demo.drawing import Picture
from demo.phrases import ANY, THINGS, Facts, draw_phrase
from demo.worlds import WORLDS, Scene, scenes
from training.dataset import ArrayClips
from training.evaluation import encode_clips, encode_texts
from training.metrics import recall
from training.optimiser import warmup_cosine

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
PHRASES = 6  # of a scene and step, beside a whole caption
HELD_OUT = 500
HELD_OUT_SEED = 7_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("backbone/weights"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=128, help="scenes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=24_000, help="training scenes, drawn once, two frames each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--measure", type=Path, metavar="WEIGHTS", help="train nothing: what these weights find by parts of scenes"
    )
    options = parser.parse_args()
    if options.measure is not None:
        sys.stdout.write("\n".join(by_parts(load_backbone(pretrained=str(options.measure)))) + "\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (options.out / "builtin.log").open("w") as log:

        def tell(line: str) -> None:
            stamped = f"[{time.monotonic() - started:7.1f} s] {line}\n"
            log.write(stamped)
            log.flush()
            sys.stdout.write(stamped)

        arguments = " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if name not in ("out", "measure")
        )
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
            for line in held_out(backbone_of(model), world):
                tell(line)


def build() -> CLIP:
    return CLIP(
        embed_dim=CONFIG["embed_dim"],
        vision_cfg=CLIPVisionCfg(**CONFIG["vision_cfg"]),
        text_cfg=CLIPTextCfg(**CONFIG["text_cfg"]),
        quick_gelu=CONFIG["quick_gelu"],
    )


def backbone_of(model: CLIP) -> Backbone:
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    return Backbone("builtin", model, tokenizer, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def train(model: CLIP, options: argparse.Namespace, tell: Callable[[str], None]) -> None:
    """`fitting_loss` over a batch of scenes: one frame of each, with a whole caption and with PHRASES phrases."""
    drawn = scenes("daylight", options.scenes, options.seed)
    pixels = draw(drawn)  # (S, 2, 3, 64, 64) uint8
    tell(f"{len(drawn)} scenes drawn")
    facts = Facts.of(drawn)
    learner, weights = backbone_of(model).unfrozen()
    logit_scale = model.logit_scale.detach().clone().requires_grad_()
    decayed = [p for name, p in weights.items() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in weights.items() if p.ndim < 2 or "embedding" in name]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [*others, logit_scale], "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, options.steps, 0.05))
    rng = np.random.default_rng(options.seed)
    order: list[int] = []
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order += rng.permutation(len(drawn)).tolist()
        batch, order = np.array(order[: options.batch]), order[options.batch :]
        frames = torch.from_numpy(pixels[batch, rng.integers(2, size=len(batch))])
        texts = [str(rng.choice(drawn[scene].captions)) for scene in batch]
        fitting = [np.eye(len(batch), dtype=bool)]
        for _ in range(PHRASES):
            phrases = [draw_phrase(drawn[scene], rng) for scene in batch]
            texts += [phrase.text for phrase in phrases]
            fitting.append(facts[batch].fit(phrases))
        images = F.normalize(learner.encode_frames(frames), dim=-1)
        words = F.normalize(learner.encode_text(learner.tokenize(texts).ids), dim=-1)
        logits = (logit_scale.exp() * words @ images.T).unflatten(0, (1 + PHRASES, -1))  # (kinds, B, B)
        whole, *parts = (fitting_loss(rows, torch.from_numpy(fit)) for rows, fit in zip(logits, fitting, strict=True))
        part = torch.stack(parts).mean()
        loss = (whole + 2 * part) / 3
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*weights.values(), logit_scale], 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            logit_scale.clamp_(0, math.log(100))
        if step % 25 == 0 or step == 1:
            tell(f"step {step} loss {whole.item():.4f} whole, {part.item():.4f} part; scale {logit_scale.exp().item():.1f}")
        if step % 500 == 0:
            with torch.no_grad():
                for line in held_out(learner, "daylight"):
                    tell(f"step {step} {line}")
    with torch.no_grad():
        model.load_state_dict({**learner.weights(), "logit_scale": logit_scale})


def fitting_loss(logits: Tensor, fitting: Tensor) -> Tensor:
    """Cross-entropy of texts (T) with images (B) and of images with texts: of each pair that fits (`fitting`, (T, B)) against
    those of its row, or its column, that do not. With one fitting image for each text it is CLIP's loss.
    """
    sides = []
    for scores, fits in ((logits, fitting), (logits.T, fitting.T)):
        against = scores.masked_fill(fits, -torch.inf).logsumexp(dim=1, keepdim=True).clamp_min(-1e4)
        pairs = F.softplus(against - scores) * fits
        sides.append((pairs.sum(dim=1) / fits.sum(dim=1)).mean())
    return (sides[0] + sides[1]) / 2


def held_out(backbone: Backbone, world: str) -> list[str]:
    """What is found among HELD_OUT scenes that were never trained on, by the mean of 12 frames: by whole captions and, in
    daylight, by phrases of two things, each among the scenes that do not have both.
    """
    held = scenes(world, HELD_OUT, HELD_OUT_SEED)
    videos = encode_clips(backbone, None, ArrayClips(draw(held, frames=12)), range(len(held)))

    def scores(texts: list[str]) -> NDArray[np.float32]:
        return mean_pool(encode_texts(backbone, None, texts), videos).detach().numpy()

    lines = [f"held-out {world}: {json.dumps(recall(scores([s.captions[0] for s in held]), range(len(held))).to_json())}"]
    if world == "daylight":
        rng = np.random.default_rng(HELD_OUT_SEED)
        phrases = [draw_phrase(scene, rng, facts=2) for scene in held]
        found = scores([phrase.text for phrase in phrases])
        found[Facts.of(held).fit(phrases) & ~np.eye(len(held), dtype=bool)] = -np.inf
        lines.append(f"held-out {world}, phrases of two things: {json.dumps(recall(found, range(len(held))).to_json())}")
    return lines


def by_parts(backbone: Backbone) -> list[str]:
    """R@1 and R@5 of phrases of one to four things among a hundred held-out scenes each, the others that have them left out; of
    two things also by what they are.
    """
    held, lines = scenes("daylight", HELD_OUT, HELD_OUT_SEED), []
    facts, rng, gallery = Facts.of(held), np.random.default_rng(1), 100
    videos = encode_clips(backbone, None, ArrayClips(draw(held, frames=4)), range(len(held)))
    names = np.array([*THINGS, "ground"])
    for count in range(1, 5):
        phrases = [draw_phrase(scene, rng, facts=count) for scene in held]
        scores = mean_pool(encode_texts(backbone, None, [phrase.text for phrase in phrases]), videos).numpy()
        others = ~facts.fit(phrases) & (np.arange(len(held))[:, None] // gallery == np.arange(len(held)) // gallery)
        better = ((scores > scores.diagonal()[:, None]) & others).sum(axis=1)
        lines.append(f"{count} things: R@1 {100 * (better < 1).mean():.1f}, R@5 {100 * (better < 5).mean():.1f}")
        if count == 2:
            told = [np.append(phrase.groups[0] != ANY, phrase.ground != ANY) for phrase in phrases]
            kinds = np.array(["+".join(names[of]) for of in told])
            for kind in sorted(set(kinds)):
                lines.append(f"  {kind}: R@5 {100 * (better[kinds == kind] < 5).mean():.0f} of {(kinds == kind).sum()}")
            shape = np.array(["shape" in kind for kind in kinds])
            for what, which in (("a shape", shape), ("no shape", ~shape)):
                lines.append(f"  with {what}: R@5 {100 * (better[which] < 5).mean():.1f} of {which.sum()}")
    return lines


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
