"""`tests/bench/gpu.sh`: every figure of `python -m bench` that a GPU is needed for, in ten minutes.

Models have random weights, in the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B; batches
are 8 rows of 512 tokens, passes in bfloat16. Each figure is measured in its own process with a time
limit, the cheapest first. $OUT (default ./gpu-results) gets results.md, results.json and the output
of every process. Results are written after every figure, so stopping it loses only the one that is
running. GPU_BENCH_SECONDS (default 600) limits the whole; what was left out is listed. Of the 8B
shape, what needs Adam's states or `top_k` values in float32 fits on no GPU and is not tried.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).parents[2]
_LEAST = 8.0
"""Seconds without which no process is started: it would hardly have imported torch."""
_GRACE = 5.0
"""Seconds between asking a process to end and killing it."""
_MACHINE = """
import json, sys, torch
found = {"torch": torch.__version__, "device": "cpu"}
if torch.cuda.is_available():
    of = torch.cuda.get_device_properties(0)
    found |= {"device": of.name, "memory_gb": round(of.total_memory / 1e9, 1)}
print(json.dumps(found))
"""


class Job(NamedTuple):
    """One process: the figures that it measures, in order."""

    figures: str
    model: str
    seconds: float
    """Time limit."""
    options: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        words = [self.model, *self.figures.split(), *self.options.replace("--", "").split()]
        return "-".join(words)[:100]


_SMALL, _MIDDLE, _LARGE = "smollm2-shape", "1b-shape", "8b-shape"
_MEMORY = "memory_train memory_attribute memory_evaluate"
_STEPS = ("gated_step", "projected_step", "trainer", "trainer_packed")
_PASSES = ("uniform", "moments", "attribute")
JOBS = (
    *(Job(name, _SMALL, 60) for name in (*_PASSES, *_STEPS, _MEMORY)),
    *(Job(name, _MIDDLE, 60) for name in (*_PASSES, *_STEPS, _MEMORY)),
    *(Job(name, _LARGE, 75, "--pairs 2") for name in _PASSES[:2]),
    Job("memory_train", _LARGE, 60, "--dtype bfloat16"),
    Job("memory_attribute memory_evaluate", _LARGE, 75),
    Job("projected_step", _LARGE, 75, "--pairs 3 --dtype bfloat16"),
    Job("artifact decompose", _SMALL, 75),
    Job("task_30", _SMALL, 90, "--pairs 2"),
    Job("two_tasks", _SMALL, 150),
    Job("pipeline", _SMALL, 180, "--pairs 1"),
    Job("artifact", _MIDDLE, 180),
    Job("decompose", _MIDDLE, 180, "--pairs 1"),
)
_ON_GPU = "--device cuda --threads 4 --precision bfloat16 --rows 8 --tokens 512 --pairs 5"
_AS_TOY = "--threads 1 --precision bfloat16 --rows 2 --tokens 32 --batches 2"


def toys() -> list[Job]:
    """Every kind of job once, on a tiny model and a CPU; few processes, since imports take long."""
    names = list(dict.fromkeys(name for job in JOBS for name in job.figures.split()))
    alone = ("task_30", "two_tasks", "pipeline")
    together = " ".join(name for name in names if name not in alone)
    half = "memory_train projected_step"
    return [
        Job(together, "toy-shape", 60),
        Job(half, "toy-shape", 60, "--dtype bfloat16"),
        *(Job(name, "toy-shape", 90) for name in alone),
    ]


def command(job: Job, file: Path, *, toy: bool) -> list[str]:
    """The process's command. It writes what it measured to `file` after every figure."""
    # The last of two equal options counts.
    options = f"{_AS_TOY} {job.options} --pairs 1" if toy else f"{_ON_GPU} {job.options}"
    named = [*job.figures.split(), "--model", job.model, "--json", str(file)]
    return [sys.executable, "-m", "bench", *named, *options.split()]


