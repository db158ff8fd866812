"""Benchmarks: each measures ratios against the naive way in one run. `python -m bench [NAME …]`."""

import service  # noqa: F401  # first, as its OpenMP setting must be there before torch is
