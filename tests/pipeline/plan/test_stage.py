"""Stages to artifacts, and what is left to run of one plan or several."""

import dataclasses
import re
from pathlib import Path

import pytest

from pipeline.plan.schedule import sessions
from pipeline.plan.stage import External, ResolvedStage, Stage, resolve
from pipeline.storage import Local, artifact
from pipeline.storage.artifact import folder_name


def toy(config, inputs, out_dir, context):
    (out_dir / "out.txt").write_text(str(config))


def other(config, inputs, out_dir, context):
    (out_dir / "out.txt").write_text("other")


def stage(name, *sources, config=None, session="", **roles):
    inputs = {**{source.name: source for source in sources}, **roles}
    return Stage(name, toy, config or {"of": name}, inputs, session)


def chain():
    """prepare -> train/1 -> evaluate/1; train/1 -> train/2 -> evaluate/2; both -> report."""
    prepare = stage("prepare", session="prepare")
    train1 = stage("train/1", prepare, session="sequence")
    evaluate1 = stage("evaluate/1", train1, prepare, session="sequence")
    train2 = stage("train/2", train1, prepare, session="sequence")
    evaluate2 = stage("evaluate/2", train2, prepare, session="sequence")
    report = stage("report", evaluate1, evaluate2, session="report")
    return [prepare, train1, evaluate1, train2, evaluate2, report]


def finish(stage):
    with artifact.writing(stage.folder, stage.record) as out:
        (out / "out.txt").write_text(stage.name)


def finish_all(stages, storage, *names):
    resolved = resolve(stages, Local(storage))
    for name in names:
        finish(resolved[name])


def names_of(found):
    return [[stage.name for stage in session.stages] for session in found]


def fingerprint(stage, storage="storage"):
    return resolve([stage], Local(Path(storage)))[stage.name].fingerprint


def test_equal_stages_of_one_plan_are_one_artifact(tmp_path):
    base = stage("base")
    solo = stage("solo/1", base, config={"epochs": 1})
    train = stage("train/1", base, config={"epochs": 1})
    resolved = resolve([base, solo, train], Local(tmp_path))
    assert resolved["solo/1"] is resolved["train/1"]
    assert resolved["solo/1"].folder != resolved["base"].folder


def test_equal_stages_of_two_plans_are_one_artifact(tmp_path):
    first, second = resolve(chain(), Local(tmp_path)), resolve(chain(), Local(tmp_path))
    assert {n: w.folder for n, w in first.items()} == {n: w.folder for n, w in second.items()}


def test_folders_are_readable_and_lie_in_the_storage(tmp_path):
    stage = resolve(chain(), Local(tmp_path))["train/1"]
    assert stage.folder.parent == tmp_path / "stages"
    assert stage.folder.name == f"toy-1-{stage.fingerprint[:16]}"


@pytest.mark.parametrize("name", ["a/b c", "tâche:1", "../up", "x|y*z"])
def test_any_stage_name_is_a_folder_name(tmp_path, name):
    folder = folder_name(name)
    assert re.fullmatch(r"[\w.-]+", folder)
    (tmp_path / folder).mkdir()
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()


def test_a_fingerprint_changes_with_function_config_and_inputs():
    prepare = stage("prepare")
    base = stage("train", rows=prepare)
    changed = [
        dataclasses.replace(base, fn=other),
        dataclasses.replace(base, config={"of": "something else"}),
        dataclasses.replace(base, inputs={}),
        dataclasses.replace(base, inputs={"model": prepare}),
        dataclasses.replace(base, inputs={"rows": stage("prepare", config={"of": "elsewhere"})}),
        dataclasses.replace(base, inputs={"rows": prepare, "more": prepare}),
    ]
    assert len({fingerprint(base), *map(fingerprint, changed)}) == len(changed) + 1


def test_a_fingerprint_depends_on_inputs_of_inputs():
    deep = [stage("c", stage("b", stage("a", config={"x": x}))) for x in (1, 2)]
    assert fingerprint(deep[0]) != fingerprint(deep[1])


def test_names_sessions_and_places_do_not_change_a_fingerprint():
    base = stage("train", rows=stage("prepare"))
    same = dataclasses.replace(base, name="solo/7", session="elsewhere", train=True)
    assert fingerprint(base) == fingerprint(same)
    assert fingerprint(base) == fingerprint(base, "/another/storage")


def test_an_external_file_counts_by_content_and_not_by_path(tmp_path):
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file in files:
        file.write_text("same")
    one, two = (fingerprint(Stage("p", toy, {}, {"rows": External(file)})) for file in files)
    assert one == two
    files[1].write_text("changed")
    assert fingerprint(Stage("p", toy, {}, {"rows": External(files[1])})) != one


def test_an_external_folder_counts_by_its_matching_files(tmp_path):
    model = Stage("p", toy, {}, {"model": External(tmp_path, ("*.safetensors",))})
    (tmp_path / "model.safetensors").write_text("weights")
    first = fingerprint(model)
    (tmp_path / "readme.md").write_text("x")
    assert fingerprint(model) == first
    (tmp_path / "model.safetensors").write_text("Weights")
    assert fingerprint(model) != first


