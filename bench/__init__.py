"""Benchmarks: each measures ratios against the naive way in one run. `python -m bench [NAME …]`."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `polyclip` has it, before torch is loaded
