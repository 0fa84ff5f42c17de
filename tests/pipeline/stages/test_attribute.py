"""A model that has learned nothing: the error says what to do."""

import pytest


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("1e-6", "train longer or set importance.correct_only to false"),
        ("1", r"its training loss rose from [\d.]+ to [\d.e+]+: lower training.learning_rate"),
    ],
)
def test_a_model_without_a_right_answer_is_explained_by_its_loss(
    tiny_config, run_in_process, tmp_path, rate, said
):
    config = tiny_config(
        tmp_path / "storage", f"training.learning_rate={rate}", "training.epochs=2",
        "model.pretraining.epochs=1", "tasks.count=1", "base.protect=none",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"answers none of the .* rows correctly; {said}$"):
        run_in_process(config)
