"""Bad configs: `InputError` of one line that names the key."""

from typing import get_args

import pytest

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.config.tasks import OPEN, TaskFormat
from pipeline.storage import storage_at


@pytest.fixture
def problem(tmp_path):
    """The message for a YAML text and overrides."""

    def of(text="", *overrides):
        file = tmp_path / "config.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError) as caught:
            loading.load(file, overrides)
        message = str(caught.value)
        assert message.strip() == message
        assert len(message.splitlines()) == 1
        return message

    return of


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("training.epochs=many", "training.epochs: "),
        ("training.epochs=1.5", "training.epochs: "),
        ("training.epochs=true", "training.epochs: "),
        ("training.learning_rate=true", "training.learning_rate: "),
        ("training.epochs=[1]", "training.epochs: "),
        ("training.epochs=", "training.epochs: "),
        ("training.epochs=0", "training.epochs: "),
        ("training.batch_size=-1", "training.batch_size: "),
        ("training.learning_rate=0", "training.learning_rate: "),
        ("training.learning_rate=-1e-4", "training.learning_rate: "),
        ("training.learning_rate=.nan", "training.learning_rate: "),
        ("training.learning_rate=nan", "training.learning_rate: "),
        ("training.learning_rate=.inf", "training.learning_rate: "),
        ("training.weight_decay=-.inf", "training.weight_decay: "),
        ("training.max_gradient_norm=1e999", "training.max_gradient_norm: "),
        ("training.precision=float16", "training.precision: "),
        ("training=5", "training: "),
        ("training=", "training: "),
        ("seed=-1", "seed: "),
        ("seed=0.5", "seed: "),
        ("method=magic", "method: "),
        ("method=[agcl]", "method: "),
        ("tasks.count=0", "tasks.count: "),
        ("tasks.count=101", "tasks.count: "),
        ("tasks.format=xml", "tasks"),
        ("model.pretraining.entities=0", "model.pretraining.entities: "),
        ("importance.top_k=0", "importance.top_k: "),
        ("importance.estimator=guess", "importance.estimator: "),
        ("importance.past=here", "importance.past: "),
        ("importance.past=[a.safetensors]", "importance.past: "),
        ("protect.0.energy=1.01", "protect.0.energy: "),
        ("protect.0.energy=-0.1", "protect.0.energy: "),
        ("protect.0.energy=.nan", "protect.0.energy: "),
        ("protect.0.kind=wish", "protect.0"),
        ("protect=5", "protect: "),
        ("protect=[]", "protect: "),
        ("evaluation.batch_size=0", "evaluation.batch_size: "),
        ("evaluation.probe_rows=0", "evaluation.probe_rows: "),
        ("evaluation.probes=[a/x.jsonl, b/x.json]", "evaluation.probes: two files are called 'x'"),
        ("evaluation.scorers=[a.b:s, c:s]", "evaluation.scorers: two are called 's'"),
        ("resources.num_workers=0", "resources.num_workers: "),
        ("seed=4294967296", "seed: "),
        ("training.epochs=1000000000000", "training.epochs: "),
        ("model.path=~nobody-here/model", "model.path: "),
        ('storage="a\\0b"', "storage: "),
        (f"storage={'x' * 300}", "storage: "),
        (f"evaluation.text={'x/' * 3000}", "evaluation.text: "),
        (f"name={'x' * 101}", "name: "),
        ("tracking.uri=''", "tracking.uri: "),
        ("resources.gpus_per_worker=3", "resources.gpus_per_worker: "),
        ("resources.gpus_per_worker=0.001", "resources.gpus_per_worker: "),
        ("storage=5", "storage: "),
        ("name=", "name: "),
        ("name=a/b", "name: "),
        ("name=../up", "name: "),
        ("name=.hidden", "name: "),
        ("name=stages", "name: "),
    ],
)
def test_a_bad_value_names_its_key(problem, override, start):
    assert problem("tasks: {format: facts}\n", override).startswith(start)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["protect=[{kind: gate}]"], "protect kind gate"),
        (["protect=[{kind: penalty}, {kind: project}]"], "protect kind penalty"),
        (["importance.permuted=true"], "importance.permuted"),
        (["importance.estimator=random"], "estimator random"),
    ],
)
def test_what_needs_entries_is_named_where_there_are_none(problem, settings, named):
    message = problem("", "importance.entries=false", *settings)
    assert message.startswith(f"importance.entries: must be true for {named}")


