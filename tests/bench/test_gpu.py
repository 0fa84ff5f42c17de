"""The script for a GPU: what it refuses, what it keeps when stopped; slow, that all of it works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from shlex import quote

import pytest

from bench import gpu
from bench.__main__ import NAMES

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
FIGURE = {
    "name": "it", "against": "that", "bar": 1.2, "median": 1.0, "low": 1.0, "high": 1.1,
    "values": [1.0, 1.0], "unit": "s", "note": "",
}  # fmt: skip
MACHINE = {"device": "cpu"}


@pytest.mark.parametrize(
    ("arguments", "seconds", "said"),
    [(["warp_speed"], "600", "no figure warp_speed"), ([], "soon", "GPU_BENCH_SECONDS")],
)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments, seconds, said, monkeypatch, capsys
):
    monkeypatch.setenv("GPU_BENCH_SECONDS", seconds)
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--toy", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_jobs_name_figures_that_there_are_and_the_toy_has_them_all():
    wanted = {name for job in gpu.JOBS for name in job.figures.split()}
    assert wanted <= {*NAMES}
    assert {name for job in gpu.toys() for name in job.figures.split()} == wanted
    assert len({job.name for job in gpu.JOBS}) == len(gpu.JOBS)


def test_of_a_job_that_is_stopped_or_never_started_results_say_so(tmp_path, monkeypatch):
    def command(job, file, *, toy):
        found = json.dumps({"figures": [FIGURE]})
        # A shell starts in time on a busy machine too, Python does not.
        return ["sh", "-c", f"printf %s {quote(found)} > {quote(str(file))}; sleep {job.options}"]

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu, "_LEAST", 0.5)
    monkeypatch.setattr(gpu, "_GRACE", 0.1)
    jobs = [gpu.Job("a", "m", 60, "0"), gpu.Job("b", "m", 1.2, "60"), gpu.Job("c", "m", 60, "0")]
    started = time.monotonic()
    gpu.measure(jobs, tmp_path, MACHINE, budget=1.6)
    assert time.monotonic() - started < 30
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["name"] for each in results["figures"]] == ["it", "it"]
    stopped, never = results["missing"]
    assert stopped.startswith("b of m 60 (stopped after")
    assert never == "c of m 0 (the 2 s were over)"
    table = (tmp_path / "results.md").read_text()
    assert "| m 0 | it | that | 1.000 [1.000, 1.100] | 1.2, held | 1 / 1 s |  |" in table


@pytest.mark.slow
@pytest.mark.ray
def test_every_figure_is_measured_at_toy_size(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run([SCRIPT, "--toy"], env=environment, check=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == []
    found = {each["name"] for each in results["figures"]}
    assert found >= {"uniform", "trainer", "artifact", "memory_train", "task_30_time", "two_tasks"}
