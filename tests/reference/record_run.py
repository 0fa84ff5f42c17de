"""Records small runs for the tests of reports and metrics, and loads them.

What the runs computed is not checked here: these files only stand in for live runs. Record them
again when the results themselves change, for example when `metrics.json` gets a new key. From the
root of the repository (one or two minutes, starts Ray):

    python -m tests.reference.record_run
"""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from pipeline.config import loading
from pipeline.results.files import CONFIG_FILE, RESULT_FILE
from pipeline.results.results import RunResult
from pipeline.results.run_folder import read_result
from pipeline.run import execute, open_run
from pipeline.stages.files import BASE_KNOWLEDGE, METRICS, PREDICTIONS

RECORDED = Path(__file__).parent.parent / "pipeline" / "results" / "recorded"
LABELS = ["sequential-seed0", "sequential-seed1", "agcl-seed0", "agcl-seed1", "gate-seed0"]
WITH_PREDICTIONS = "sequential-seed0"
CONFIG = """
name: facts
storage: storage
tasks: {format: facts, count: 3, entities: 3}
model: {pretraining: {entities: 8, epochs: 8}}
training: {epochs: 20, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-3}
evaluation: {batch_size: 5}
"""
SETTINGS = {"sequential": [], "agcl": ["importance.entries=false"], "gate": []}
"""`agcl` collects no entry importances and `gate` does, so a report on both shows both cases."""


def recorded(label: str) -> RunResult:
    """Load the result of a recorded run."""
    return read_result(RECORDED / label)


def record() -> None:
    """Run all methods in a temporary folder and replace the recorded files."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root, "config.yaml")
        file.write_text(CONFIG, encoding="utf-8")
        runs = {}
        for label in LABELS:
            method, seed = label.split("-seed")
            settings = [f"storage={root}/storage", f"seed={seed}", *SETTINGS[method]]
            runs[label] = open_run(loading.load(file, settings, method=method), Path(root, label))
        execute(
            runs,
            Path(root, "comparison"),
            title="facts",
            command="agcl compare facts.yaml --methods sequential,agcl,gate --seeds 2",
            console=Console(),
        )
        shutil.rmtree(RECORDED, ignore_errors=True)
        for label, run in runs.items():
            (RECORDED / label).mkdir(parents=True)
            for name in (CONFIG_FILE, METRICS, RESULT_FILE):
                text = (run.folder / name).read_text(encoding="utf-8").replace(f"{root}/", "")
                (RECORDED / label / name).write_text(text, encoding="utf-8")
        evaluations = [
            run.folder
            for name, run in runs[WITH_PREDICTIONS].resolved.items()
            if name.startswith("evaluate/")
        ]
        for index, folder in enumerate(evaluations):
            target = RECORDED / WITH_PREDICTIONS / "scores" / str(index)
            target.mkdir(parents=True)
            for name in (PREDICTIONS, BASE_KNOWLEDGE):
                shutil.copyfile(folder / name, target / name)


if __name__ == "__main__":
    record()
