"""Kills a run at random moments, gives the same command again, and checks that nothing is lost.

    python tests/chaos.py --kills 15 --seed 0 --workers 2

First the run goes undisturbed, then in other storage folders with kills until there were enough.
Ends with a table and exit code 1 if anything differs from the undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from reference.record import check_whole

from pipeline.config import loading
from pipeline.run import open_run
from pipeline.storage.storage import default_uri

ROOT = Path(__file__).parent.parent
CONFIG = """
name: chaos
method: gate
tasks: {format: facts, count: 3, entities: 3}
model: {pretraining: {entities: 8, epochs: 8}}
training: {epochs: 20, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-3}
importance: {batch_size: 5}
evaluation: {batch_size: 5}
resources: {checkpoint_minutes: 0.0001}
"""
KINDS = ("driver", "worker", "everything", "SIGINT", "SIGTERM")
"""SIGKILL to the driver, to one Ray Train worker, to all processes of the run; or a signal to the
driver."""
MARK = "AGCL_CHAOS"
"""Environment variable that every process of a run inherits: whatever has it belongs to the run."""
WORKER = b"RayTrainWorker"
SECONDS_TO_END, SECONDS_TO_VANISH = 300, 60


@dataclass
class Seen:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    """Kills after which the command completed without being given again."""
    finished: int = 0
    """Stages that were finished when a kill came, summed over kills."""
    wrong: list[str] = field(default_factory=list)


class Run:
    """`agcl run` on one storage folder, given as often as it takes."""

    def __init__(self, folder: Path, workers: int = 1, config: str = CONFIG) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.storage = folder / "storage"
        self.config, self.mark = folder / "config.yaml", folder.name
        self.config.write_text(config, encoding="utf-8")
        self.folder = self.storage / yaml.safe_load(config)["name"]
        self.settings = [f"storage={self.storage}", f"resources.num_workers={workers}"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "run", str(self.config), *self.settings],
            cwd=ROOT,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What a shell puts into the background ignores SIGINT, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def manifests(self) -> dict[str, Any]:
        """Of the finished stages, by folder: when and from what they were made."""
        files = (self.storage / "stages").glob("*/manifest.json")
        return {
            file.parent.name: json.loads(file.read_text(encoding="utf-8"))
            for file in files
            if not file.parent.suffix
        }

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def complete(self) -> bool:
        return (self.folder / "metrics.json").exists()

    def processes(self) -> dict[int, bytes]:
        """Command lines of the run's processes, by id."""
        mark = f"{MARK}={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # It may end while it is looked at.
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes()
        return found

    def left(self) -> list[str]:
        """What must not be there after the end, given a little time."""
        deadline = time.monotonic() + SECONDS_TO_VANISH
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        patterns = ("*.part", "*.lock", "*.checkpoint", ".ray*")
        files = [str(file) for pattern in patterns for file in self.storage.rglob(pattern)]
        return files + [f"process {number} {line!r}" for number, line in alive.items()]


def wait_for_moment(run: Run, driver: subprocess.Popen[str], longest: float) -> None:
    """Wait until up to three more stages are finished, and then a little, or until the end."""
    enough = len(run.manifests()) + random.randrange(4)
    while driver.poll() is None and len(run.manifests()) < enough:
        time.sleep(0.1)
    with suppress(subprocess.TimeoutExpired):
        driver.wait(random.uniform(0, longest / 4))


def strike(run: Run, driver: subprocess.Popen[str], kind: str) -> bool:
    """Kill as the kind says; whether there was something to kill."""
    if driver.poll() is not None:
        return False
    if kind in ("SIGINT", "SIGTERM"):
        driver.send_signal(signal.Signals[kind])
        return True
    if kind == "driver":
        driver.kill()
        return True
    while kind == "worker":
        workers = [number for number, line in run.processes().items() if WORKER in line]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(random.choice(sorted(workers)), signal.SIGKILL)
                return True
        if driver.poll() is not None:
            return False
        time.sleep(0.1)
    for number in sorted(run.processes(), key=lambda number: number != driver.pid):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return True


