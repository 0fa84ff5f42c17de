"""What MLflow holds when processes are killed, or two start at the same time."""

import shutil

import pytest

from pipeline.storage.artifact import write_json
from pipeline.tracking import client as tracking


@pytest.mark.parametrize("written", [0, 1])
def test_a_run_whose_process_was_killed_while_making_it_is_made_once(
    raced, tmp_path, monkeypatch, written
):
    """Killed before the run's file is written the first time, or the second."""
    shutil.copy(raced.file, tmp_path)
    tracker = tracking.Tracker(tmp_path, None)
    calls = []

    def killed(file, value):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(value)
        write_json(file, value)

    monkeypatch.setattr(tracking, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    monkeypatch.undo()
    first = tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    tracker.end(first, "KILLED")
    assert tracker.open(tmp_path, "tiny", {"kind": "sequence"}) == first
    (found,) = tracker.client.search_runs([tracker.experiment])
    assert (found.info.run_id, found.info.status) == (first, "RUNNING")


def test_two_runs_make_one_database_where_a_third_was_killed_while_making_it(raced):
    assert raced.codes == (0, 0)
    assert raced.files == [raced.file]


def test_a_models_folder_is_registered_once_per_run(raced, tmp_path):
    shutil.copy(raced.file, tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("card")
    tracker = tracking.Tracker(tmp_path, None)
    runs = [tracker.start(name, {}, None) for name in ("one", "two")]
    for run in (*runs, *runs):
        tracker.register(run, "sequence", model)
    versions = tracker.client.search_model_versions("name = 'sequence'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert sorted(version.run_id for version in versions) == sorted(runs)


def test_a_locked_database_is_as_good_as_a_server_that_is_down(monkeypatch, tmp_path):
    def locked(*args, **options):
        raise RuntimeError("(sqlite3.OperationalError) database is locked [SQL: SELECT 1]")

    found = tracking.Client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(tracking.TrackingFailed, match="keeps its database locked") as caught:
        found._guarded(locked)()
    assert caught.value.no_answer
