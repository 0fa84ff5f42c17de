"""A model that answers no row correctly: attributed all the same, unless training made it worse."""

import pytest

from agcl.importance import Importance
from pipeline.execution.session import run_stages
from pipeline.run import open_run
from pipeline.stages.context import Context


@pytest.fixture
def barely_trained(tiny_config, tmp_path):
    def of(rate):
        return tiny_config(
            tmp_path / "storage", f"training.learning_rate={rate}", "training.epochs=2",
            "model.pretraining.epochs=1", "tasks.count=1", "base.protect=none",
        )  # fmt: skip

    return of


def test_a_model_without_a_right_answer_is_attributed_on_all_rows_with_a_warning(barely_trained):
    config, records = barely_trained("1e-6"), []
    config.storage.root.mkdir()
    resolved = open_run(config).resolved
    run_stages(list(resolved.values()), Context(ray_data=False), records.extend)
    said = [record["warning"] for record in records if "warning" in record]
    assert said == [
        "the model answers none of the 12 rows correctly, so the importance is measured on all of "
        "them"
    ]
    folder = resolved["attribute/1-harbour"].folder
    header = Importance.load(folder / "importance.safetensors").header
    assert header["rows_attributed"] == 12
    assert not header["correct_only"]
    assert resolved["report"].is_complete()


def test_a_model_that_training_made_worse_is_refused(barely_trained, run_in_process):
    said = (
        r"rows correctly; its training loss rose from [\d.]+ to [\d.e+]+: lower training.learning"
    )
    with pytest.raises(ValueError, match=said):
        run_in_process(barely_trained("1"))
