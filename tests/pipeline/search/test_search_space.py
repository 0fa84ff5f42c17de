"""What can be searched, and what no point of a search changes."""

import pytest

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.config.presets import METHODS
from pipeline.search.engine import Search
from pipeline.search.search import example_runs, in_several
from pipeline.search.space import (
    corners,
    default_space,
    distributions,
    own_point,
    space_of,
)


@pytest.fixture
def config(tiny_config, tmp_path):
    return lambda *settings, method="agcl": tiny_config(
        tmp_path / "storage", *settings, method=method
    )


ENERGY = "{type: uniform, low: 0.5, high: 0.9}"


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("sequential", []),
        ("agcl", ["protect.0.energy"]),
        ("ewc", ["protect.0.strength"]),
        (
            "gate",
            [
                "protect.0.log_scale",
                "protect.0.strength",
                "protect.0.exponent",
                "importance.top_k",
            ],
        ),
    ],
)
def test_by_default_the_scaling_of_the_protections_is_searched_and_the_rate(config, method, keys):
    of_method = config(method=method)
    space = space_of(of_method)
    assert list(space) == ["training.learning_rate", *keys]
    rate = of_method.training.learning_rate
    assert (space["training.learning_rate"].low, space["training.learning_rate"].high) == (
        rate / 4,
        rate * 4,
    )


def test_one_task_alone_has_no_earlier_tasks_whose_protection_could_be_searched(config):
    one = ("tasks.count=1",)
    assert list(default_space(config(*one))) == ["training.learning_rate"]
    assert list(default_space(config(*one, method="gate"))) == ["training.learning_rate"]
    of_base = default_space(config(*one, method="ewc_base"))
    assert list(of_base) == ["training.learning_rate", "protect.0.strength"]
    both = default_space(config(*one, "search.objective=base_and_average"))
    assert list(both) == ["training.learning_rate", "base.energy"]


