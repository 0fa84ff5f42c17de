"""Which stages a config asks for, and which of them configs share."""

import pytest
from reference import trace_files

from agcl.tasks import trace
from pipeline.config import loading
from pipeline.config.loading import flat
from pipeline.plan.plan import plan
from pipeline.plan.schedule import sessions
from pipeline.plan.stage import resolve
from pipeline.storage import Local
from pipeline.tracking.tracker import allowed_name

PREPARED = ["tokenizer", "prepare/harbour", "prepare/valley", "prepare/base"]
BASE = [*PREPARED, "pretrain", "evaluate/0-base"]
MEASURED_BASE = ["own_text", "attribute/0-base"]


@pytest.fixture
def stages(tiny_config, tmp_path):
    """Works by stage name of a tiny config with overrides."""

    def of(*overrides, **options):
        config = tiny_config(tmp_path, *overrides, **options)
        return resolve(plan(config).stages, Local(tmp_path))

    return of


def changed(before, after):
    """Names of the stages of `after` that are not artifacts of `before`."""
    known = {stage.fingerprint for stage in before.values()}
    return {name for name, stage in after.items() if stage.fingerprint not in known}


def test_sequential_trains_and_evaluates_task_after_task(stages):
    assert list(stages(method="sequential")) == [
        *BASE,
        "train/1-harbour",
        "evaluate/1-harbour",
        "train/2-valley",
        "evaluate/2-valley",
        "report",
    ]


def test_agcl_measures_the_base_first_and_every_task_right_after_it(stages):
    resolved = stages()
    assert list(resolved) == [
        *BASE,
        *MEASURED_BASE,
        "train/1-harbour",
        "attribute/1-harbour",
        "evaluate/1-harbour",
        "train/2-valley",
        "attribute/2-valley",
        "evaluate/2-valley",
        "report",
    ]


def test_agcl_from_solo_models_trains_one_for_every_task_before_it_is_protected(stages):
    names = list(stages("importance.source=solo"))
    for task in ("1-harbour", "2-valley"):
        assert names.index(f"solo/{task}") < names.index(f"train/{task}")


def inputs(resolved, name):
    folders = {found.folder: stage for stage, found in resolved.items()}
    return {role: folders[folder] for role, folder in resolved[name].inputs.items()}


def test_each_task_starts_from_the_last_model_and_the_sum_of_moments_so_far(stages):
    resolved = stages("tasks.count=3")
    assert inputs(resolved, "train/1-harbour") == {
        "model": "pretrain",
        "rows": "prepare/harbour",
        "base_importance": "attribute/0-base",
    }
    assert inputs(resolved, "train/3-island") == {
        "model": "train/2-valley",
        "rows": "prepare/island",
        "base_importance": "attribute/0-base",
        "past": "attribute/2-valley",
    }
    assert inputs(resolved, "attribute/2-valley") == {
        "past": "attribute/1-harbour",
        "model": "train/2-valley",
        "rows": "prepare/valley",
    }


def test_saving_memory_by_recomputing_does_not_make_anything_again(stages):
    recomputed = stages("training.activation_checkpointing=true")
    assert not changed(stages(), recomputed)
    assert recomputed["train/1-harbour"].config["activation_checkpointing"]
    compiled = [
        stages("training.compile=true", f"training.{s}")
        for s in ("activation_checkpointing=true", "activation_checkpointing=false")
    ]
    assert "train/1-harbour" in changed(*compiled)


def test_adapters_of_merged_tasks_are_those_that_were_trained(stages):
    resolved = stages("tasks.count=3", "merge.factor=0.5", method="olora")
    assert inputs(resolved, "train/3-island") == {
        "model": "merge/2-valley",
        "rows": "prepare/island",
        "adapter/harbour": "train/1-harbour",
        "adapter/valley": "train/2-valley",
    }


def test_solo_importances_come_from_models_that_saw_the_task_alone(stages):
    resolved = stages("importance.source=solo")
    assert inputs(resolved, "solo/2-valley") == {"model": "pretrain", "rows": "prepare/valley"}
    assert inputs(resolved, "attribute/2-valley")["model"] == "solo/2-valley"
    assert inputs(resolved, "train/2-valley")["importance/harbour"] == "attribute/1-harbour"


