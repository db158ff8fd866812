"""Which adapters keep their slot of the stack: each for a holder (a collection), which has an owner (a tenant)."""

from __future__ import annotations

from collections.abc import Mapping


class PinsExhausted(RuntimeError):
    """The owner has pinned as many adapters as one may, or all owners together have: one slot stays for the others."""


class Pins:
    """Of `slots` slots all but one can be pinned; one owner can pin `share` of them (0 to 1), and one at least.

    Not safe for several threads: `Residency` calls it under its lock.
    """

    def __init__(self, slots: int, share: float) -> None:
        self._most, self._share = slots - 1, max(1, int(share * slots))
        self._held: dict[str, tuple[str, str]] = {}  # holder → digest, owner
        self.digests: frozenset[str] = frozenset()

    def add(self, digest: str, holder: str, owner: str) -> None:
        """A holder has one pin: an earlier one of another digest ends, also where this raises PinsExhausted."""
        if self._held.get(holder) == (digest, owner):
            return
        self.remove(holder)
        theirs = {other for other, its_owner in self._held.values() if its_owner == owner}
        if digest not in theirs and len(theirs) >= self._share:
            raise PinsExhausted(f"this tenant has {len(theirs)} adapters pinned; one may pin {self._share}")
        if digest not in self.digests and len(self.digests) >= self._most:
            raise PinsExhausted(f"{len(self.digests)} adapters are pinned in a stack of {self._most + 1}")
        self._held[holder] = digest, owner
        self.digests |= {digest}

    def remove(self, holder: str) -> None:
        if self._held.pop(holder, None) is not None:
            self.digests = frozenset(digest for digest, _ in self._held.values())

    def owners(self) -> Mapping[str, str]:
        """The owner of each holder of a pin."""
        return {holder: owner for holder, (_, owner) in self._held.items()}
