"""Whether there is memory for a backbone, asked before it is loaded: a process that takes too much is killed, not told."""

from __future__ import annotations

from pathlib import Path

import open_clip
import psutil
import torch

from backbone.towers import UnsupportedBackbone

CGROUP = Path("/sys/fs/cgroup")


def check_room(name: str, device: torch.device | str, copies: int) -> None:
    """Raises UnsupportedBackbone where an open_clip model needs more memory than is free: so many `copies` of its values in
    float32 in the host's, two where a file is read.
    """
    values = sum(parameter.numel() for parameter in open_clip.create_model(name, device="meta").parameters())
    room = {"memory": (4 * copies * values, free_memory())}
    if torch.device(device).type == "cuda":
        room["GPU memory"] = (4 * values, torch.cuda.mem_get_info(device)[0])
    for where, (needed, free) in room.items():
        if needed > free:
            told = f"{needed / 1e9:.1f} GB of {where}, {free / 1e9:.1f} GB are free: take a smaller one"
            raise UnsupportedBackbone(f"{name} needs about {told}")


def free_memory() -> int:
    """Bytes that a process can still take: of the machine, or of its control group."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free