def run(arguments: Sequence[str], log: Path, seconds: float) -> str:
    """Run a process and return why it failed, or nothing. It and its children end in time."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            arguments, cwd=_ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(0.0, seconds - _GRACE))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return "" if code == 0 else f"exit code {code}: {said[-1][:300] if said else ''}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process's group, which outlives it if Ray or a stage's process hangs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def table(results: Mapping[str, Any]) -> str:
    """Results in Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [
        f"{machine}; commit {results['commit']}; {results['seconds']:.0f} s",
        "",
        "| model | figure | relative to | ratio [quartiles] | bar | measured / against | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += map(_line, results["figures"])
    lines += ["", *(f"- Not measured: {each}" for each in results["missing"])]
    return "\n".join(lines) + "\n"


def _line(found: Mapping[str, Any]) -> str:
    ratio = f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    verdict = "held" if found["median"] <= found["bar"] else "missed"
    bar = "" if found["bar"] == float("inf") else f"{found['bar']}, {verdict}"
    values = " / ".join(f"{value:.4g}" for value in found["values"])
    model = f"{found['model']} {found['options']}".strip()
    cells = [model, found["name"], found["against"], ratio, bar, f"{values} {found['unit']}"]
    return f"| {' | '.join([*cells, found['note']])} |"


def measure(jobs: Sequence[Job], out: Path, machine: Mapping[str, Any], budget: float) -> None:
    """Run the jobs within the budget of seconds and write results after each of them."""
    started = time.monotonic()
    toy = machine["device"] == "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True
    )
    results: dict[str, Any] = {
        "machine": dict(machine),
        "commit": commit.stdout.strip() or "unknown",
        "figures": [],
        "missing": [],
    }
    missing = results["missing"]
    for job in jobs:
        file = out / f"{job.name}.json"
        file.unlink(missing_ok=True)
        left = budget - (time.monotonic() - started)
        reason = f"the {budget:.0f} s were over"
        try:
            if left >= _LEAST:
                arguments = command(job, file, toy=toy)
                reason = run(arguments, out / f"{job.name}.log", min(job.seconds, left))
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        finally:
            found = list(_found(job, file))
            results["figures"] += found
            if reason:
                missing.append(f"{job.figures} of {job.model} {job.options} ({reason})")
            results["seconds"] = time.monotonic() - started
            _write(results, out)
            print(f"{results['seconds']:4.0f} s  {job.name}: {reason or 'ok'}", flush=True)


def _found(job: Job, file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        for each in json.loads(file.read_text(encoding="utf-8"))["figures"]:
            yield {"model": job.model, "options": job.options, **each}


def _write(results: Mapping[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table(results), encoding="utf-8")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 also where a figure is missing, 2 for bad input, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", help="only these figures (default: all)")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU, to try it")
    given = parser.parse_args(arguments)
    jobs = toys() if given.toy else [*JOBS]
    known = {name for job in jobs for name in job.figures.split()}
    if unknown := {*given.figures} - known:
        parser.error(f"no figure {', '.join(sorted(unknown))} among {', '.join(sorted(known))}")
    if given.figures:
        jobs = [job for job in jobs if {*given.figures} & {*job.figures.split()}]
    try:
        budget = float(os.environ.get("GPU_BENCH_SECONDS", "600"))
    except ValueError:
        parser.error("GPU_BENCH_SECONDS must be a number of seconds")
    machine = _machine(toy=given.toy)
    if machine["device"] == "cpu" and not given.toy:
        parser.error("torch finds no GPU; --toy measures a tiny model on the CPU")
    out = Path(os.environ.get("OUT") or "gpu-results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        measure(jobs, out, machine, budget)
    except KeyboardInterrupt:
        return 130
    print((out / "results.md").read_text(encoding="utf-8"))
    return 0


def _machine(*, toy: bool) -> dict[str, Any]:
    """The GPU, or the CPU for a toy, and torch's version."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if toy else {}
    said = subprocess.run(
        [sys.executable, "-c", _MACHINE],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(said.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
