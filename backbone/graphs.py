"""One launch for a whole forward pass: `encode_text` and `encode_frames` captured as CUDA graphs.

On a GPU a small batch waits for Python, which launches its several hundred kernels one by one. A graph launches them all at
once, but always the same ones on the same memory. So a batch is padded to one of a few sizes, each with buffers and a graph of
its own: rows that are added have slot 0 and are cut off the result; tokens that are added come after the end of every text,
which causal attention does not read. The slots are read on the device, so a slot may be written between two batches.

On a CPU, and for a size whose capture fails, the same buffers are filled and the forward is called without a graph. The tests
run that way, and on fake tensors of a GPU; `pytest -m gpu` holds what is expected of a real one.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbone.model import Adapters, Backbone
from backbone.stack import AdapterStack, Slots

log = logging.getLogger(__name__)
LENGTHS = (8, 16, 24, 32)  # tokens; then the context length


@dataclass(frozen=True, slots=True)
class _Captured:
    """The forward of one size: what is in `inputs` and `slots`, after `replay`, is in `vectors`."""

    host: Tensor  # as `inputs`, in page-locked memory
    host_slots: Tensor
    inputs: Tensor  # tokens (B, T) int64 or pixels (B, 3, S, S) uint8, on the device
    slots: Tensor  # (B,) int64
    vectors: Tensor  # (B, D) float32
    replay: Callable[[], object]

    def __call__(self, inputs: Tensor, slots: Tensor) -> Tensor:
        """inputs (b, t, …) and slots (b,) on the host, b ≤ B and t ≤ T → (b, D) on the host."""
        rows, length = inputs.shape[:2]
        self.host[:rows, :length].copy_(inputs)
        self.host[:rows, length:].zero_()  # an earlier text's end is there
        self.host_slots[:rows].copy_(slots)
        self.host_slots[rows:].zero_()
        self.inputs.copy_(self.host, non_blocking=True)
        self.slots.copy_(self.host_slots, non_blocking=True)
        self.replay()
        return self.vectors[:rows].to("cpu", copy=True)  # waits for all of it


class Graphs:
    """A backbone's two forwards for up to `texts` and `frames` rows with adapters in slots of `stack`; results on the host.

    Safe to use from several threads. Larger batches, float pixels and adapters that have no slot go to the backbone itself.
    """

    def __init__(self, backbone: Backbone, stack: AdapterStack, texts: int, frames: int) -> None:
        self._backbone, self._stack = backbone, stack
        self._texts, self._frames = _halves(texts), _halves(frames)
        shorter = [length for length in LENGTHS if length < backbone.context_length] if backbone.causal else []
        self._lengths = [*shorter, backbone.context_length]
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._lock = threading.Lock()  # the graphs share their memory: one at a time
        self._pool = torch.cuda.graph_pool_handle() if backbone.device.type == "cuda" else None

    def warm(self) -> None:
        """Captures every size, so that no batch waits for it."""
        with self._lock:
            for rows in self._texts:
                for length in self._lengths:
                    self._at((rows, length))
            for rows in self._frames:
                self._at((rows, *self._picture))

    def encode_text(self, tokens: Tensor, adapters: Adapters = None) -> Tensor:
        """`Backbone.encode_text` of tokens (B, L) on the host."""
        trimmed = self._backbone.trim(tokens)
        rows, length = _bucket(self._texts, len(trimmed)), _bucket(self._lengths, trimmed.shape[1])
        slots = self._slots(adapters, len(trimmed))
        if rows is None or length is None or slots is None:
            return self._backbone.encode_text(trimmed, adapters).cpu()
        return self._run((rows, length), trimmed, slots)

    def encode_frames(self, pixels: Tensor, adapters: Adapters = None) -> Tensor:
        """`Backbone.encode_frames` of pixels (N, 3, S, S) on the host."""
        rows, slots = _bucket(self._frames, len(pixels)), self._slots(adapters, len(pixels))
        if rows is None or slots is None or pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self._picture:
            return self._backbone.encode_frames(pixels, adapters).cpu()
        return self._run((rows, *self._picture), pixels, slots)

    @property
    def _picture(self) -> tuple[int, int, int]:
        return 3, self._backbone.image_size, self._backbone.image_size

    def _slots(self, adapters: Adapters, rows: int) -> Tensor | None:
        """(rows,) slots; None where the backbone itself must encode or refuse them."""
        if adapters is None:
            return torch.zeros(rows, dtype=torch.int64)
        if not isinstance(adapters, Slots) or adapters.stack is not self._stack or len(adapters.index) != rows:
            return None
        return adapters.index if self._stack.has(adapters.index) else None

    def _run(self, size: tuple[int, ...], inputs: Tensor, slots: Tensor) -> Tensor:
        with self._lock, torch.inference_mode():
            return self._at(size)(inputs, slots)

    def _at(self, size: tuple[int, ...]) -> _Captured:
        if size not in self._captured:
            with torch.inference_mode():
                self._captured[size] = self._capture(size)
        return self._captured[size]

    def _capture(self, size: tuple[int, ...]) -> _Captured:
        device, pinned = self._backbone.device, self._backbone.device.type == "cuda"
        dtype = torch.int64 if len(size) == 2 else torch.uint8
        host, host_slots = (torch.zeros(s, dtype=d, pin_memory=pinned) for s, d in ((size, dtype), (size[:1], torch.int64)))
        inputs, slots = host.to(device, copy=True), host_slots.to(device, copy=True)
        apply = self._stack.whole("text" if len(size) == 2 else "visual", slots)
        offsets = self._stack.whole_vocabularies(slots)

        def run() -> Tensor:
            if len(size) == 2:
                return self._backbone.run_text(inputs, apply, offsets=offsets)
            return self._backbone.run_frames(inputs, apply)

        if self._pool is not None:
            try:
                return _Captured(host, host_slots, inputs, slots, *_graph(run, device, self._pool))
            except RuntimeError as error:  # CUDA's errors are of this kind
                log.warning("no CUDA graph of size %s: its batches are launched kernel by kernel", size, exc_info=error)
        vectors = run()
        return _Captured(host, host_slots, inputs, slots, vectors, lambda: vectors.copy_(run()))


def _graph(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Tensor, Callable[[], object]]:
    """What `run` gives, and what gives it anew in the same memory. Raises RuntimeError where it cannot be captured."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        run()  # loads kernels and takes workspaces, which a capture may not
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # adapters load meanwhile
        vectors = run()
    return vectors, graph.replay


def _halves(most: int) -> list[int]:
    """1 … ⌊most / 4⌋, ⌊most / 2⌋, most."""
    return sorted({most >> i for i in range(most.bit_length())})


def _bucket(sizes: list[int], size: int) -> int | None:
    """The smallest of the sizes that holds it; None where none does, or it is empty."""
    return sizes[bisect_left(sizes, size)] if 0 < size <= sizes[-1] else None
