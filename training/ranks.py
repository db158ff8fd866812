"""Several processes that train one adapter together (`torchrun`): who am I, gather vectors, add up gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is `rank` of `count`; alone, every method returns what it was given."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """The group that torchrun's environment describes; one process without it. NCCL on CUDA, gloo elsewhere."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), count)

    @property
    def first(self) -> bool:
        """Whether this process validates, reports and writes."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's part of a batch of `rows`, which is a multiple of `count`."""
        own = rows // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, own: Tensor) -> Tensor:
        """(b, …) of each process → (count · b, …), in the order of the ranks, without gradients."""
        if self.count == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    def add_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Each gradient becomes the sum over the processes, in one message."""
        if self.count > 1:
            gradients = [t.grad for t in tensors if t.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: they stop together."""
        if self.count == 1:
            return flag
        up = torch.tensor([float(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(up)
        return bool(up.item())

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


ALONE = Ranks()
