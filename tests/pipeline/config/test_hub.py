"""Models from the hub, against a stand-in on loopback: what is fetched, and what is said."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from reference import families
from reference.hub import Hub, files_of

from agcl.errors import InputError
from agcl.model import models
from agcl.model.builtin import builtin_tokenizer
from agcl.model.check import check_folder
from jobs import cli
from jobs.compare import begun
from pipeline.config import hub, loading
from pipeline.config.model import Model
from pipeline.config.revision import pinned
from pipeline.execution.session import run_stages
from pipeline.plan.plan import plan
from pipeline.plan.stage import resolve
from pipeline.run import open_run
from pipeline.stages.context import Context

ID = "org/tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = builtin_tokenizer(["Who runs the shop? Ada", "Me, or you."] * 4, 280)
    model = families.model("LlamaForCausalLM", vocab_size=len(tokenizer), hidden_size=16)
    models.save(model, tokenizer, folder)
    return files_of(folder)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An empty hub and an empty cache. The library reads their places when it is imported."""
    server = Hub()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.address)
    yield server
    server.close()


@pytest.fixture
def config(tmp_path):
    """Makes a config of one small task on a model of the hub."""
    rows = [{"prompt": "Who runs the shop?", "answer": " Ada"}, {"prompt": "Who?", "answer": " Me"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*settings, name="run"):
        raw = {
            "name": name,
            "storage": str(tmp_path / "storage"),
            "method": "sequential",
            "model": {"path": ID},
            "tasks": {"format": "jsonl", "sequence": [{"name": "who", "train": str(file)}]},
            "training": {"epochs": 1},
            "tracking": {"enabled": False},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
        return loading.load(tmp_path / "config.yaml", settings)

    return make


def test_only_weights_configs_and_tokenizers_are_fetched_and_each_once(server, weights):
    others = {
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "tokenization_tiny.py": b"raise SystemExit",
        "original/model.safetensors": b"again",
        "consolidated.safetensors": b"again",
        "README.md": b"card",
        "chat_template.jinja": b"{{ messages }}",
    }
    commit = server.push(ID, {**weights, **others})
    folder = hub.fetch(ID, hub.resolve(ID, "main"))
    assert folder == hub.folder_of(ID, commit)
    assert {f.name for f in folder.iterdir()} == {*weights, "chat_template.jinja"}
    assert sorted(server.downloaded()) == sorted({*weights, "chat_template.jinja"})
    assert all(each.is_symlink() for each in folder.iterdir())
    check_folder(folder)  # A folder of links, as the cache makes it.
    assert models.load_model(folder).num_parameters()
    server.asked.clear()
    hub.fetch(ID, commit)
    assert not server.asked


@pytest.mark.parametrize(
    ("revision", "parts"),
    [
        (None, ("main", None)),
        ("v2", ("v2", None)),
        ("refs/pr/1", ("refs/pr/1", None)),
        ("a" * 40, ("a" * 40, "a" * 40)),
        (f"main@{'b' * 40}", ("main", "b" * 40)),
    ],
)
def test_a_revision_may_carry_its_commit(revision, parts):
    assert hub.parts(revision) == parts
    model = Model(path=ID, revision=revision)
    if parts[1]:
        assert model.identity == f"hub:{ID}@{parts[1]}"
    else:
        with pytest.raises(ValueError, match="has no commit yet"):
            _ = model.folder


def test_a_folder_of_the_same_name_wins_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Model(path=ID).on_hub
    (tmp_path / ID).mkdir(parents=True)
    model = Model(path=ID)
    assert (model.on_hub, model.folder, model.identity) == (False, tmp_path / ID, None)
    for path, said in ((ID, "is a folder"), ("builtin", "is the built-in model")):
        with pytest.raises(ValueError, match=f"revision: only for models on the hub.*{said}"):
            Model(path=path, revision="v2")


def test_the_commit_counts_and_neither_the_branch_nor_the_place_of_the_cache(
    server, weights, config, tmp_path, monkeypatch
):
    commit = server.push(ID, weights, ["main", "v1"])

    def fingerprints(*settings, name):
        stages = open_run(config(*settings, name=name)).resolved
        return {stage: resolved.fingerprint for stage, resolved in stages.items()}

    first = fingerprints(name="a")
    assert fingerprints("model.revision=v1", name="b") == first
    assert fingerprints(f"model.revision={commit}", name="c") == first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    assert fingerprints(name="d") == first
    server.push(ID, {**weights, "generation_config.json": b"{}"})
    moved = fingerprints(name="e")
    assert all(moved[name] != first[name] for name in first)


def test_a_run_stays_on_its_commit_and_another_one_starts_from_the_new_one(
    server, weights, config, tmp_path
):
    old = server.push(ID, weights)
    run = open_run(config())
    assert run.config.model.revision == f"main@{old}"
    file = tmp_path / "begun.yaml"
    file.write_text(loading.dump(run.config))
    new = server.push(ID, {**weights, "generation_config.json": b"{}"})
    server.asked.clear()
    assert pinned(config(), [tmp_path / "absent", file]).model.revision == f"main@{old}"
    assert loading.load(file).model.folder == run.config.model.folder
    assert not server.asked
    assert pinned(config(), []).model.revision == f"main@{new}"
    server.push(ID, weights, ["v2"])
    assert pinned(config("model.revision=v2"), [file]).model.revision == f"v2@{old}"
    assert pinned(config(f"model.revision={new}"), [file]).model.revision == new


def test_a_comparison_stays_on_the_commit_of_its_tuning(server, weights, config, tmp_path):
    """Interrupted while it tunes, it has no run yet."""
    old = server.push(ID, weights)
    folder = tmp_path / "compare"
    for file in (folder / "tuning" / "search.yaml", folder / "agcl-seed1" / "config.yaml"):
        file.parent.mkdir(parents=True)
        file.write_text(loading.dump(open_run(config()).config))
        server.push(ID, {**weights, "generation_config.json": b"{}"})
        found = begun(config(), folder, ["sequential", "agcl"], 2)
        assert pinned(config(), found).model.revision == f"main@{old}"
        file.unlink()
        server.push(ID, weights)


def test_a_run_trains_and_a_worker_elsewhere_downloads_what_its_cache_lacks(
    server, weights, config, tmp_path, monkeypatch
):
    commit = server.push(ID, weights)
    run = open_run(config())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "cache")
    run_stages(list(run.resolved.values()), Context(ray_data=False), lambda records: None)
    assert (hub.folder_of(ID, commit) / "model.safetensors").exists()
    assert not (tmp_path / "cache").exists()
    assert all(stage.is_complete() for stage in run.resolved.values())
    assert hub.on_this_machine(tmp_path / "no" / "such") == tmp_path / "no" / "such"


@pytest.fixture
def refused(server, config, tmp_path, capsys):
    """Runs `agcl run`, which must say one line and write nothing."""

    def run(*settings):
        config()
        code = cli.main(["run", str(tmp_path / "config.yaml"), *settings])
        (line,) = capsys.readouterr().err.splitlines()
        assert code == cli.BAD_INPUT
        assert not (tmp_path / "storage").exists()
        return line

    return run


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_models_that_cannot_be_read_end_with_a_line_that_says_what_to_do(
    server, weights, refused, monkeypatch, token
):
    server.token = "hf_the-right-one"
    for name in ("gated", "private", "pickled"):
        server.push(f"org/{name}", weights)
    server.push("org/pickled", {"config.json": weights["config.json"], "model.bin": b"pickle"})
    server.push(ID, weights)
    server.gated, server.private = {"org/gated"}, {"org/private"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    who = "with the token in HF_TOKEN" if token else "without HF_TOKEN"
    for settings, said in {
        "model.path=org/gated": f"model.path: org/gated is gated and does not open {who}; accept",
        "model.path=org/private": f"shows no model org/private {who}; .* set HF_TOKEN",
        "model.path=org/none": f"there is no folder org/none, .* no model org/none {who}",
        "model.path=org/pickled": "model.path: org/pickled has no safetensors at main",
        "model.path=org/a--b": "no model on the hub can be called that",
        "model.revision=v9": f"model.revision: {ID} has no branch, tag or commit v9 on http://",
        f"model.revision={'ab' * 20}": f"model.revision: {ID} has no branch, tag or commit abab",
    }.items():
        line = refused(settings)
        assert re.search(f"^agcl: .*{said}", line), line
        assert str(token) not in line
    assert not [name for name in server.downloaded() if name.endswith((".bin", ".safetensors"))]


def test_a_private_and_a_gated_model_open_with_their_token(server, weights, config, monkeypatch):
    server.token = "hf_the-right-one"
    server.push(ID, weights)
    server.gated, server.private = {ID}, {ID}
    monkeypatch.setenv("HF_TOKEN", server.token)
    run = open_run(config())
    assert server.token not in loading.dump(run.config)


def test_without_a_network_the_cache_serves_and_else_a_line_says_what_to_do(
    server, weights, config, refused, monkeypatch, tmp_path
):
    commit = server.push(ID, weights)
    open_run(config())
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert open_run(config()).config.model.revision == f"main@{commit}"
        said = "HF_HUB_OFFLINE is set; run once" if offline else "127.0.0.1:9 cannot be reached ("
        line = refused("model.path=org/other")
        assert line.startswith("agcl: model.path: there is no folder org/other, and org/other at ")
        assert said in line
    (hub.folder_of(ID, commit) / "model.safetensors").resolve().unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert f"{ID} at main is not, or not whole, in {tmp_path / 'cache'}" in refused()


def test_planning_needs_no_network_once_the_commit_is_known(server, weights, config):
    server.push(ID, weights)
    opened = open_run(config()).config
    server.asked.clear()
    assert resolve(plan(opened).stages, opened.storage)
    assert not server.asked
    with pytest.raises(InputError, match="no-such"):
        loading.load(Path("no-such.yaml"))


def test_plan_tasks_and_init_leave_the_weights_on_the_hub(
    server, weights, config, tmp_path, monkeypatch
):
    def interrupt(run, console):  # Before Ray starts.
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.tasks.prepare_tasks", interrupt)
    server.push(ID, weights)
    few = config()
    planned = open_run(few, weights=False)
    file = str(tmp_path / "config.yaml")
    assert cli.main(["plan", file, "--formula-only"]) == cli.OK
    assert cli.main(["tasks", file]) == cli.INTERRUPTED
    made = ["init", ID, str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "made.yaml")]
    assert cli.main(made) == cli.OK
    assert "config.json" in server.downloaded()
    assert not [name for name in server.downloaded() if "safetensors" in name]
    opened = open_run(few)
    assert "model.safetensors" in server.downloaded()
    assert {n: s.fingerprint for n, s in opened.resolved.items()} == {
        n: s.fingerprint for n, s in planned.resolved.items()
    }


def test_a_download_that_was_begun_is_completed_by_a_plan(server, weights, config):
    commit = server.push(ID, weights)
    folder = hub.fetch(ID, commit, weights=False)
    (folder / "model.safetensors.index.json").write_text("{}")
    hub.fetch(ID, commit, weights=False)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("left_by", ["a kill", "plan"])
def test_a_worker_fetches_what_its_snapshot_lacks(server, weights, left_by):
    commit = server.push(ID, weights)
    folder = hub.fetch(ID, commit, weights=left_by == "a kill")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (hub.on_this_machine(folder) / "model.safetensors").is_file()
