"""The web service and the command line."""

import os

# Read when torch is loaded, so set before. Threads of a forward wait for each other busily for 0.1 ms, about as long as the
# next loop takes to come, not for 3: where another program has one of the cores, what they wait for is the core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
