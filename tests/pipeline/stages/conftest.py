"""Runs without Ray: of a tiny config, and of one small task on a base folder."""

import json

import pytest
from reference.record_run import recorded
from reference.sums import ANSWERS, QUESTIONS

from pipeline.config.check import check_inputs
from pipeline.config.loading import validate
from pipeline.execution.session import run_stages
from pipeline.results.model_card import write_model_folder
from pipeline.run import open_run
from pipeline.stages.context import Context


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """One storage, so that the tests share the base model."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def run(storage, tiny_config, run_in_process):
    """Runs a tiny config without Ray, but for stages that are there; its stages by name."""

    def of(*overrides, **options):
        return run_in_process(tiny_config(storage, *overrides, **options))

    return of


@pytest.fixture
def trained(tmp_path):
    """Runs one task on a base folder without Ray, in the test's own storage; the final folder."""

    def run(base, /, *, chat=False, **sections):
        lines = [
            json.dumps({"q": q, "a": a}) + "\n" for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        item = {"name": "sums", "train": str(tmp_path / "rows.jsonl")}
        item |= {"prompt": "{q}", "answer": "{a}"}
        config = validate(
            {
                "name": base.name,
                "storage": str(tmp_path / "storage"),
                "method": "sequential",
                "model": {"path": str(base)},
                "tasks": {"format": "jsonl", "sequence": [item], "chat_template": chat},
                "training": {"epochs": 60, "batch_size": 6, "learning_rate": 1e-2},
                **sections,
            }
        )
        check_inputs(config)
        opened = open_run(config)
        resolved = list(opened.resolved.values())
        run_stages(resolved, Context(ray_data=False), lambda records: None)
        opened.folder.mkdir()
        write_model_folder(opened, recorded("gate-seed0"), None)
        return opened.resolved

    return run
