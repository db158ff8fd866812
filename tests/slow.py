"""Writes tests/slow.txt, which tests `make fast` leaves out, from measured times: `make slow-list`.

A test is on the list if one of its cases takes longer than a second, or all of them together longer than five.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

ONE, ALL = 1.0, 5.0  # seconds

times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
for line in sys.stdin:
    if found := re.match(r"([0-9.]+)s (?:call|setup) +tests/(\S+::[^\[]+)(.*)", line):
        times[found[2].strip()][found[3]] += float(found[1])
slow = sorted(name for name, cases in times.items() if max(cases.values()) > ONE or sum(cases.values()) > ALL)
(Path(__file__).parent / "slow.txt").write_text("\n".join(slow) + "\n")