def judge_end(kind: str, code: int, err: str, *, complete: bool) -> Iterator[str]:
    """What is wrong with how a command ended that was struck."""
    expected = {"driver": (-9,), "everything": (-9,), "worker": (0,)}.get(kind, (130,))
    if complete and kind in ("SIGINT", "SIGTERM"):
        # Python, as it ends, takes its own handlers away.
        expected = (*expected, -signal.Signals[kind])
    lines = err.splitlines()
    if code not in expected:
        yield f"after {kind}: exit code {code}, expected {expected}: {err.strip()[-600:]}"
    if code > 0 and (len(lines) != 1 or not lines[0].startswith("agcl: ")):
        yield f"after {kind}: not one clear line: {err.strip()[-600:]}"


def disturbed(run: Run, kinds: list[str], longest: float, seen: Seen) -> None:
    """Strike by the kinds in order, as many as come before the run is complete; takes them off."""
    before: dict[str, Any] = {}
    while True:
        driver = run.start()
        kind = kinds[0] if kinds else None
        struck = False
        if kind:
            wait_for_moment(run, driver, longest)
            at_kill, complete = run.manifests(), run.complete()
            struck = strike(run, driver, kind)
        _, err = driver.communicate(timeout=SECONDS_TO_END)
        after = run.manifests()
        changed = [name for name, manifest in before.items() if after.get(name) != manifest]
        seen.wrong += [f"computed again: {name}" for name in changed]
        before = after
        if kind and struck:
            kinds.pop(0)
            seen.kills[kind] += 1
            seen.finished += len(at_kill)
            seen.wrong += judge_end(kind, driver.returncode, err, complete=complete)
            print(
                f"{kind:<11} at {len(at_kill):2} finished stages: exit {driver.returncode} "
                f"{err.strip()[-150:]}",
                flush=True,
            )
        elif driver.returncode:
            seen.wrong.append(f"undisturbed, exit {driver.returncode}: {err.strip()[-600:]}")
            return
        if driver.returncode == 0:
            if struck:
                seen.went_on[str(kind)] += 1
            return


def compare(run: Run, reference: Run, seen: Seen) -> None:
    """Hold a run that is complete against the undisturbed one."""
    if run.metrics() != reference.metrics():
        seen.wrong.append(f"{run.storage}: metrics.json differs")
    if run.manifests().keys() != reference.manifests().keys():
        seen.wrong.append(f"{run.storage}: other stages")
    seen.wrong += [f"left behind: {what}" for what in run.left()]
    try:
        opened = open_run(loading.load(run.config, run.settings))
        check_whole(default_uri(run.storage), opened)
    except AssertionError as error:
        seen.wrong.append(f"MLflow's record of {run.storage}: {error!r}")


def chaos(folder: Path, kills: int, seed: int, workers: int) -> Seen:
    """Run undisturbed, then with kills; what was seen."""
    random.seed(seed)
    seen = Seen()
    folders = (folder / f"{folder.name}-{number}" for number in range(1000))

    reference = Run(next(folders), workers)
    started = time.monotonic()
    disturbed(reference, [], 0, seen)
    longest = time.monotonic() - started
    print(f"undisturbed: {longest:.0f} s, {len(reference.manifests())} stages", flush=True)
    compare(reference, reference, seen)
    kinds = [kind for _ in range(0, kills, len(KINDS)) for kind in random.sample(KINDS, len(KINDS))]
    kinds = kinds[:kills]
    while kinds and not seen.wrong:
        strike_again(Run(next(folders), workers), reference, kinds, longest, seen)
    return seen


def strike_again(run: Run, reference: Run, kinds: list[str], longest: float, seen: Seen) -> None:
    """Disturb one run, as `disturbed` does, and compare it with the undisturbed one."""
    disturbed(run, kinds, longest, seen)
    if not seen.wrong:
        compare(run, reference, seen)
        print("complete", flush=True)


def table(seen: Seen) -> Iterator[str]:
    """The summary, line by line."""
    yield f"{'kill':<11} {'kills':>6} {'went on by itself':>18}"
    for kind in KINDS:
        yield f"{kind:<11} {seen.kills[kind]:>6} {seen.went_on[kind]:>18}"
    yield f"stages finished at a kill (summed): {seen.finished}"
    yield f"wrong: {len(seen.wrong)}"
    yield from (f"  {what}" for what in seen.wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--storage", type=Path, help="folder for the runs (default: a new one)")
    parsed = parser.parse_args(arguments)
    if parsed.storage:
        parsed.storage.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir=parsed.storage))
    print(f"in {folder}", flush=True)
    seen = chaos(folder, parsed.kills, parsed.seed, parsed.workers)
    print("\n".join(table(seen)))
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
