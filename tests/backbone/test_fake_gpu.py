"""The forward that is captured on a GPU, on tensors that only claim to lie there: they have shapes, dtypes and devices, and no
values. Whatever would read one on the host, or mix devices, raises; what would copy between them is told."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from small import NAMES, small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from backbone import AdapterStack, Backbone, Graphs, load_backbone

CUDA = torch.device("cuda", 0)


class Devices(TorchDispatchMode):
    """Notes which operators had tensors of two devices, in or out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.between = 0, list[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        tensors = [t for t in (*arguments, result) if isinstance(t, Tensor) and t.ndim]
        self.operators += 1
        if len({tensor.device for tensor in tensors}) > 1:
            self.between.append(str(function))
        return result


@pytest.fixture(scope="module")
def fake() -> FakeTensorMode:
    return FakeTensorMode()


@pytest.fixture(scope="module", params=["builtin", "ViT-S-32-alt", *NAMES])
def real(request: pytest.FixtureRequest) -> Backbone:
    if request.param in NAMES:
        return small(request.param)
    return load_backbone(request.param, None if request.param == "builtin" else "random")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def there(request: pytest.FixtureRequest, real: Backbone, fake: FakeTensorMode) -> tuple[Backbone, AdapterStack]:
    """The backbone and a stack on the device that is not there."""
    twin = copy.copy(real)
    twin.device = CUDA
    twin._take(copy.deepcopy(real._model))
    twin._compute_in(request.param)
    stack = AdapterStack(real.dims, 4, 8, dtype=request.param, words=20, tokens=real.tokens)
    with fake:
        for module in twin._model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                        tensors[name] = torch.nn.Parameter(moved, False) if tensors is module._parameters else moved
        twin._shift, twin._scale = (torch.empty(1, 3, 1, 1, device=CUDA) for _ in range(2))
        stack._blocks = {name: torch.empty(b.shape, dtype=b.dtype, device=CUDA) for name, b in stack._blocks.items()}
        stack._table, stack._places = (
            torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA) for tensor in (stack._table, stack._places)
        )
    return twin, stack


@pytest.fixture
def graphs(real: Backbone, there: tuple[Backbone, AdapterStack]) -> Graphs:
    """Its buffers without a graph: the forward is called."""
    graphs = Graphs(real, AdapterStack(real.dims, 4, 8), texts=4, frames=2)
    graphs._backbone, graphs._stack = there
    return graphs


@pytest.fixture
def watched(fake: FakeTensorMode) -> Iterator[Devices]:
    with fake, Devices() as devices, torch.inference_mode():
        yield devices
    assert devices.operators > 100


def test_texts_are_encoded_without_a_word_from_the_host(there: tuple[Backbone, AdapterStack], watched: Devices) -> None:
    backbone, stack = there
    tokens, slots = (torch.empty(shape, dtype=torch.int64, device=CUDA) for shape in ((3, 16), (3,)))
    found = backbone.run_text(tokens, stack.whole("text", slots), offsets=stack.whole_vocabularies(slots))
    assert (found.shape, found.dtype, found.device) == ((3, backbone.embed_dim), torch.float32, CUDA)
    assert watched.between == []


def test_frames_are_encoded_without_a_word_from_the_host(there: tuple[Backbone, AdapterStack], watched: Devices) -> None:
    backbone, stack = there
    side = backbone.image_size
    pixels = torch.empty((2, 3, side, side), dtype=torch.uint8, device=CUDA)
    found = backbone.run_frames(pixels, stack.whole("visual", torch.empty(2, dtype=torch.int64, device=CUDA)))
    assert (found.shape, found.dtype, found.device) == ((2, backbone.embed_dim), torch.float32, CUDA)
    assert watched.between == []


def test_a_batch_crosses_over_three_times(real: Backbone, graphs: Graphs, watched: Devices) -> None:
    """Tokens and slots there, vectors back."""
    tokens, slots = torch.empty((3, 11), dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    for _ in range(2):
        watched.between.clear()
        found = graphs._run((4, 16), tokens, slots)
    assert (found.shape, found.dtype, found.device.type) == ((3, real.embed_dim), torch.float32, "cpu")
    assert len(watched.between) == 3, watched.between


def test_a_word_from_the_host_would_be_heard(watched: Devices) -> None:
    there = torch.empty(4, device=CUDA)
    for _ in range(100):
        there = there + 1
    there.cpu()
    assert len(watched.between) == 1
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.ones(4)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        there.sum().item()
