"""Benchmarks: each measures ratios against the naive way in one run. `python -m bench [NAME …]`."""
