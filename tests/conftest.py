"""For all tests."""

import service  # noqa: F401  # first, as its OpenMP setting must be there before torch is: two processes share the cores
