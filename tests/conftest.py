"""For all tests."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `polyclip` has it, before torch is loaded: two processes share the cores