def test_with_nothing_done_everything_runs_in_sessions_in_order(tmp_path):
    found = sessions({"run": chain()}, Local(tmp_path))
    assert names_of(found) == [
        ["prepare"],
        ["train/1", "evaluate/1", "train/2", "evaluate/2"],
        ["report"],
    ]
    prepare, sequence, report = found
    assert prepare.after == set()
    assert sequence.after == {prepare.name}
    assert report.after == {sequence.name}


def test_complete_stages_are_left_out(tmp_path):
    finish_all(chain(), tmp_path, "prepare", "train/1", "evaluate/1")
    found = sessions({"run": chain()}, Local(tmp_path))
    assert names_of(found) == [["train/2", "evaluate/2"], ["report"]]
    assert found[0].after == set()


def test_a_gap_in_the_middle_is_filled_without_what_came_before(tmp_path):
    finish_all(chain(), tmp_path, "prepare", "train/1", "train/2", "evaluate/2")
    assert names_of(sessions({"run": chain()}, Local(tmp_path))) == [["evaluate/1"], ["report"]]


def test_what_only_finished_stages_need_is_not_computed_again(tmp_path):
    finish_all(chain(), tmp_path, "train/2", "evaluate/1", "evaluate/2")
    assert names_of(sessions({"run": chain()}, Local(tmp_path))) == [["report"]]
    finish_all(chain(), tmp_path, "report")
    assert sessions({"run": chain()}, Local(tmp_path)) == []


def test_a_lost_input_of_an_unfinished_stage_is_computed_again(tmp_path):
    finish_all(chain(), tmp_path, "evaluate/1", "train/2")
    found = sessions({"run": chain()}, Local(tmp_path))
    assert names_of(found) == [["prepare"], ["evaluate/2"], ["report"]]


def test_a_corrupt_artifact_stops_the_planning(tmp_path):
    finish_all(chain(), tmp_path, "prepare")
    (resolve(chain(), Local(tmp_path))["prepare"].folder / "out.txt").unlink()
    with pytest.raises(artifact.CorruptArtifact, match=r"prepare-.*out\.txt is missing"):
        sessions({"run": chain()}, Local(tmp_path))


def two_methods():
    """Two runs that share prepare and train/1 and differ from train/2 on."""
    runs = {}
    for label in ("plain", "gated"):
        prepare = stage("prepare", session="prepare")
        train1 = stage("train/1", prepare, session="sequence")
        attribute = stage("attribute/1", train1, session="sequence")
        sources = [train1, attribute] if label == "gated" else [train1]
        train2 = stage("train/2", *sources, config={"m": label}, session="sequence")
        report = stage("report", train2, config={"m": label}, session="report")
        between = [attribute] if label == "gated" else []
        runs[label] = [prepare, train1, *between, train2, report]
    return runs


def test_what_runs_share_is_one_session_before_what_they_do_not(tmp_path):
    found = sessions(two_methods(), Local(tmp_path))
    by_owners = {(s.owners, tuple(w.name for w in s.stages)): s for s in found}
    both = ("gated", "plain")
    assert set(by_owners) == {
        (both, ("prepare",)),
        (both, ("train/1",)),
        (("plain",), ("train/2",)),
        (("gated",), ("attribute/1", "train/2")),
        (("plain",), ("report",)),
        (("gated",), ("report",)),
    }
    shared = by_owners[both, ("train/1",)].name
    assert by_owners[("plain",), ("train/2",)].after == {shared}
    assert by_owners[("gated",), ("attribute/1", "train/2")].after == {shared}
    assert len({s.name for s in found}) == len(found)


def test_every_missing_artifact_is_made_in_exactly_one_session(tmp_path):
    found = sessions(two_methods(), Local(tmp_path))
    folders = [stage.folder for session in found for stage in session.stages]
    assert len(folders) == len(set(folders)) == 7


def test_a_stage_that_another_command_finishes_meanwhile_is_missing_for_all_runs(
    tmp_path, monkeypatch
):
    """Else runs would share only some of a chain, and sessions would wait for each other."""
    runs, finished = {}, []
    for label in ("one", "two"):
        train1 = stage("train/1", session="sequence")
        evaluate1 = stage("evaluate/1", train1, session="sequence")
        train2 = stage("train/2", train1, config={"m": label}, session="sequence")
        report = stage("report", train2, evaluate1, config={"m": label}, session="sequence")
        runs[label] = [train1, evaluate1, train2, report]
    shared = resolve(runs["one"], Local(tmp_path))["train/1"]
    is_complete = ResolvedStage.is_complete

    def then_finished(work):
        found = is_complete(work)
        if work.folder == shared.folder and not finished:
            finished.append(work)
            finish(work)
        return found

    monkeypatch.setattr(ResolvedStage, "is_complete", then_finished)
    found = {session.name: session for session in sessions(runs, Local(tmp_path))}
    assert names_of(found.values())[0] == ["train/1", "evaluate/1"]
    for session in found.values():
        assert not any(session.name in found[name].after for name in session.after)


def test_a_second_run_needs_only_its_own_part(tmp_path):
    runs = two_methods()
    finish_all(runs["plain"], tmp_path, "prepare", "train/1", "train/2", "report")
    found = sessions(runs, Local(tmp_path))
    assert names_of(found) == [["attribute/1", "train/2"], ["report"]]
    assert {s.owners for s in found} == {("gated",)}
