"""`make crash`: rounds of kill -9 against a real service over real files, compared with what its client was promised.

A round: traffic; one process dies, at a random moment or at a named point (`armed/crash_points.py`); what no supervisor starts
again is started; at rest, everything is compared (`rest.py`). Every choice comes from the seed, the timing of threads does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[1:1] = [str(HERE.parent / "service"), str(HERE / "armed")]

from client import Client, Traffic, must  # noqa: E402
from crash_points import API, POINTS, TRAINER, WORKER  # noqa: E402
from rest import compare, swept  # noqa: E402
from serving import alive, wait_for  # noqa: E402

PROCESSES = {"API": API, "worker": WORKER, "trainer": f"-m {TRAINER}", "decoder": "indexer.sandbox"}  # in the command line
MID_TRAINING = "worker in mid-training"
MOMENTS = {"API": 2, "worker": 2, "trainer": 1, "decoder": 1, MID_TRAINING: 1}  # how many of them to one at each point
TRAINS = ("trainer", MID_TRAINING, "mid-checkpoint", "after the adapter's file, before its row")
BUILDS = ("mid-chunk", "just before the switch", "in the switch", "just after the switch")
STARTS = {"decoder": ("upload",) * 4, "mid-purge": ("delete",)}  # what brings it about; for the rest, an upload
STARTS |= dict.fromkeys(TRAINS, ("train",)) | dict.fromkeys(BUILDS, ("publish",))
DEATHS = 3  # of the worker, then the service is ended and started: its supervisor waits longer after each
RESTLESS = 0.25  # share of the rounds after a rest that the next one follows without one
PATIENCE = 60.0  # seconds until a point must have been passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="an empty folder, kept; default: a temporary one, removed if all is well")
    parser.add_argument("--only", action="append", help=f"may be given again; of {', '.join([*MOMENTS, *POINTS])}")
    arguments = parser.parse_args()
    folder = arguments.data or Path(tempfile.mkdtemp(prefix="polyclip-crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(PYTHONPATH=str(HERE / "armed"), CRASH_ORDER=str(folder / "order"))
    run = Run(folder, arguments.seed, arguments.only or [*Counter(MOMENTS).elements(), *POINTS])
    try:
        run.begin()
        for number in range(1, arguments.rounds + 1):
            run.round(number, last=number == arguments.rounds)
        run.end()
    except Exception as error:
        say(f"BROKEN in seed {arguments.seed}; data and logs are in {folder}\n{type(error).__name__}: {error}")
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        return 1
    finally:
        run.client.server.process.kill()
    say(run.summary())
    if arguments.data is None:
        shutil.rmtree(folder)
    return 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Run:
    """A service and its client over many rounds."""

    def __init__(self, folder: Path, seed: int, kinds: list[str]) -> None:
        self.client = Client(folder / "data")
        self._seed, self._order, self._lives = seed, folder / "order", folder / "lives.log"
        self._kinds = _drawn(kinds, Random(seed))
        self._killed, self._did = Counter[str](), Counter[str]()
        self._deaths = 0  # of workers in this life
        self._trainer_killed = False  # since the last rest
        self._rested = True
        self._children: set[int] = set()
        self._began = time.monotonic()

    def begin(self) -> None:
        self.client.begin()
        compare(self.client, Random(self._seed), trainer_killed=False)

    def round(self, number: int, last: bool) -> None:
        random, began, kind = Random(f"{self._seed}:{number}"), time.monotonic(), next(self._kinds)
        if kind in POINTS:  # the order is there before anything can pass the point
            passing = random.randint(1, 3) if POINTS[kind].often else 1
            aside = self._order.with_suffix(".part")
            aside.write_text(f"{kind}\n{passing}\n{number}")
            aside.rename(self._order)
        traffic = Traffic(self.client, STARTS.get(kind, ("upload",)), random, more=kind != MID_TRAINING)
        try:
            victim = self._at_point(kind, traffic) if kind in POINTS else self._at_moment(kind, random, traffic)
            died = time.monotonic() - began
            if victim == "API":
                traffic.end()
                self.restart()
            else:
                traffic.hush(random.uniform(0, 1))
            self._deaths += victim == "worker"
            self._trainer_killed |= victim == "trainer"
            rest = last or not self._rested or random.random() >= RESTLESS
            if rest:
                compare(self.client, random, self._trainer_killed)
        finally:
            traffic.end()
        if rest:
            resumed = kind != MID_TRAINING or not self._rested or "training_resumed" in self.client.server.log
            must(resumed, "the next worker goes on with the training from its checkpoint", "a new one")
            self._trainer_killed = False
        self._rested = rest
        self._killed[f"{victim}: {kind}" if kind in POINTS else f"{kind}: at a random moment"] += 1
        self._did.update(traffic.done)
        where = kind if kind in POINTS else "at a random moment"
        did, then = _counted(Counter(traffic.done)), "compared" if rest else "no rest"
        took = time.monotonic() - began
        say(f"round {number}, seed {self._seed}: {victim} killed after {died:.1f} s, {where} ({did}); {then}, {took:.1f} s")
        if self._deaths >= DEATHS:
            self.end_life()
            self.restart()

    def _at_point(self, kind: str, traffic: Traffic) -> str:
        """Waits until a process has died at the point."""
        wait_for(f"a passing of the point {kind!r}", lambda: self._watch(traffic) and not self._order.exists(), PATIENCE)
        return next(name for name, words in PROCESSES.items() if words.endswith(POINTS[kind].process))

    def _at_moment(self, kind: str, random: Random, traffic: Traffic) -> str:
        """Kills a process."""
        scratch = self.client.server.data / "scratch"
        if kind == MID_TRAINING:
            victim = "worker"
            wait_for("a checkpoint", lambda: self._watch(traffic) and list(scratch.glob("train-*/checkpoint.safetensors")))
        else:
            victim = kind
        pid = wait_for(f"a {victim}", lambda: self._watch(traffic) and self._process(victim))
        if kind != MID_TRAINING and victim != "decoder":
            time.sleep(random.uniform(0, 5 if victim == "trainer" else 2.5))
        self._watch(traffic)
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
        return victim

    def _process(self, victim: str) -> int | None:
        """The youngest process of a kind: of the decoders, one that decodes, if there is one."""
        server = self.client.server
        if victim == "API":
            return server.process.pid
        return max((pid for pid, command in server.processes().items() if PROCESSES[victim] in command), default=None)

    def _watch(self, traffic: Traffic) -> bool:
        """True; raises what the traffic has found broken, and remembers which processes there are."""
        traffic.check()
        self._children |= self.client.server.processes().keys()
        return True

    def restart(self) -> None:
        """Starts the service anew, when its API and everything below it have ended."""
        self.client.server.process.wait()
        wait_for("the end of the API's children", lambda: not any(alive(pid) for pid in self._children), 20)
        with self._lives.open("a") as lives:
            lives.write(self.client.server.log)
        self.client.restart()
        self._children, self._deaths = set(), 0

    def end_life(self) -> None:
        """By SIGTERM, which ends everything within ten seconds."""
        server = self.client.server
        children = server.processes()
        server.process.terminate()
        status = server.process.wait(timeout=10)
        must(status == 0, "after SIGTERM the service ends with status 0", status)
        wait_for("the end of its children", lambda: not any(alive(pid) for pid in children), 5)

    def end(self) -> None:
        self.end_life()
        self._swept = swept(self.client.server.data)

    def summary(self) -> str:
        kills = "\n".join(f"  {count:3d}  {what}" for what, count in sorted(self._killed.items()))
        minutes = (time.monotonic() - self._began) / 60
        did = f"{_counted(self._did)}, {self.client.asked} searches; {self._swept} files without an owner swept up at the end"
        return f"passed: {self._killed.total()} rounds in {minutes:.1f} min; {did}; killed\n{kills}"


def _drawn(kinds: list[str], random: Random) -> Iterator[str]:
    """Each once in random order, again and again."""
    while True:
        yield from random.sample(kinds, len(kinds))


def _counted(what: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(what.items()))


if __name__ == "__main__":
    sys.exit(main())
