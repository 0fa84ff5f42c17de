"""The command line as a user meets it: what it says and how it ends when the input is bad."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reference import tiny
from safetensors.torch import save_file
from transformers import Phi3Config

from agcl.attribution import attribute
from agcl.model import models
from agcl.tasks.batches import collate
from jobs import cli
from jobs.plan import memory_of
from pipeline.config import loading
from pipeline.config.check import check_inputs
from pipeline.config.method import Adapter
from pipeline.config.model import Model
from pipeline.config.recommended import too_long_for_batches, unusual
from pipeline.config.weights import slow_here
from pipeline.storage import artifact

ROOT = Path(__file__).parent.parent.parent
FACTS = ROOT / "jobs" / "configs" / "facts.yaml"


def test_settings_may_stand_behind_options(agcl):
    code, lines = agcl("compare", FACTS, "--methods", "agcl", "training.epochs=none")
    assert code == cli.BAD_INPUT
    assert lines[0].startswith("agcl: training.epochs: ")


def test_an_unknown_option_is_no_setting(agcl):
    with pytest.raises(SystemExit) as ended:
        agcl("compare", FACTS, "--method", "agcl", "--trails", "3")
    assert ended.value.code == cli.BAD_INPUT


def test_an_unknown_method_is_named(agcl):
    code, lines = agcl("compare", FACTS, "--methods", "sequential,agc")
    assert code == cli.BAD_INPUT
    assert lines[0].startswith("agcl: --methods: no method 'agc' (did you mean 'agcl'?")


def test_a_method_named_twice_is_refused(agcl):
    code, lines = agcl("compare", FACTS, "--methods", "agcl,sequential,agcl")
    assert (code, lines) == (cli.BAD_INPUT, ["agcl: --methods: agcl is named twice"])


COMPARE = ["--methods", "sequential,agcl", "--trials", "4"]


@pytest.fixture
def compared(agcl):
    """Writes a config, and gives it the finished run of agcl in a comparison; gives both places."""

    def write(*settings):
        file = agcl.place.parent / "c.yaml"
        file.write_text("name: tiny\ntasks: {format: facts, count: 2, entities: 3}\n")
        done = agcl.place / "storage" / "tiny-compare" / "agcl"
        done.mkdir(parents=True)
        config = loading.load(file, settings, method="agcl")
        (done / "config.yaml").write_text(loading.dump(config))
        (done / "metrics.json").write_text("{}")
        return file, done

    return write


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "evaluation.validation=0.0, not 0.3"),
        (["evaluation.validation=0.3", "base.energy=0.25"], "base.energy=0.25, not "),
    ],
)
def test_a_comparison_with_other_settings_is_refused_before_it_tunes(
    agcl, compared, monkeypatch, settings, said
):
    def tune(*arguments):
        raise AssertionError("tuned")

    monkeypatch.setattr("jobs.compare._tune", tune)
    file, _ = compared(*settings)
    code, (line,) = agcl("compare", file, *COMPARE)
    assert code == cli.BAD_INPUT
    assert said in line


def test_methods_that_are_the_same_are_refused_before_they_are_tuned(agcl, monkeypatch):
    monkeypatch.setattr("jobs.compare._tune", None)
    same = ["--methods", "agcl,project_uniform", "protect.0.weighting=uniform"]
    code, (line,) = agcl("compare", FACTS, *same, "--trials", "4")
    assert code == cli.BAD_INPUT
    assert line == "agcl: --methods: with these settings agcl and project_uniform are the same"


@pytest.mark.parametrize("chosen", [["training.learning_rate=1.00e-03"], ["protect.0.energy=0.5"]])
def test_only_another_winner_of_more_trials_takes_the_place_of_the_earlier_one(
    agcl, compared, capsys, monkeypatch, chosen
):
    found = {"sequential": [], "agcl": chosen}
    executed = []
    monkeypatch.setattr("jobs.compare._tune", lambda *given: found)
    monkeypatch.setattr("jobs.compare.execute_runs", lambda runs, *given: executed.append(runs))
    file, done = compared("evaluation.validation=0.3", *chosen)
    assert cli.main(["compare", str(file), *COMPARE]) == cli.OK
    assert done.exists()
    assert "replaced" not in capsys.readouterr().out
    found["agcl"] = ["training.learning_rate=2.00e-03"]
    assert cli.main(["compare", str(file), *COMPARE]) == cli.OK
    assert not done.exists()
    said = capsys.readouterr().out
    assert "agcl: other settings won than before; its old run is replaced" in said
    assert executed[1]["agcl"].config.training.learning_rate == 2e-3
    assert list(executed[1]) == ["sequential", "agcl"]


def test_rows_that_are_all_too_long_are_refused(refused, model_folder, tmp_path):
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    row = json.dumps({"prompt": "Who runs the shop? " * 100, "answer": " Ada"}) + "\n"
    long.write_text(row * 20)
    short.write_text(row * 20 + '{"prompt": "Who?", "answer": " Ada"}\n')
    config = {"method": "sequential", "model": {"path": str(model_folder)}}
    tasks = {"format": "jsonl", "max_length": 64, "sequence": [{"name": "a", "train": str(short)}]}
    check_inputs(loading.validate({**config, "tasks": tasks}))
    tasks["sequence"].append({"name": "b", "train": str(long)})
    line = refused({**config, "tasks": tasks})
    assert f"task b: all rows of {long} are longer than 64 tokens, the shortest has" in line
    assert "raise tasks.max_length" in line
    check_inputs(loading.validate({**config, "tasks": {**tasks, "truncate": "left"}}))


def test_a_file_without_rows_is_named(refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Who?", "answer": " "}\n')
    tasks = {"format": "jsonl", "sequence": [{"name": "a", "train": str(file)}]}
    line = refused({"method": "sequential", "tasks": tasks})
    assert line == f"agcl: task a: {file} has no row with prompt and answer"


def test_tasks_of_which_only_some_have_test_rows_are_named(refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Who?", "answer": " Ada"}\n')
    sequence = [
        {"name": "a", "train": str(file)},
        {"name": "b", "train": str(file), "test": str(file)},
    ]
    line = refused({"method": "sequential", "tasks": {"format": "jsonl", "sequence": sequence}})
    assert "task b has test rows and task a has none" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\n" * 5000, "is empty"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"text" * 5000 + b"\xff", "is not UTF-8 text"),
    ],
)
def test_a_bad_text_is_refused(refused, tmp_path, content, said):
    file = tmp_path / "skills.txt"
    if content is not None:
        file.write_bytes(content)
    line = refused("", f"evaluation.text={file}")
    assert line.startswith("agcl: evaluation.text: ")
    assert said in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file or folder"),
        (b"", "no text in"),
        (b"\n" * 5000, "no text in"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
    ],
)
def test_a_bad_text_to_protect_is_refused(refused, tmp_path, content, said):
    file = tmp_path / "skills.txt"
    if content is not None:
        file.write_bytes(content)
    line = refused("", "base.protect=text", f"base.text={file}")
    assert line.startswith("agcl: base.text: ")
    assert said in line


def test_a_bad_row_to_protect_is_refused_with_file_and_row(refused, tmp_path):
    rows = write_rows(tmp_path / "known.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "a"})
    known = f"base.rows={{format: jsonl, sequence: [{{name: known, train: {rows}}}]}}"
    line = refused("", "base.protect=rows", known)
    assert f"{rows}, line 2" in line or f"{rows}, row 2" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no file {}"), ("", "{}: no question"), ('{"context": "a"}', "{}, line 1: no column")],
)
def test_a_bad_probe_is_refused(refused, tmp_path, content, said):
    file = tmp_path / "skills.jsonl"
    if content is not None:
        file.write_text(content)
    line = refused("", f"evaluation.probes=[{file}]")
    assert line.startswith(f"agcl: evaluation.probes: {said.format(file)}")


def test_layers_that_the_model_has_not_are_refused(refused, model_folder):
    said = "agcl: freeze.layers: no layer 4; the model has layers 0 to 3"
    settings = ["method=freeze", "freeze.layers=[1,4]"]
    assert refused("", *settings) == said
    assert refused("", *settings, f"model.path={model_folder}") == said


def test_a_share_of_scored_rows_that_leaves_none_is_refused_before_any_work(refused):
    for share, missing in (("0.000001", "validation"), ("0.999999", "test")):
        line = refused("", f"evaluation.validation={share}")
        assert f"leaves no {missing} row in memorization of task harbour" in line, line


def test_freezing_all_that_is_trained_is_refused(refused):
    said = "agcl: freeze.layers: all layers are frozen, and the other weights are too"
    for settings in (["method=agcl"], ["method=lora"], ["method=freeze", "freeze.ungated=true"]):
        assert refused("", *settings, "freeze.layers=[0,1,2,3]").startswith(said), settings


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ("trainng: {epochs: 2}", [], "trainng: unknown key (did you mean 'training'?)"),
        ("training: {epoch: 2}", [], "training.epoch: unknown key (did you mean 'epochs'?)"),
        ("training: {epochs: many}", [], "training.epochs: "),
        ("", ["training.learning_rate=-1"], "training.learning_rate: "),
        ("", ["protect.0.energy=1.5"], "protect.0.energy: "),
        ("seed: -1", [], "seed: "),
        ("name: ../elsewhere", [], "name: "),
        ("method: magic", [], "method: "),
        ("a: [", [], "not valid YAML"),
        ("model: {path: no/such/folder}", [], "no/such/folder"),
        ("tasks: {format: concept1k, path: nowhere}", [], "nowhere/dataset.txt"),
        (
            "",
            ["resources.gpus_per_worker=1", "resources.num_workers=99"],
            "resources.gpus_per_worker: ",
        ),
        ("", ["evaluation.set=unknown"], "evaluation.set: "),
    ],
)
def test_a_bad_config_is_one_line_and_nothing_is_written(refused, config, settings, said):
    assert said in refused(config, *settings)


def test_a_missing_config_file_is_named(agcl):
    assert agcl("run", "none.yaml") == (cli.BAD_INPUT, ["agcl: no config file none.yaml"])


GOOD = {"prompt": "Who?", "answer": "Me."}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no row with prompt and answer"),
        ([{"prompt": "Who?", "answer": " "}], "no row with prompt and answer"),
        ([GOOD, {"prompt": "Who?"}], "line 2"),
        ([GOOD, {"prompt": "Who?", "answer": [3]}], "line 2"),
    ],
)
def test_a_bad_row_is_named(refused, tmp_path, rows, said):
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    tasks = {"format": "jsonl", "sequence": [{"name": "mine", "train": file}]}
    line = refused({"tasks": tasks})
    assert said in line
    assert "mine" in line or file in line


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("one", "one"), "'one'"),
        (("a/b", "c"), "a/b"),
        (("..", "c"), "'..'"),
        (("base", "c"), "base"),
    ],
)
def test_a_bad_task_name_is_named(refused, tmp_path, names, said):
    file = write_rows(tmp_path / "rows.jsonl", GOOD)
    sequence = [{"name": name, "train": file} for name in names]
    assert said in refused({"tasks": {"format": "jsonl", "sequence": sequence}})


def test_a_model_folder_without_weights_is_named(refused, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "hollow")
    (folder / "model.safetensors").unlink()
    line = refused({"model": {"path": str(folder)}})
    assert str(folder) in line
    assert "safetensors" in line


def test_a_git_lfs_pointer_among_the_data_is_named(refused, tmp_path):
    for name in ("rows.jsonl", "text.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    file, text = str(tmp_path / "rows.jsonl"), str(tmp_path / "text.txt")
    for item in ({"name": "mine", "train": file}, {"path": str(tmp_path)}):
        (tmp_path / "train.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
        line = refused({"tasks": {"format": "jsonl", "sequence": [item]}})
        assert "tasks.sequence (task" in line
        assert f"{tmp_path}/" in line
        assert "git lfs pull" in line
    assert f"evaluation.text: {text} is a Git-LFS" in refused("", f"evaluation.text={text}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('system message is required') }}", "system message is required"),
        ("{% for m in messages %}", "end of template"),
        ({"tool_use": "{{ messages }}"}, "default"),
    ],
)
def test_a_chat_template_that_renders_no_message_is_refused(
    refused, model_folder, tmp_path, template, said
):
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    tokenizer = models.load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    file = write_rows(tmp_path / "rows.jsonl", GOOD)
    tasks = {"format": "jsonl", "sequence": [{"name": "mine", "train": file}]}
    line = refused({"model": {"path": str(folder)}, "tasks": {**tasks, "chat_template": True}})
    assert line.startswith("agcl: tasks.chat_template: the ")
    assert str(folder) in line
    assert said in line


def test_an_architecture_without_a_table_is_named(refused, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "bloom" in refused({"model": {"path": str(folder)}}).lower()


def test_an_importance_of_another_model_is_named(refused, model_folder, tmp_path):
    file = tmp_path / "importance.safetensors"
    other = tiny.llama()
    attribute(other, [collate(tiny.answered_rows(other, 2))], top_k=1, rules="attnlrp").save(file)
    line = refused({"model": {"path": str(model_folder)}, "importance": {"past": [str(file)]}})
    assert str(file) in line


def test_a_file_that_is_no_importance_is_named(refused, model_folder, tmp_path):
    file = tmp_path / "importance.safetensors"
    save_file({}, file)
    line = refused({"model": {"path": str(model_folder)}, "importance": {"past": [str(file)]}})
    assert str(file) in line


def test_an_unknown_method_lists_those_that_are(agcl):
    code, (line,) = agcl("compare", FACTS, "--methods", "sequential,magic")
    assert code == cli.BAD_INPUT
    assert "'magic'" in line
    assert "sequential" in line


def test_plan_writes_nothing_and_lists_the_stages(agcl, capsys):
    assert cli.main(["plan", str(FACTS), "--formula-only"]) == cli.OK
    out = capsys.readouterr().out
    assert all(name in out for name in ("prepare/harbour", "pretrain", "train/4-", "report"))
    assert not list(agcl.place.iterdir())


@pytest.mark.parametrize("has", [True, False])
def test_plan_warns_of_bfloat16_on_a_cpu_without_it(agcl, capsys, monkeypatch, has):
    monkeypatch.setattr("pipeline.config.weights.cpu_has_bfloat16", lambda: has)
    settings = ["training.precision=bfloat16", "--formula-only"]
    assert cli.main(["plan", str(FACTS), *settings]) == cli.OK
    out = capsys.readouterr().out
    assert ("set training.precision=float32" in out) is not has
    on_gpu = loading.validate(
        {
            "method": "sequential",
            "training": {"precision": "bfloat16"},
            "resources": {"gpus_per_worker": 1},
        }
    )
    assert slow_here(on_gpu) is None


def test_an_unused_gpu_is_pointed_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_cpu = loading.validate({"method": "sequential", "training": {"precision": "bfloat16"}})
    said = slow_here(on_cpu)
    assert said == "resources.gpus_per_worker is 0, so this machine's GPU is not used: set it to 1"


def test_plan_names_settings_far_from_what_others_use(agcl, capsys, model_folder, tmp_path):
    training = {"learning_rate": 1e-4, "epochs": 8}
    config = loading.validate({"method": "sequential", "training": training})
    large = config.model_copy(update={"model": Model(path=str(tmp_path))})
    rate, epochs = unusual(large, 1_100_000_000)
    assert "training.learning_rate: 1e-4 is above what others use for full fine-tuning" in rate
    assert "1.1 billion weights, 5e-6 to 2e-5" in rate
    assert "training.epochs: 8 is more" in epochs
    assert not unusual(large, 135_000_000)
    assert not unusual(config, 1_100_000_000)  # The built-in model.
    adapter = large.model_copy(update={"adapter": Adapter()})
    assert [line.partition(":")[0] for line in unusual(adapter, 10**9)] == ["training.epochs"]

    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Who?", "answer": " Me"}\n' * 4)
    settings = ["training.learning_rate=0.1", f"model.path={model_folder}"]
    settings += [f"tasks.sequence.0.train={file}", "--formula-only"]
    assert cli.main(["plan", "fine_tune", *settings]) == cli.OK
    shown = capsys.readouterr().out
    assert "warning training.learning_rate: 1e-1 is above what others use" in shown
    assert not list(agcl.place.iterdir())


def test_rows_beyond_the_first_range_of_longrope_are_pointed_out(tmp_path):
    """Phi-3's long models take one set of factors for a whole batch, by its longest row."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 8192}
    Phi3Config(**sizes, rope_parameters=rope).save_pretrained(tmp_path)
    config = loading.load(Path(FACTS), [])
    for length, lines in ((4096, 0), (4097, 1)):
        tasks = config.tasks.model_copy(update={"max_length": length})
        long = config.model_copy(update={"model": Model(path=str(tmp_path)), "tasks": tasks})
        assert len(too_long_for_batches(long)) == lines