def test_every_model_is_scored_on_every_task_and_on_the_base_skill(stages):
    resolved = stages()
    for name, model in [
        ("evaluate/0-base", "pretrain"),
        ("evaluate/1-harbour", "train/1-harbour"),
        ("evaluate/2-valley", "train/2-valley"),
    ]:
        assert inputs(resolved, name) == {
            "model": model,
            "rows/harbour": "prepare/harbour",
            "rows/valley": "prepare/valley",
            "rows/base": "prepare/base",
        } | ({"base": "pretrain"} if model != "pretrain" else {})


def test_methods_share_everything_up_to_the_first_protected_task(stages):
    sequential, gate = stages(method="sequential"), stages(method="gate")
    assert changed(sequential, gate) == {
        "attribute/1-harbour",
        "attribute/2-valley",
        "train/2-valley",
        "evaluate/2-valley",
        "report",
    }
    assert sequential["train/1-harbour"].folder == gate["train/1-harbour"].folder


def test_where_the_base_is_protected_methods_share_it_and_train_the_first_task_apart(stages):
    sequential, unprotected, agcl = (
        stages(method=method) for method in ("sequential", "base_unprotected", "agcl")
    )
    assert sequential["train/1-harbour"].folder == unprotected["train/1-harbour"].folder
    for other in (sequential, unprotected):
        assert changed(other, agcl) == {*MEASURED_BASE, *TRAINED, *MEASURED, "report"}


def test_the_first_solo_model_is_the_first_model_of_any_sequence(stages):
    resolved = stages("importance.source=solo", method="gate")
    sequential = stages(method="sequential")
    measured = resolved["attribute/1-harbour"].inputs["model"]
    assert measured == resolved["train/1-harbour"].folder == sequential["train/1-harbour"].folder
    assert resolved["solo/2-valley"].folder != resolved["train/2-valley"].folder


@pytest.mark.parametrize(
    "positions",
    ['"model_type": "gpt2", "n_positions"', '"model_type": "llama", "max_position_embeddings"'],
)
def test_rows_longer_than_the_models_positions_are_too_long(tiny_config, tmp_path, positions):
    (tmp_path / "config.json").write_text(f"{{{positions}: 128}}")
    for limit, expected in ((512, 128), (100, 100)):
        config = tiny_config(tmp_path, f"model.path={tmp_path}", f"tasks.max_length={limit}")
        (stage, *_) = plan(config).stages
        assert stage.config["max_length"] == expected


def test_with_importances_of_earlier_runs_the_first_solo_model_is_one_of_its_own(
    tiny_config, tmp_path
):
    (tmp_path / "past.safetensors").write_bytes(b"past")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = tiny_config(
        tmp_path,
        f"model.path={tmp_path}",
        f"importance.past=[{tmp_path}/past.safetensors]",
        "importance.source=solo",
        "base.protect=none",
    )
    resolved = resolve(plan(config).stages, Local(tmp_path))
    assert list(resolved["solo/1-harbour"].inputs) == ["model", "rows"]
    assert list(resolved["train/1-harbour"].inputs) == ["model", "rows", "importance/past-0"]


TRAINED = {"train/1-harbour", "train/2-valley", "evaluate/1-harbour", "evaluate/2-valley"}
MEASURED = {"attribute/1-harbour", "attribute/2-valley"}
FROM_TASK_2 = {"train/2-valley", "attribute/2-valley", "evaluate/2-valley", "report"}
"""What follows the first task, which nothing protects if the base is not."""


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs=3",
        "training.learning_rate=1e-2",
        "training.batch_size=4",
        "training.micro_batch_size=2",
        "training.schedule=linear",
        "training.warmup=0.1",
    ],
)
def test_training_settings_change_what_is_trained_but_no_preparation(stages, override):
    assert changed(stages(), stages(override)) == TRAINED | MEASURED | {"report"}


