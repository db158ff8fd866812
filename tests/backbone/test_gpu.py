"""The same vectors on the GPU as on the CPU. Run where there is one: `pytest -m gpu`."""

import pytest
import torch

from backbone import AdapterShape, load_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_vectors_on_the_gpu_are_those_of_the_cpu() -> None:
    cpu, gpu = load_backbone("builtin", device="cpu"), load_backbone("builtin", device="cuda")
    assert cpu.fingerprint == gpu.fingerprint
    shape = AdapterShape(cpu.dims)
    adapters = [shape.assemble({n: 10 * t for n, t in shape.initial(seed).items()}) for seed in range(3)]
    tokens = cpu.tokenize(["a red ball", "two blue boxes on the left", "snow"]).ids
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    there = [adapter.to(gpu.device) for adapter in adapters]
    with torch.inference_mode():
        found = gpu.encode_text(tokens, there).cpu()
        torch.testing.assert_close(found, cpu.encode_text(tokens, adapters), atol=1e-2, rtol=1e-2)
        expected = cpu.encode_frames(pixels, adapters)
        torch.testing.assert_close(gpu.encode_frames(pixels, there).cpu(), expected, atol=1e-2, rtol=1e-2)