def test_the_config_itself_is_a_point(config):
    own = config("importance.top_k=4", method="gate")
    space = default_space(own)
    point = own_point(own, space)
    assert point == {
        "training.learning_rate": 1.5e-3,
        "protect.0.log_scale": 1e5,
        "protect.0.strength": 1.0,
        "protect.0.exponent": 1.0,
        "importance.top_k": 4,
    }
    for key, distribution in distributions(space).items():
        assert distribution._contains(distribution.to_internal_repr(point[key]))
    assert own_point(config("importance.top_k=3", method="gate"), space) is None


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("{tasks.max_length: {type: int, low: 8, high: 9}}", "search.space.tasks.max_length: only"),
        ("{seed: {type: int, low: 0, high: 9}}", "search.space.seed: only keys of training"),
        ("{evaluation.validation: {type: choice, values: [0.1]}}", "only keys of"),
        ("{training: {type: choice, values: [1]}}", "search.space.training: only keys of"),
        ("{training.epoch: {type: int, low: 1, high: 2}}", "training.epoch: unknown key"),
        (
            "{training.epochs: {type: int, low: 0, high: 2}}",
            "search.space.training.epochs: input should be",
        ),
        ("{protect.0.strength: {type: uniform, low: 0, high: 1}}", "protect.0.strength: unknown"),
        ("{protect.3.energy: {type: uniform, low: 0, high: 1}}", "'3' is not an item of the list"),
        ("{training.epochs: {type: ints, low: 1, high: 2}}", "type: must be one of 'uniform'"),
        ("{training.epochs: {type: int, low: 2, high: 2}}", "low must be below high"),
        ("{training.epochs: {type: int, low: 1}}", "search.space.training.epochs.high: field"),
        ("{training.learning_rate: {type: loguniform, low: 0, high: 1}}", "learning_rate.low: "),
        (
            "{importance.rules: {type: choice, values: [cp, lrp]}}",
            "search.space.importance.rules: input should be",
        ),
        ("{training.epochs: {type: choice, values: []}}", "training.epochs.values: "),
    ],
)
def test_a_bad_space_is_one_line_that_names_the_key(config, space, said):
    with pytest.raises(InputError) as error:
        space_of(config(f"search.space={space}"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def names(config, tmp_path):
    examples = example_runs(Search(config, tmp_path / "search", 1, space_of(config)))
    shared = in_several(examples)
    resolved = examples["one"].resolved
    return {name for name, stage in resolved.items() if stage.folder.name in shared}


START = {"tokenizer", "pretrain", "evaluate/0-base"} | {
    f"prepare/{task}" for task in ("base", "harbour", "valley")
}


MEASURED_BASE = {"own_text", "attribute/0-base"}


def test_what_no_setting_changes_is_shared(config, tmp_path):
    first = {"train/1-harbour", "evaluate/1-harbour"}
    attributed = {"attribute/1-harbour"}
    energy = f"search.space={{protect.0.energy: {ENERGY}}}"
    top_k = "search.space={importance.top_k: {type: choice, values: [1, 2]}}"

    # The learning rate changes every training.
    assert names(config(), tmp_path) == START | MEASURED_BASE
    assert names(config(method="base_unprotected"), tmp_path) == START
    assert names(config(energy), tmp_path) == START | MEASURED_BASE | first | attributed
    of_base = f"search.space={{base.energy: {ENERGY}}}"
    assert names(config(of_base), tmp_path) == START | MEASURED_BASE
    assert names(config(top_k, method="gate"), tmp_path) == START | first


def test_with_importances_of_solo_models_these_are_shared_too(config, tmp_path):
    energy = f"search.space={{protect.0.energy: {ENERGY}}}"
    solo = names(config(energy, "importance.source=solo"), tmp_path)
    assert solo == START | MEASURED_BASE | {
        "train/1-harbour",
        "evaluate/1-harbour",
        "attribute/1-harbour",
        "solo/1-harbour",
    }


def test_corners_differ_in_every_dimension(config):
    space = space_of(config(method="gate"))
    pairs = list(corners(space))
    assert all(one[key] != other[key] for one, other in pairs for key in space)
    assert len(pairs) == 2 ** (len(space) - 1)
    points = [tuple(point.items()) for pair in pairs for point in pair]
    assert len(set(points)) == len(points)


def test_values_that_exclude_each_other_are_combined_otherwise(config, tmp_path):
    """An adapter for all tasks may stay unmerged, a fresh one may not."""
    space = """search.space={adapter.fresh: {type: choice, values: [true, false]},
        adapter.merge: {type: choice, values: [false, true]}}"""
    mine = config("adapter.fresh=false", space, method="lora")
    with pytest.raises(InputError, match="adapter"):
        config("adapter.fresh=true", "adapter.merge=false", method="lora")
    runs = example_runs(Search(mine, tmp_path / "search", 1, space_of(mine)))
    found = {(run.config.adapter.fresh, run.config.adapter.merge) for run in runs.values()}
    assert found == {(True, True), (False, False)}


def test_no_more_energy_is_searched_than_is_stored(config):
    assert space_of(config("importance.keep=0.9"))["protect.0.energy"].high == 0.9
    assert space_of(config())["protect.0.energy"].high == 0.95


def test_a_config_changed_by_settings_is_checked_like_a_file(config):
    changed = loading.changed(config(), {"protect.0.energy": 0.7, "training.epochs": 3})
    assert (changed.protect[0].energy, changed.training.epochs) == (0.7, 3)
    with pytest.raises(InputError, match=r"protect.0.energy: input should be less"):
        loading.changed(config(), {"protect.0.energy": 7})


def test_the_default_space_holds_every_method_as_it_is(config):
    for method in METHODS.keys() - {"joint", "solo"}:
        for settings in ((), ("search.objective=base_and_average",)):
            own = config(*settings, method=method)
            assert own_point(own, space_of(own)) is not None, method


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("agcl", {"protect.0.energy": 0.3}),
        ("agcl", {"protect.0.energy": 0.2, "base.energy": 0.1, "importance.keep": 0.2}),
        ("agcl", {"protect.0.energy": 1, "importance.keep": 1}),
        ("agcl", {"search.objective": "base_and_average", "base.energy": 0.4}),
        ("agcl", {"search.objective": "base_and_average", "importance.keep": 0.9}),
        ("gate", {"protect.0.strength": 5, "protect.0.exponent": 9, "importance.top_k": 3}),
        ("gate", {"protect.0.strength": 0, "importance.top_k": "null"}),
        ("ewc", {"protect.0.strength": 1e9}),
    ],
)
def test_the_default_space_holds_a_configs_own_values(config, method, settings):
    own = config(*(f"{key}={value}" for key, value in settings.items()), method=method)
    space = space_of(own)
    point = own_point(own, space)
    assert point is not None
    assert all(d.type == "choice" or d.low < d.high for d in space.values())
    if "search.objective" in settings:
        assert space["base.energy"].high <= own.importance.keep


def test_what_has_no_effect_is_not_searched(config):
    for method in ("das", "gate_fisher", "gate_magnitude", "gate_random"):
        assert "importance.top_k" not in default_space(config(method=method))
    assert "importance.top_k" in default_space(config(method="gate_grad_x_param"))
    weights = config(
        "search.objective=base_and_average",
        "base.protect=self",
        "protect=[{kind: project, directions: weights}]",
    )
    assert "base.energy" not in default_space(weights)