@pytest.mark.parametrize("kind", ["prepare", "train", "attribute", "evaluate", "report"])
def test_stages_of_a_kind_have_the_same_keys_whatever_is_set(stages, kind, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    settings = [
        "training.schedule=linear",
        "training.warmup=0.1",
        "importance.entries=true",
        f"evaluation.text={tmp_path}/text.txt",
        f"evaluation.probes=[{tmp_path}/text.txt]",
        "evaluation.validation=0.2",
        "evaluation.rows=validation",
    ]
    resolved = [*stages().items(), *stages(*settings).items()]
    keys = {frozenset(stage.config) for name, stage in resolved if name.startswith(kind)}
    assert len(keys) == 1


def test_the_seed_changes_models_but_no_data(stages):
    before, after = stages(), stages("seed=1")
    assert changed(before, after) == set(before) - set(PREPARED)


def test_the_data_seed_changes_the_data(stages):
    assert set(PREPARED) <= changed(stages(), stages("tasks.seed=1"))


@pytest.mark.parametrize(
    "override",
    [
        "protect.0.strength=0.5",
        "protect.0.log_scale=1e3",
        "protect.0.exponent=2",
        "protect.0.on=gradient",
        "protect.0.ungated=train",
    ],
)
def test_how_importances_are_used_changes_no_attribution_of_the_first_task(stages, override):
    different = changed(stages(method="gate"), stages(override, method="gate"))
    assert different == FROM_TASK_2
    protected = ["protect.0.kind=gate"]
    different = changed(stages(*protected), stages(*protected, override))
    assert different == {*TRAINED, *MEASURED, "report"}


def test_how_importances_are_used_changes_no_solo_attribution_at_all(stages):
    for source, trained in (
        (["base.protect=none"], {"train/2-valley", "evaluate/2-valley"}),
        ([], TRAINED),
    ):
        solo = [*source, "protect.0.kind=gate", "importance.source=solo"]
        different = changed(stages(*solo), stages(*solo, "protect.0.strength=0.5"))
        assert different == {*trained, "report"}


@pytest.mark.parametrize(
    "override", ["importance.top_k=2", "importance.rules=cp", "importance.samples=5"]
)
def test_how_importances_are_measured_changes_attributions_and_what_follows(stages, override):
    unprotected = stages(method="base_unprotected")
    different = changed(unprotected, stages(override, method="base_unprotected"))
    assert different == {"attribute/1-harbour", *FROM_TASK_2}
    if override == "importance.samples=5":  # The base has samples of its own.
        assert changed(stages(), stages(override)) == {"attribute/1-harbour", *FROM_TASK_2}
    else:
        of_base = {"attribute/0-base", *TRAINED}
        assert changed(stages(), stages(override)) == {*of_base, *MEASURED, "report"}


@pytest.mark.parametrize(
    "override",
    [
        "resources.num_workers=2",
        "resources.cpus_per_worker=2",
        "tracking.enabled=false",
        "name=another",
    ],
)
def test_where_and_under_which_name_a_run_runs_changes_nothing(stages, override):
    assert changed(stages(), stages(override)) == set()


def test_the_storage_does_not_change_fingerprints(tiny_config, tmp_path):
    resolved = [
        resolve(plan(tiny_config(tmp_path / place)).stages, Local(tmp_path / place))
        for place in "ab"
    ]
    assert changed(*resolved) == set()


@pytest.fixture
def jsonl(tmp_path):
    """A config of two JSON-lines tasks; their files are `one.jsonl` and `two.jsonl`."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    file = tmp_path / "config.yaml"
    file.write_text(
        f"storage: {tmp_path}/storage\ntasks:\n  format: jsonl\n  sequence:\n"
        f"    - {{name: first, train: {tmp_path}/one.jsonl}}\n"
        f"    - {{name: second, train: {tmp_path}/two.jsonl}}\n"
    )
    return lambda *overrides: loading.load(file, overrides)


def works_of(config):
    return resolve(plan(config).stages, config.storage)


def test_a_changed_data_file_changes_what_reads_it_and_what_follows(jsonl, tmp_path):
    before = works_of(jsonl())
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    different = changed(before, works_of(jsonl()))
    assert "prepare/second" in different
    assert "train/2-second" in different
    assert not different & {"prepare/first", "train/1-first", "attribute/1-first", "pretrain"}


def test_a_moved_data_file_changes_nothing(jsonl, tmp_path):
    before = works_of(jsonl())
    (tmp_path / "two.jsonl").rename(tmp_path / "moved.jsonl")
    moved = jsonl(f"tasks.sequence.1.train={tmp_path}/moved.jsonl")
    assert changed(before, works_of(moved)) == set()


def done_by(found):
    """Run sessions in a legal order on paper; the folders in the order they were made."""
    waiting, made = list(found), []
    while waiting:
        ready = [s for s in waiting if not s.after & {other.name for other in waiting}]
        assert ready, f"sessions wait for each other: {[s.name for s in waiting]}"
        # The worst case: independent sessions in the opposite order.
        session = ready[-1]
        waiting.remove(session)
        for stage in session.stages:
            to_make = {w.folder for s in found for w in s.stages}
            missing = [f for f in stage.inputs.values() if f in to_make and f not in made]
            assert not missing, f"{stage.name} needs {missing}"
            made.append(stage.folder)
    return made


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_sessions_of_many_methods_and_seeds_never_wait_for_each_other(
    tiny_config, tmp_path, num_tasks, order
):
    variants = {
        "sequential": {"method": "sequential"},
        "gate": {"settings": ["protect.0.kind=gate"]},
        "project": {"settings": ["protect.0.kind=project"]},
        "solo": {"settings": ["protect.0.kind=gate", "importance.source=solo"]},
        "solo-project": {"settings": ["protect.0.kind=project", "importance.source=solo"]},
        "other-seed": {"settings": ["seed=1", "importance.source=solo"]},
    }
    plans = {}
    for label, how in list(variants.items())[::order]:
        config = tiny_config(
            tmp_path,
            f"tasks.count={num_tasks}",
            *how.get("settings", ()),
            method=how.get("method"),
        )
        plans[label] = plan(config).stages
    made = done_by(sessions(plans, Local(tmp_path)))
    expected = {w.folder for s in plans.values() for w in resolve(s, Local(tmp_path)).values()}
    assert set(made) == expected
    assert len(made) == len(expected)


def test_what_the_base_is_measured_on_has_a_seed_of_its_own(stages):
    resolved, other, reseeded = stages(), stages("seed=1"), stages("base.seed=1")
    for name in ("own_text", "attribute/0-base"):
        assert resolved[name].config == other[name].config != reseeded[name].config


def test_the_base_is_measured_once_and_protected_from_the_first_task_on(stages):
    resolved = stages()
    assert inputs(resolved, "attribute/0-base") == {"model": "pretrain", "rows/0": "own_text"}
    for train in ("train/1-harbour", "train/2-valley"):
        assert inputs(resolved, train)["base_importance"] == "attribute/0-base"
    assert resolved["attribute/0-base"].config["moments"] == "uniform"


def test_methods_share_the_bases_importance_and_its_energy_changes_training_only(stages):
    # Another method drops the file's sections, so all are set beside it.
    settings = (
        *("base.protect=self", "base.samples=2", "base.tokens=8"),
        "importance.batch_size=8",
    )
    protected = stages(*settings)
    for other, trains_the_same in (
        (stages(*settings, "protect.0.unit_inputs=true", method="inflora"), False),
        (stages(*settings, "base.energy=0.5"), False),
        # How tasks are measured and protected changes nothing before there is one.
        (stages(*settings, method="project_uniform"), True),
        (stages(*settings, "protect.0.energy=0.5"), True),
        (stages(*settings, method="project_random"), False),
    ):
        assert not changed(protected, other) & {"own_text", "attribute/0-base"}
        assert ("train/1-harbour" not in changed(protected, other)) is trains_the_same
        assert "train/2-valley" in changed(protected, other)


def test_directions_of_weights_need_no_importance_and_no_settings_of_one(stages):
    resolved = stages(method="project_weights")
    assert resolved.keys() == stages(method="sequential").keys()
    assert inputs(resolved, "train/2-valley") == {
        "model": "train/1-harbour",
        "rows": "prepare/valley",
    }
    [item] = resolved["train/1-harbour"].config["protect"]
    assert item == {
        "kind": "project",
        "directions": "weights",
        "energy": 0.8,
        "ungated": "freeze",
        "weighting": None,
        "unit_inputs": None,
    }
    unused = ("base.protect=self", "protect.0.weighting=uniform", "importance.source=solo")
    assert not changed(resolved, stages(*unused, method="project_weights"))
    assert "train/1-harbour" in changed(
        resolved, stages("protect.0.energy=0.5", method="project_weights")
    )


def test_a_gate_beside_directions_of_weights_is_measured_and_starts_with_the_second_task(stages):
    items = "[{kind: gate}, {kind: project, directions: weights}]"
    resolved = stages(f"protect={items}", "base.protect=none")
    kinds = {
        task: [item["kind"] for item in resolved[f"train/{task}"].config["protect"]]
        for task in ("1-harbour", "2-valley")
    }
    assert kinds == {"1-harbour": ["project"], "2-valley": ["gate", "project"]}
    assert resolved["attribute/1-harbour"].config["moments"] is None
    assert resolved["attribute/1-harbour"].config["entries"]
    assert inputs(resolved, "train/2-valley")["importance/harbour"] == "attribute/1-harbour"


@pytest.mark.parametrize("method", ["sequential", "replay", "lora"])
def test_without_a_protection_the_section_base_changes_nothing(stages, method):
    plain = stages(method=method)
    assert not changed(plain, stages("base.protect=self", method=method))


def test_all_tasks_at_once_can_protect_the_base(stages):
    resolved = stages("base.protect=self", "protect=[{kind: project}]", method="joint")
    assert inputs(resolved, "train/joint")["base_importance"] == "attribute/0-base"
    assert "attribute/2-valley" not in resolved


def test_solo_models_are_trained_without_protection(stages):
    solo = "importance.source=solo"
    resolved, unprotected = stages(solo), stages(solo, method="base_unprotected")
    assert resolved["solo/1-harbour"].folder == unprotected["train/1-harbour"].folder
    assert resolved["solo/1-harbour"].folder != resolved["train/1-harbour"].folder


def test_corda_starts_from_the_base_models_own_text_and_shares_it(stages):
    resolved = stages(method="corda")
    assert list(resolved) == [
        *BASE,
        "own_text",
        "corda",
        "train/1-harbour",
        "evaluate/1-harbour",
        "train/2-valley",
        "evaluate/2-valley",
        "report",
    ]
    assert not changed(stages(method="agcl"), resolved) & {"own_text"}
    other = stages("training.learning_rate=0.1", "adapter.merge=false", method="corda")
    assert "corda" not in changed(resolved, other)
    assert "corda" in changed(resolved, stages("adapter.rank=4", method="corda"))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("corda", []),
        ("agcl", []),
        ("agcl", ["base.protect=none"]),
        ("project_weights", ["base.protect=self"]),
        ("lora", ["base.protect=self"]),
    ],
)
def test_the_base_model_writes_text_only_where_the_config_says_that_it_matters(
    stages, tiny_config, tmp_path, method, settings
):
    config = tiny_config(tmp_path, *settings, method=method)
    assert config.measures_base is ("own_text" in stages(*settings, method=method))


def test_stages_of_one_kind_have_the_same_settings(stages):
    resolved = [
        stage
        for method in ("agcl", "sequential", "kl", "lora_agcl", "osf", "merge_sqrt")
        for stage in stages(method=method).values()
    ]
    resolved += stages("training.optimizer=sgd", "training.learning_rate=0.3").values()
    kinds = {}
    for stage in resolved:
        kinds.setdefault(stage.fn.__name__, set()).add(frozenset(stage.config))
    assert {"train", "evaluate", "prepare", "pretrain", "merge"} <= kinds.keys()
    assert not {name for name, keys in kinds.items() if len(keys) > 1}


@pytest.fixture
def own(stages, tmp_path):
    """Works of two tasks of the user's, in files or in a folder of the library `datasets`."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            file = tmp_path / folder / f"{split}.jsonl"
            file.write_text('{"prompt": "Who?", "answer": " Ada"}\n' * 4)

    def of(*overrides, format="jsonl", **options):
        names = {"one": "one", "two (2024)": "two"}
        tasks = [f"{{name: {name}, path: {tmp_path / f}}}" for name, f in names.items()]
        section = f"tasks={{format: {format}, sequence: [{', '.join(tasks)}]}}"
        return stages(section, *overrides, **options)

    return of


SCORED = {"evaluate/0-base", "evaluate/1-one", "evaluate/2-two (2024)", "report"}


@pytest.mark.parametrize("place", ["tasks.scorer", "tasks.sequence.0.scorer"])
@pytest.mark.parametrize("format", ["jsonl", "huggingface", "alpaca", "messages"])
@pytest.mark.parametrize(
    ("scorer", "settings"),
    [
        ("rouge_l", {"method": "sequential"}),
        ("olora_match", {"method": "agcl"}),
        ("normalised_exact_match", {"method": "solo"}),
        ("own.module:function", {"method": "joint"}),
    ],
)
def test_another_scorer_scores_again_and_trains_nothing_again(own, place, format, scorer, settings):
    before = own(format=format, **settings)
    after = own(f"{place}={scorer}", format=format, **settings)
    scored = {name for name in after if name.startswith(("evaluate/", "report"))}
    assert changed(before, after) == scored


def test_a_scorer_that_gives_partial_credit_changes_what_is_attributed(own):
    before, after = own(), own("tasks.sequence.1.scorer=rouge_l")
    assert changed(before, after) == SCORED | {"attribute/2-two (2024)"}
    before, after = own(), own("tasks.scorer=rouge_l")
    of_both = {"attribute/1-one", "train/2-two (2024)", "attribute/2-two (2024)"}
    assert changed(before, after) == SCORED | of_both
    of_all = "importance.correct_only=false"
    assert changed(own(of_all), own(of_all, "tasks.scorer=rouge_l")) == SCORED


@pytest.mark.parametrize(
    ("scorer", "only"),
    [
        *((name, True) for name in ("exact_match", "normalised_exact_match", "olora_match")),
        *((name, False) for name in ("rouge_l", "first_character", "own.module:function")),
    ],
)
def test_only_answers_that_are_right_or_wrong_are_attributed_where_right(own, scorer, only):
    stage = own(f"tasks.scorer={scorer}")["attribute/1-one"]
    assert stage.config["correct_only"] is only
    stage = own(f"tasks.scorer={scorer}", "importance.correct_only=false")["attribute/1-one"]
    assert stage.config["correct_only"] is False


def test_a_benchmarks_own_scorers_score_and_decide_what_is_attributed(tiny_config, tmp_path):
    trace_files.write(tmp_path / "trace", rows=3)
    planned = plan(tiny_config(tmp_path, f"tasks={{format: trace, path: {tmp_path / 'trace'}}}"))
    assert planned.scorers == trace.SCORERS
    resolved = resolve(planned.stages, Local(tmp_path))
    scorers = dict(resolved["evaluate/0-base"].config["task_scorers"])
    assert scorers == {**trace.SCORERS, "base": "exact_match"}
    all_rows = {
        name.partition("-")[2]
        for name, stage in resolved.items()
        if name.startswith("attribute/") and not stage.config["correct_only"]
    }
    assert all_rows == {"base", "MeetingBank", "Py150", "ScienceQA", "20Minuten"}


def test_a_scorer_of_rows_that_are_only_measured_counts_for_nothing(stages, tmp_path):
    (tmp_path / "known.jsonl").write_text('{"prompt": "Who?", "answer": " Ada"}\n')
    known = f"{{format: jsonl, sequence: [{{name: known, train: {tmp_path / 'known.jsonl'}}}]}}"
    settings = "base.protect=rows", f"base.rows={known}"
    assert not changed(stages(*settings), stages(*settings, "base.rows.scorer=rouge_l"))


def test_what_stages_depend_on_has_names_that_mlflow_takes(own):
    keys = {key for stage in own().values() for key, _ in flat(stage.config)}
    assert keys == set(map(allowed_name, keys))