def test_several_workers_do_not_share_a_gpu(problem):
    message = problem("", "resources.num_workers=2", "resources.gpus_per_worker=0.5")
    assert message.startswith("resources.gpus_per_worker: must be 0 or 1 with several workers")


def test_a_shared_model_says_what_it_does_not_go_with(problem):
    message = problem("", "resources.shard_model=true", "training.compile=true")
    assert message.startswith("resources.shard_model: cannot be combined with training.compile")


def test_a_value_out_of_range_says_the_range_and_what_was_given(problem):
    message = problem("", "protect.0.energy=1.5")
    assert "less than or equal to 1" in message
    assert "1.5" in message


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("training: {learning_rat: 1}\n", "training.learning_rat", "learning_rate"),
        ("trainig: {}\n", "trainig", "training"),
        ("protect: [{kind: gate, strenght: 1}]\n", "protect.0.strenght", "strength"),
        ("model: {pretraining: {entitys: 3}}\n", "model.pretraining.entitys", "entities"),
        ("tasks: {format: facts, cuont: 2}\n", "tasks.cuont", "count"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(problem, text, key, suggestion):
    message = problem(text)
    assert message.startswith(f"{key}: unknown key")
    assert suggestion in message.split(key, 1)[1]


@pytest.mark.parametrize("word", ["gate", "project", "facts", "concept1k", "jsonl"])
def test_an_unknown_key_that_is_also_a_kind_is_named_in_full(problem, word):
    assert problem(f"training: {{{word}: 1}}\n").startswith(f"training.{word}: unknown key")


def test_a_key_of_another_kind_is_unknown(problem):
    assert "protect.0.energy" in problem("protect: [{kind: gate, energy: 0.5}]\n")
    assert "tasks.path" in problem("tasks: {format: facts, path: x}\n")


def test_every_wrong_key_is_named_in_one_line(problem):
    message = problem("seed: x\ntraining: {epochs: 0, wrong: 1}\n")
    for key in ("seed", "training.epochs", "training.wrong"):
        assert f"{key}: " in message


def test_a_missing_key_is_named(problem):
    message = problem("tasks: {format: concept1k}\n")
    assert message.startswith("tasks.path: ")
    assert "required" in message


def test_a_missing_kind_is_named(problem):
    message = problem("protect: [{strength: 1}]\n")
    assert message == "protect.0.kind: must be one of 'gate', 'project', 'penalty'"


def test_every_task_format_is_listed_once_and_can_be_opened(problem):
    message = problem("", "tasks.format=xml")
    for section in get_args(TaskFormat):
        for format in get_args(section.model_fields["format"].annotation):
            assert message.count(f"'{format}'") == 1
            assert format in OPEN
    assert message.endswith("(got 'xml')")


def test_the_types_of_a_search_dimension_are_listed(problem):
    message = problem("", "search.space={training.epochs: {type: normal}}")
    types = "'uniform', 'loguniform', 'int', 'choice'"
    assert message == f"search.space.training.epochs.type: must be one of {types} (got 'normal')"


@pytest.mark.parametrize(
    "kinds", ["[project, gate]", "[gate, gate]", "[project, project]", "[gate, project, gate]"]
)
def test_projection_must_be_last_and_kinds_unique(problem, kinds):
    items = ", ".join(f"{{kind: {kind}}}" for kind in kinds.strip("[]").split(", "))
    message = problem(f"protect: [{items}]\n")
    assert message.startswith("protect: ")
    assert "project last" in message


def test_a_method_that_protects_nothing_refuses_protections(problem):
    message = problem("method: sequential\n", "protect.0.kind=gate")
    assert message.startswith("method: sequential protects nothing; choose another method")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "a: b: c\n",
        "\tname: x\n",
        b"name: \xff\xfe\n",
        b"name: \x00\n",
        "a: !!python/object:os.system x\n",
        "seed: 1\nseed: 2\n",
        "training: {epochs: 1, epochs: 2}\n",
        "seed: !!int many\n",
        "tracking: {enabled: !!bool perhaps}\n",
        "a: " + "[" * 3000,
    ],
)
def test_a_file_that_is_no_yaml_is_named(problem, text):
    assert "config.yaml: not valid YAML" in problem(text)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "5\n", "{1: 2}\n"])
