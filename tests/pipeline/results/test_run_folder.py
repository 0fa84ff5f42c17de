"""A run folder keeps one config: who may run into it again."""

import pytest
import yaml

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.run import open_run


@pytest.fixture
def folder(tiny_config, tmp_path):
    """The folder of an earlier run, as an older version without `evaluation.text` left it."""
    config = yaml.safe_load(loading.dump(tiny_config(tmp_path / "storage")))
    del config["evaluation"]["text"]
    folder = tmp_path / "storage" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_the_same_config_goes_on(tiny_config, folder):
    assert open_run(tiny_config(folder.parent)).folder == folder


def test_resources_may_change(tiny_config, folder):
    assert open_run(tiny_config(folder.parent, "resources.num_workers=2")).folder == folder


@pytest.mark.parametrize(
    ("setting", "said"),
    [("training.epochs=3", r"training.epochs=\d+, not 3;"), ("seed=4", "seed=0, not 4"),
     ("protect.0.kind=gate", "protect.0.kind=project, not gate; .*; and 6 more")],
)  # fmt: skip
def test_a_finished_run_of_another_config_is_refused_with_both_values(
    tiny_config, folder, setting, said
):
    with pytest.raises(InputError, match=f"holds a run with .*{said}"):
        open_run(tiny_config(folder.parent, setting))


def test_a_run_without_results_is_taken_over(tiny_config, folder):
    (folder / "metrics.json").unlink()
    assert open_run(tiny_config(folder.parent, "training.epochs=3")).folder == folder


def test_a_damaged_config_is_named(tiny_config, folder):
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"tiny/config.yaml: .*delete it to write it again"):
        open_run(tiny_config(folder.parent))