def test_a_report_of_no_run_is_refused(agcl):
    code, (line,) = agcl("report", "nowhere")
    assert code == cli.BAD_INPUT
    assert "nowhere" in line


def test_a_report_of_runs_over_different_tasks_is_refused(agcl):
    recorded = ROOT / "tests" / "pipeline" / "results" / "recorded"
    for name in ("agcl-seed0", "sequential-seed0"):
        shutil.copytree(recorded / name, agcl.place / "all" / name)
    file = agcl.place / "all" / "agcl-seed0" / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps(metrics | {"tasks": metrics["tasks"][::-1]}))
    code, (line,) = agcl("report", "all")
    assert code == cli.BAD_INPUT
    assert "holds runs of different tasks; name one of its folders" in line


def test_help_and_bad_usage_answer_without_loading_torch_or_ray():
    script = (
        "import sys\n"
        "from jobs.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    for arguments, code, said in (
        (["--help"], 0, "compare"),
        (["run", "--help"], 0, "key.path=value"),
        (["compare", "--help"], 0, "--methods"),
        (["fly"], 2, "invalid choice"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "training.epoch=3"], "training.epoch: unknown key"),
        (["compare", "--methods", "all", "model.path=/nowhere"], "model.path: no folder /nowhere"),
        (["plan", "tasks={format: concept1k, path: /nowhere}"], "tasks.path: no file /nowhere"),
    ],
)
def test_a_typing_error_is_answered_before_the_slow_imports(arguments, said):
    command, *rest = arguments
    code = (
        "import sys; from jobs import cli\n"
        f"code = cli.main({[command, str(FACTS), *rest]})\n"
        "slow = {'torch', 'transformers', 'ray', 'mlflow', 'scipy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stderr.startswith(f"agcl: {said}")
    assert found.returncode == cli.BAD_INPUT


def test_a_terminal_without_unicode_ends_no_command():
    found = subprocess.run(
        [sys.executable, "-c", "from jobs import cli; cli.main(['methods']); print('»')"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert found.stdout.endswith("?\n"), found.stderr


@pytest.fixture
def bare(model_folder, tmp_path):
    """A config of a model without weights, and two rows."""
    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Who?", "answer": " Me"}\n{"prompt": "Who is it?", "answer": " I"}\n'
    )
    return ["fine_tune", f"model.path={folder}", f"tasks.sequence.0.train={file}"]


def test_plan_predicts_memory_from_a_model_without_weights(agcl, capsys, bare):
    assert cli.main(["plan", *bare, "--gpu-memory", "24GB"]) == cli.OK
    shown = capsys.readouterr().out
    for kind in ("train", "attribute", "evaluate", "disk"):
        assert f"\n  {kind}" in shown
    assert shown.count("fits 90% of 24 GB") == 3
    assert re.search(r"train      \d+\.\d MB on the GPU \(.* \d+\.\d MB", shown)
    assert "0.00" not in shown
    assert "no rehearsal on a few rows: no weights in" in shown
    assert not list(agcl.place.iterdir())
    code, (line,) = agcl("run", *bare)
    assert code == cli.BAD_INPUT
    assert "has no weights" in line


def test_plan_predicts_for_gpus_that_this_machine_lacks(agcl, capsys, bare, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    gpus = ["resources.gpus_per_worker=1", "resources.num_workers=8", "resources.shard_model=true"]
    assert cli.main(["plan", *bare, *gpus, "--gpu-memory", "24GB"]) == cli.OK
    assert capsys.readouterr().out.count("fits 90% of 24 GB") == 3
    code, (line,) = agcl("run", *bare, *gpus)
    assert code == cli.BAD_INPUT
    assert line.startswith("agcl: resources.gpus_per_worker: 8 workers need a GPU each")


FLASH = ["model.attention=flash_attention_2", "model.dtype=bfloat16"]
NF4 = ["method=lora", "model.quantization=nf4", "adapter.merge=false"]


@pytest.mark.parametrize(
    ("settings", "has", "said"),
    [
        (["resources.num_workers=8"], False, "resources.gpus_per_worker is set, but this machine"),
        (FLASH, True, "model.attention: flash_attention_2 needs the package flash_attn"),
        (NF4, True, "model.quantization: nf4 needs bitsandbytes"),
    ],
)
def test_plan_says_why_it_runs_no_rows_here(
    agcl, capsys, bare, model_folder, monkeypatch, settings, has, said
):
    """A config for another machine: it is predicted, and `run` refuses it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8 * has)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has)
    monkeypatch.setattr("pipeline.config.check.find_spec", lambda name: None)
    settings = [*bare, f"model.path={model_folder}", "resources.gpus_per_worker=1", *settings]
    assert cli.main(["plan", *settings, "--gpu-memory", "24GB"]) == cli.OK
    shown = capsys.readouterr().out
    assert "fits 90% of 24 GB" in shown
    assert f"no rehearsal on a few rows: {said}" in shown
    assert agcl("run", *settings)[0] == cli.BAD_INPUT


def test_plan_refuses_settings_that_no_machine_could_run(agcl, bare):
    code, (line,) = agcl("plan", *bare, "model.attention=flash_attention_2")
    assert code == cli.BAD_INPUT
    assert "needs a GPU (resources.gpus_per_worker=1)" in line


@pytest.mark.parametrize(
    "settings", ["tasks.sequence.0.scorer=rouge_l", "evaluation.scorers=[exact_match, rouge_l]"]
)
def test_plan_counts_the_cache_of_scorers_that_decode(agcl, capsys, bare, settings):
    batch = "evaluation.batch_size=4096"
    shown = []
    for more in ([], [settings]):
        assert cli.main(["plan", *bare, batch, *more]) == cli.OK
        shown.append(re.search(r"\n  evaluate .*", capsys.readouterr().out)[0])
    assert "keys and values" not in shown[0]
    assert "keys and values" in shown[1]


def test_plan_says_what_to_change_where_a_stage_does_not_fit(agcl, capsys, bare):
    assert cli.main(["plan", *bare, "--gpu-memory", "0.012"]) == cli.OK
    shown = capsys.readouterr().out
    assert re.search(r"\d+\.\d MB too much for 90% of 0.012 GB: set ", shown)


@pytest.mark.parametrize("size", ["80GB", "80 GiB", "80", "80.0gb"])
def test_sizes_of_a_gpu(size):
    assert memory_of(size) == (80 * 2**30 if "i" in size else 80 * 10**9)


@pytest.mark.parametrize("size", ["much", "-1", "0", "80TB", "1e9", "", "9" * 30])
def test_no_size_of_a_gpu(agcl, size):
    code, (line,) = agcl("plan", "facts", f"--gpu-memory={size}")
    assert code == cli.BAD_INPUT
    assert line == f"agcl: --gpu-memory: {size!r} is not a size such as 80GB"


def test_a_full_disk_of_the_command_itself_names_the_file(agcl, monkeypatch):
    file = agcl.place / "config.yaml"
    file.with_name("config.yaml.part").symlink_to("/dev/full")
    monkeypatch.setattr("jobs.methods.main", lambda *given: artifact.write_text(file, "x"))
    assert agcl("methods") == (1, [f"agcl: No space left on device: {file}"])


def test_the_recorded_command_can_be_pasted(monkeypatch):
    seen = []
    monkeypatch.setattr("jobs.methods.main", lambda parsed, command: seen.append(command))
    cli.main(["methods", "a b"])
    assert seen == ["agcl methods 'a b'"]


def test_options_are_not_abbreviated(agcl):
    with pytest.raises(SystemExit) as ended:
        agcl("compare", "facts", "--seed", "42")
    assert ended.value.code == cli.BAD_INPUT


def test_a_comparison_takes_no_method_as_a_setting(agcl):
    code, (line,) = agcl("compare", "facts", "method=lora")
    assert code == cli.BAD_INPUT
    assert line == "agcl: method: the methods to compare are those of --methods"


@pytest.mark.parametrize("energy", ["0.7", "1.5"])
def test_a_setting_that_only_one_method_takes_is_named_with_the_other(agcl, energy):
    """With 1.5 both methods are wrong, each for a reason of its own."""
    code, (line,) = agcl("compare", "facts", f"protect.0.energy={energy}")
    assert code == cli.BAD_INPUT
    assert line.startswith("agcl: --methods: with sequential, protect.0.kind: must be one of")


def test_a_folder_called_like_a_bundled_config_does_not_hide_it(agcl):
    (agcl.place / "facts").mkdir()
    code, (line,) = agcl("run", "facts", "training.epochs=0")
    assert code == cli.BAD_INPUT
    assert line.startswith("agcl: training.epochs: ")


def test_the_ui_shows_the_storage_of_the_environment(agcl, monkeypatch):
    monkeypatch.setenv("AGCL_STORAGE", "/mnt/agcl")
    said = "agcl: --storage: no MLflow database in "
    assert agcl("ui") == (cli.BAD_INPUT, [f"{said}/mnt/agcl"])
    assert agcl("ui", "--storage", "other") == (cli.BAD_INPUT, [f"{said}{agcl.place / 'other'}"])
    monkeypatch.setenv("AGCL_STORAGE", "s3://bucket/prefix")
    code, (line,) = agcl("ui")
    assert (code, "MLFLOW_TRACKING_URI" in line) == (cli.BAD_INPUT, True)
