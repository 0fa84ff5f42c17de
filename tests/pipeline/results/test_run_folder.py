"""A run folder keeps one config: who may run into it again."""

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.results.run_folder import read_trials, runs_in, write_trials
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


@pytest.mark.parametrize("content", ['{"stages": []}', "[]", "{"])
def test_a_folder_that_lost_its_metrics_has_no_finished_run(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match=r"no finished run \(no metrics\.json\)"):
        runs_in(tmp_path)


def test_trials_that_were_cut_off_are_named(tmp_path):
    assert read_trials(tmp_path) == []
    table = pa.table({"trial": [0, 1]})
    write_trials(tmp_path, table)
    assert read_trials(tmp_path) == [{"trial": 0}, {"trial": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["trials.parquet"]
    file = tmp_path / "trials.parquet"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"trials\.parquet: .*; run the same command again"):
        read_trials(tmp_path)


def test_trials_replace_older_ones_whole(tmp_path, monkeypatch):
    write_trials(tmp_path, pa.table({"trial": [0]}))

    def cut_off(table, place):
        Path(place).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr("pyarrow.parquet.write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_trials(tmp_path, pa.table({"trial": [0, 1]}))
    assert read_trials(tmp_path) == [{"trial": 0}]