def test_a_file_that_is_no_mapping_is_named(problem, text):
    assert "config.yaml: a config is a mapping" in problem(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config file .*nowhere\.yaml"):
        loading.load(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="no config file"):
        loading.load(tmp_path)


@pytest.mark.parametrize("override", ["training.epochs", "=3", "", "--epochs"])
def test_an_override_without_key_or_equals_is_quoted(problem, override):
    message = problem("", override)
    assert repr(override) in message
    assert "key.path=value" in message


@pytest.mark.parametrize("override", ["seed=[1", "seed={"])
def test_an_override_whose_value_is_no_yaml_is_quoted(problem, override):
    assert repr(override) in problem("", override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("protect.2.kind=gate", "protect.2.kind"),
        ("protect.first.kind=gate", "protect.first.kind"),
        ("protect.-1.kind=gate", "protect.-1.kind"),
        ("protect.999.kind=gate", "is not an item of the list"),
        ("seed.deep=1", "seed.deep"),
        ("training.epochs.deep=1", "training.epochs"),
        ("wrong.deep=1", "wrong: unknown key"),
    ],
)
def test_an_override_of_no_such_place_names_it(problem, override, said):
    assert said in problem("seed: 1\n", override)


def test_a_storage_that_cannot_be_made_is_one_line():
    with pytest.raises(InputError, match=r"^storage: cannot make /proc/x \("):
        storage_at("/proc/x").check_writable()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.num_train_epochs", "training.epochs"),
        ("model.lora_r", "adapter.rank"),
        ("training.epoch", "epochs"),
        ("training.train_row", "train_rows"),
        ("epoch", "training.epochs"),
        ("evaluation.batchsize", "batch_size"),
    ],
)
def test_a_key_of_another_library_or_section_is_pointed_to(problem, key, meant):
    assert problem("", f"{key}=1") == f"{key}: unknown key (did you mean {meant!r}?)"


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (["base.protect=text"], "base.text: missing; give a text file or folder"),
        (["model.path=m", "base.protect=rows"], "base.rows: missing; give rows in the form of"),
        (["base.protect=all"], "base.protect: "),
        (["base.energy=2"], "base.energy: "),
        (["base.samples=0"], "base.samples: "),
        (["base.rows={format: jsonl, sequense: []}"], "base.rows.sequence: "),
        (["base.rows={format: xml}"], "base.rows.format: must be one of"),
        (["base.rows={path: x}"], "base.rows.format: must be one of"),
        (["method=lora", "base.protect=self", "protect=[{kind: gate}]"], "base.protect: with an"),
        (
            ["method=lora", "base.protect=self", "protect=[{kind: penalty}]"],
            "base.protect: with an",
        ),
        (["method=sequential", "protect=[{kind: gate}]"], "method: sequential protects nothing"),
        (["method=solo", "base.protect=self", "protect=[{kind: project}]"], "method: solo prot"),
    ],
)
def test_the_section_base_says_what_is_wrong(problem, settings, start):
    assert problem("", *settings).startswith(start)


