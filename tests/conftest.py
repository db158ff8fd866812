"""For all tests."""

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
