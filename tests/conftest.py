"""For all tests."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import service  # noqa: F401  # first, as its OpenMP setting must be there before torch is: two processes share the cores

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split())
SERVERS = {"server", "strict"}  # fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow is what tests/slow.txt names (tests/slow.py writes it), and what starts a server with its worker."""
    for item in items:
        name = item.nodeid.removeprefix("tests/").partition("[")[0]
        if name in SLOW or not SERVERS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back() -> Iterator[None]:
    """Applications and backbones of a module are in cycles, which the collector would leave for long in so large a heap."""
    yield
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