def test_directions_of_weights_are_refused_with_an_adapter_and_need_no_stored_moments(problem):
    said = problem("method: project_weights\n", "adapter={}")
    assert said.startswith(
        "protect: a projection with directions=weights cannot be used with an adapter"
    )
    item = {"kind": "project", "directions": "weights", "energy": 0.99}
    loading.validate({"protect": [item]})
    with pytest.raises(
        InputError, match=r"^protect\.0\.energy: 0\.99 is more than importance\.keep"
    ):
        loading.validate({"protect": [item | {"directions": "random"}]})


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (["subspace.unfreeze=0"], "subspace.unfreeze: "),
        (["subspace.unfreeze=1"], "subspace.unfreeze: "),
        (["subspace.rank=2"], "subspace.rank: unknown key"),
        (["adapter.rank=2"], "subspace: cannot be combined with adapter"),
        (["protect=[{kind: project}]"], "subspace: cannot be combined with protect, whose"),
        (["resources.shard_model=true"], "subspace: cannot be combined with resources.shard"),
        (["method=joint", "subspace={}"], "method: joint protects nothing"),
    ],
)
def test_the_section_subspace_says_what_is_wrong(problem, settings, start):
    assert problem("method: osf\n", *settings).startswith(start)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (["adapter.init=pissa"], "adapter.init: "),
        (["adapter.fresh=true"], "adapter.init: corda cannot be combined with adapter.fresh"),
        (["base.protect=none"], "base.protect: adapter.init=corda needs a text"),
        (["protect=[{kind: project}]"], "protect: cannot be combined with adapter.init=corda"),
        (["resources.shard_model=true"], "adapter.init: corda cannot be combined with resources"),
    ],
)
def test_a_start_of_an_adapter_says_what_is_wrong(problem, settings, start):
    assert problem("method: corda\n", *settings).startswith(start)


def test_random_directions_for_an_adapter_of_all_tasks_leave_out_the_base(problem):
    """Each task would start by losing what its factors learned in the base's own directions."""
    random = "protect.0.directions=random"
    message = problem("method: lora_agcl\n", "base.protect=self", random)
    assert message.startswith("base.protect: with random directions needs adapter.fresh")


def test_packed_rows_need_an_attention_that_tells_them_apart(problem):
    settings = ["model.path=models/mine", "model.attention=flash_attention_2"]
    message = problem("{}", "training.packing=true", *settings)
    assert message.startswith("training.packing: cannot be combined with model.attention=flash")


def test_a_gate_of_fresh_factors_is_refused(problem):
    settings = ["protect=[{kind: gate}]", "base.protect=none"]
    assert problem("method: inflora\n", *settings).startswith(
        "protect: with adapter.fresh only project and penalty can be used"
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("protect.0.energy=0.99",), "protect.0.energy: 0.99"),
        (("base.protect=self", "base.energy=0.97"), "base.energy: 0.97"),
        (("importance.keep=0.75", "base.energy=0.6"), "protect.0.energy: 0.8"),
    ],
)
def test_more_energy_than_is_stored_is_named(problem, tmp_path, overrides, key):
    assert f"{key} is more than importance.keep=" in problem("method: agcl", *overrides)
    assert loading.load(tmp_path / "config.yaml", [*overrides, "importance.keep=1"])


def test_one_wrong_task_is_one_error(problem):
    said = "tasks.sequence.0.trian: unknown key (did you mean 'train'?)"
    assert problem("tasks: {format: jsonl, sequence: [{name: a, trian: x}]}") == said
    assert "at least 1 item" in problem("tasks: {format: jsonl, sequence: []}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "tasks: {sequence: [{name: a, train: x}]}",
            "tasks.sequence: unknown key for format facts",
        ),
        (
            "protect: [{kind: gate, energy: 0.5}]",
            "protect.0.energy: unknown key for kind gate",
        ),
        ("training: {rank: 2}", "training.rank: unknown key"),
    ],
)
def test_a_key_of_another_kind_is_not_suggested_for_itself(problem, text, said):
    assert problem(text) == said
