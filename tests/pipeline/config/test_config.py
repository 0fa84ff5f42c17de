from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from agcl.errors import InputError
from pipeline.config import loading, yaml12
from pipeline.config.check import measured_with
from pipeline.config.method import Base, Gate, Project
from pipeline.config.presets import METHODS
from pipeline.config.tasks import FactsTasks

FULL = """
name: mine
method: agcl
seed: 3
storage: {storage}
model:
  path: builtin
  pretraining: {{entities: 9}}
tasks:
  format: facts
  count: 2
training:
  learning_rate: 1e-4
  epochs: 5
importance:
  top_k: 7
  source: solo
protect:
  - kind: gate
    strength: 0.25
  - kind: project
    energy: 0.5
base: {{energy: 0.7, samples: 5}}
evaluation: {{batch_size: 3}}
resources: {{num_workers: 2}}
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(FULL.format(storage=tmp_path / "storage"))
    return file


def write(tmp_path, text):
    file = tmp_path / "other.yaml"
    file.write_text(text)
    return file


def test_values_of_the_file_are_read_into_their_types(file, tmp_path):
    config = loading.load(file)
    assert (config.name, config.seed, config.storage.root) == ("mine", 3, tmp_path / "storage")
    assert config.training.learning_rate == 1e-4  # YAML 1.1 reads "1e-4" as text
    assert config.protect == (Gate(kind="gate", strength=0.25), Project(kind="project", energy=0.5))
    assert config.importance.top_k == 7
    assert config.importance.source == "solo"
    assert config.resources.num_workers == 2


def test_an_empty_file_is_the_default_method_with_its_preset(tmp_path):
    config = loading.load(write(tmp_path, ""))
    assert config.method == "agcl"
    assert config.protect == (Project(kind="project"),)
    assert config.base == Base(protect="self")


def test_the_preset_of_sequential_protects_nothing(tmp_path):
    config = loading.load(write(tmp_path, "method: sequential\n"))
    assert config.protect == ()
    assert config.base == Base()


def test_a_preset_fills_in_the_keys_that_a_section_lacks_but_replaces_none(file, tmp_path):
    assert loading.load(file).base == Base(protect="self", energy=0.7, samples=5)
    text = "base: {{protect: none}}\nmethod: gate_fisher\nimportance: {{{}}}\n"
    filled = loading.load(write(tmp_path, text.format("top_k: 9")))
    assert (filled.importance.estimator, filled.importance.top_k) == ("fisher", 9)
    given = loading.load(write(tmp_path, text.format("estimator: das")))
    assert given.importance.estimator == "das"
    assert loading.load(write(tmp_path, "base: {protect: none}\n")).base == Base()


def test_a_relative_storage_is_made_absolute_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.load(write(tmp_path, "storage: here\n")).storage.root == tmp_path / "here"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.load(write(tmp_path, "storage: ~/runs\n")).storage.root == tmp_path / "runs"


def test_overrides_beat_the_file(file):
    config = loading.load(file, ["training.epochs=9", "seed=4", "training.learning_rate=1e-2"])
    assert (config.training.epochs, config.seed) == (9, 4)
    assert config.training.learning_rate == 1e-2
    assert config.importance.top_k == 7


def test_the_last_of_two_overrides_of_a_key_wins(file):
    assert loading.load(file, ["seed=5", "seed=6"]).seed == 6


def test_an_override_may_open_a_section_that_the_file_lacks(file):
    config = loading.load(file, ["tracking.enabled=false", "evaluation.set=null"])
    assert config.tracking.enabled is False
    assert config.evaluation.set is None


def test_an_override_may_be_an_item_of_a_list_that_the_file_lacks(tmp_path):
    file = write(tmp_path, "{}\n")
    config = loading.load(file, ["evaluation.probes.0=a.jsonl", "evaluation.probes.1=b.jsonl"])
    assert [probe.name for probe in config.evaluation.probes] == ["a.jsonl", "b.jsonl"]
    config = loading.load(file, ["method=replay", "protect.0.kind=gate", "protect.0.strength=0.5"])
    assert config.protect == (Gate(kind="gate", strength=0.5),)


def test_another_layout_drops_the_files_templates():
    """The configs that come with agcl have some, which no command line can take out."""
    fine_tune = Path(__file__).parents[3] / "jobs" / "configs" / "fine_tune.yaml"
    config = loading.load(fine_tune, ["tasks.format=messages"])
    assert config.tasks.format == "messages"
    with pytest.raises(InputError, match="layout messages has no templates"):
        loading.load(fine_tune, ["tasks.format=messages", "tasks.answer=:{answer}"])


def test_an_override_may_be_a_whole_section_or_list(file):
    config = loading.load(file, ["protect=[{kind: gate}]", "evaluation={batch_size: 2}"])
    assert config.protect == (Gate(kind="gate"),)
    assert config.evaluation.batch_size == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["protect.0.kind=gate", "protect.0.strength=0.5"],
        ["protect.0.strength=0.5", "protect.0.kind=gate"],
    ],
)
def test_items_of_a_list_are_set_in_any_order(tmp_path, overrides):
    config = loading.load(write(tmp_path, "method: agcl\n"), overrides)
    assert config.protect == (Gate(kind="gate", strength=0.5),)


def test_a_new_kind_drops_the_settings_of_the_old_one_and_the_same_kind_keeps_them(file):
    overrides = ["protect=[{kind: gate, strength: 0.25}]"]
    again = loading.load(file, [*overrides, "protect.0.exponent=2"])
    assert again.protect == (Gate(kind="gate", strength=0.25, exponent=2),)
    config = loading.load(write(file.parent, "protect: [{kind: gate, strength: 0.25}]\n"))
    assert config.protect[0].strength == 0.25
    replaced = loading.load(file.parent / "other.yaml", ["protect.0.kind=project"])
    assert replaced.protect == (Project(kind="project"),)
    kept = loading.load(file.parent / "other.yaml", ["protect.0.kind=gate"])
    assert kept.protect[0].strength == 0.25


def test_an_item_after_the_last_is_appended(tmp_path):
    file = write(tmp_path, "protect: [{kind: gate}]\n")
    config = loading.load(file, ["protect.1.energy=0.5", "protect.1.kind=project"])
    assert config.protect == (Gate(kind="gate"), Project(kind="project", energy=0.5))


def test_a_list_is_emptied_and_filled_again_in_the_order_given(file):
    config = loading.load(file, ["protect=[]", "protect.0.kind=gate"])
    assert config.protect == (Gate(kind="gate"),)


@pytest.mark.parametrize("how", ["argument", "override"])
def test_another_method_drops_what_was_written_for_the_files_own(file, how):
    config = (
        loading.load(file, method="sequential")
        if how == "argument"
        else loading.load(file, ["method=sequential"])
    )
    assert config.method == "sequential"
    assert config.protect == ()
    assert (config.importance.top_k, config.importance.source) == (4, "sequential")
    assert config.base.protect == "none"
    assert config.training.epochs == 5


def test_the_files_own_method_keeps_its_sections(file):
    assert loading.load(file, ["method=agcl"]) == loading.load(file)
    assert loading.load(file, method="agcl") == loading.load(file)


def test_how_the_base_is_measured_is_for_all_methods_and_what_protects_it_for_the_files_own(
    tmp_path,
):
    file = write(tmp_path, "base: {protect: text, text: a.txt, samples: 9}\n")
    assert loading.load(file).base.protect == "text"
    for method, protect in (("gate", "none"), ("ewc_base", "self"), ("project_uniform", "text")):
        base = loading.load(file, method=method).base
        assert (base.protect, base.samples) == (protect, 9)


def test_settings_beside_another_method_are_added_to_its_preset(tmp_path):
    file = write(tmp_path, "method: sequential\n")
    config = loading.load(file, ["protect.0.energy=0.3", "importance.top_k=2"], method="agcl")
    assert config.protect == (Project(kind="project", energy=0.3),)
    assert config.importance.top_k == 2


def changes(method):
    """What a variant changes: keys of `base`, and keys of another section."""
    of_base, others = {}, {}
    for key, value in METHODS[method].changes.items():
        section, _, last = key.rpartition(".")
        (of_base if section == "base" else others)[last] = value
    return of_base, others


@pytest.mark.parametrize("method", [m for m, of in METHODS.items() if of.variant_of == "agcl"])
def test_a_control_keeps_the_files_settings_of_what_it_controls(file, method):
    ours, control = loading.load(file), loading.load(file, method=method)
    assert (control.protect, control.base) != (ours.protect, ours.base)
    of_base, of_projection = changes(method)
    assert control.protect == (
        ours.protect[0],
        ours.protect[1].model_copy(update=of_projection),
    )
    assert control.base == ours.base.model_copy(update=of_base)
    assert control.importance == ours.importance


@pytest.mark.parametrize("method", ["gate_permuted", "gate_random"])
def test_a_control_of_another_method_is_that_ones_preset_but_for_its_change(file, method):
    gate, control = loading.load(file, method="gate"), loading.load(file, method=method)
    assert control.protect == gate.protect
    assert control.importance == gate.importance.model_copy(update=METHODS[method].changes)
    assert control.importance != gate.importance


def test_ewc_from_the_base_model_on_is_ewc_in_all_else(file):
    ewc, control = loading.load(file, method="ewc"), loading.load(file, method="ewc_base")
    assert ewc.base.protect == "none"
    assert control.base == ewc.base.model_copy(update={"protect": "self"})
    assert (control.protect, control.importance) == (ewc.protect, ewc.importance)


def test_a_control_of_what_is_not_there_is_refused(tmp_path):
    file = write(tmp_path, "protect: [{kind: gate}]\n")
    with pytest.raises(InputError, match="method: project_random needs an item of kind project"):
        loading.load(file, method="project_random")


@pytest.mark.parametrize("method", METHODS)
def test_a_dumped_config_loads_as_the_same_config(file, method):
    config = loading.load(file, ["name=other-1"], method)
    again = file.with_name("again.yaml")
    again.write_text(loading.dump(config), encoding="utf-8")
    assert loading.load(again) == config
    assert loading.dump(loading.load(again)) == loading.dump(config)


@pytest.mark.parametrize(
    ("method", "settings", "measured"),
    [
        ("agcl", [], False),
        ("inflora", [], False),
        ("gate", [], True),
        ("ewc", [], True),
        ("agcl", ["protect=[{kind: gate}, {kind: project}]"], True),
        ("agcl", ["importance.permuted=true"], True),
        ("agcl", ["importance.estimator=random"], True),
        ("agcl", ["importance.estimator=magnitude"], True),
        ("agcl", ["importance.estimator=fisher"], False),
        ("agcl", ["importance.entries=true"], True),
        ("agcl", ["importance.entries=false"], False),
    ],
)
def test_entries_are_measured_where_something_needs_them(tmp_path, method, settings, measured):
    config = loading.load(write(tmp_path, f"method: {method}\n"), settings)
    assert config.measures_entries is measured


def test_a_dump_holds_every_setting_as_plain_yaml(file):
    raw = yaml.safe_load(loading.dump(loading.load(file)))
    assert raw["training"]["weight_decay"] == 0.01
    assert raw["protect"][1] == {
        "ungated": "freeze",
        "kind": "project",
        "energy": 0.5,
        "weighting": "relevance",
        "unit_inputs": True,
        "directions": "leading",
    }


def test_formats_with_paths_survive_a_dump(tmp_path):
    text = "tasks: {format: jsonl, sequence: [{name: Größe, train: a.jsonl, test: b.jsonl}]}\n"
    config = loading.load(write(tmp_path, text))
    again = tmp_path / "again.yaml"
    again.write_text(loading.dump(config), encoding="utf-8")
    assert loading.load(again) == config
    assert config.tasks.sequence[0].name == "Größe"


def test_a_config_is_frozen(file):
    config = loading.load(file)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 1


def test_loading_does_not_change_the_presets(tmp_path):
    file = write(tmp_path, "")
    loading.load(file, ["protect.0.kind=gate", "protect.0.strength=0.5"])
    assert loading.load(file).protect == (Project(kind="project"),)


def test_a_setting_changes_one_of_two_places_that_share_an_alias(tmp_path):
    file = write(tmp_path, "training: &rows {batch_size: 3}\nevaluation: *rows\n")
    config = loading.load(file, ["training.batch_size=5"])
    assert (config.training.batch_size, config.evaluation.batch_size) == (5, 3)


def test_a_mapping_may_be_merged_into_another(tmp_path):
    file = write(tmp_path, "training: &t {epochs: 3}\nevaluation: {<<: {batch_size: 4}}\n")
    assert loading.load(file).evaluation.batch_size == 4


def test_relative_paths_are_made_absolute_once(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = """
model: {path: models/mine}
evaluation: {text: some.txt}
importance: {past: [old.safetensors]}
tasks: {format: jsonl, sequence: [{name: a, train: data/a.jsonl, test: ../b.jsonl}, {path: c}]}
"""
    config = loading.load(write(tmp_path, text))
    monkeypatch.chdir("/")
    assert loading.load(write(tmp_path, loading.dump(config))) == config
    assert config.model.folder == tmp_path / "models/mine"
    assert config.evaluation.text == tmp_path / "some.txt"
    assert config.importance.past == (tmp_path / "old.safetensors",)
    one, two = config.tasks.sequence
    assert (one.train, one.test) == (tmp_path / "data/a.jsonl", tmp_path / "../b.jsonl")
    assert two.path == tmp_path / "c"
    monkeypatch.chdir(tmp_path)
    text = "tasks: {format: huggingface, sequence: [{path: saved}, {path: org/on-the-hub}]}\n"
    of_hub = loading.load(write(tmp_path, text)).tasks.sequence
    assert [task.path for task in of_hub] == [str(tmp_path / "saved"), "org/on-the-hub"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("1e-3", 1e-3), ("0x10", 16), ("0o10", 8), ("-3", -3), ("1:30", "1:30"),
     ("no", "no"), ("2024-01-01", "2024-01-01"), ("null", None), ("True", True)],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2_in_both_directions(text, value):
    assert yaml12.parse(text) == value
    dumped = yaml12.dump({"key": value})
    assert yaml12.parse(dumped) == {"key": value}
    assert yaml12.parse(yaml12.dump([text])) == [text]


def test_a_time_is_no_number_of_epochs(file):
    with pytest.raises(InputError, match=r"^training.epochs: .*got '1:30'"):
        loading.load(file, ["training.epochs=1:30"])


def test_braces_without_quotes_are_explained(tmp_path):
    text = "tasks: {format: jsonl, sequence: [{path: a}], answer: {answer}}\n"
    with pytest.raises(InputError, match=r"tasks.answer: .*braces needs quotes in YAML"):
        loading.load(write(tmp_path, text))


def test_another_format_of_files_keeps_the_sequence_and_a_benchmark_does_not(tmp_path):
    file = tmp_path / "config.yaml"
    task = {"name": "mine", "train": "rows.json"}
    tasks = {"format": "jsonl", "max_length": 99, "sequence": [task]}
    file.write_text(yaml.safe_dump({"method": "sequential", "tasks": tasks}))
    changed = loading.load(file, ["tasks.format=alpaca"]).tasks
    assert (changed.format, changed.max_length, changed.sequence[0].name) == ("alpaca", 99, "mine")
    assert loading.load(file, ["tasks.format=facts"]).tasks == FactsTasks()
    for value in ("[alpaca]", "{a: 1}"):
        with pytest.raises(InputError, match=r"tasks\.format: must be one of"):
            loading.load(file, [f"tasks.format={value}"])


def test_past_files_must_be_measured_like_what_uses_them(tiny_config, tmp_path):
    def settings(method, *overrides):
        return measured_with(tiny_config(tmp_path, *overrides, method=method))

    assert settings("agcl") == {"unit_inputs": True}
    assert settings("project_raw") == {"unit_inputs": False}
    assert settings("ewc") == {"estimator": "fisher"}
    assert settings("gate", "protect=[{kind: gate}, {kind: project, unit_inputs: false}]") == {
        "estimator": "lrp",
        "unit_inputs": False,
    }
    assert settings("sequential") == settings("project_weights") == {}
