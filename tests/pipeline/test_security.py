"""What SECURITY.md promises: no code from data, nothing outside the storage, no secret written."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import ray
import torch
import yaml

from agcl.errors import InputError
from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.model.check import check_folder
from agcl.tasks import TRAIN, check_names, huggingface
from pipeline.config import loading
from pipeline.config.resources import Resources, Tracking
from pipeline.execution import cluster
from pipeline.execution.session import run_stages
from pipeline.plan.stage import ResolvedStage
from pipeline.run import execute, open_run
from pipeline.secrets import masked
from pipeline.stages.context import Context
from pipeline.storage import Local
from pipeline.tracking.client import TrackingFailed
from pipeline.tracking.tracker import Tracker

ROOT = Path(__file__).parent.parent.parent
PASSWORD = "hunter2/with@signs"
URI = f"http://someone:{PASSWORD}@127.0.0.1"


@pytest.fixture
def config_of(tmp_path):
    """The config of a YAML text, its storage in an empty folder."""

    def load(text, *settings):
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return loading.load(file, [f"storage={tmp_path / 'storage'}", *settings])

    return load


# Nothing outside the storage folder


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb", "x" * 101, "é" * 60, "~"],
)
def test_no_name_of_a_run_leaves_the_storage(config_of, name):
    with pytest.raises(InputError, match=r"^name: "):
        config_of(yaml.safe_dump({"name": name}))


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb", "\x1b[2J", "é" * 60]
)
def test_no_name_of_a_task_leaves_the_storage(config_of, tmp_path, name):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": " b"}\n')
    task = {"name": name, "train": str(tmp_path / "rows.jsonl")}
    config = config_of(yaml.safe_dump({"tasks": {"format": "jsonl", "sequence": [task]}}))
    with pytest.raises(InputError, match="cannot be used as a folder name"):
        open_run(config)


def test_folders_of_odd_but_allowed_task_names_lie_in_the_storage(config_of, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": " b"}\n')
    names = ["...", "~", "-rf", "$HOME", "a b;c", "名前", "x" * 100]
    check_names(names)
    sequence = [{"name": name, "train": str(tmp_path / "rows.jsonl")} for name in names]
    config = config_of(yaml.safe_dump({"tasks": {"format": "jsonl", "sequence": sequence}}))
    folders = [stage.folder for stage in open_run(config).resolved.values()]
    assert {folder.parent for folder in folders} == {tmp_path / "storage" / "stages"}
    assert all(folder.resolve() == folder for folder in folders)


def test_names_of_tasks_that_come_to_one_folder_are_refused(config_of, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": " b"}\n')
    sequence = [{"name": n, "train": str(tmp_path / "rows.jsonl")} for n in ("a b", "c", "a;b")]
    config = config_of(yaml.safe_dump({"tasks": {"format": "jsonl", "sequence": sequence}}))
    with pytest.raises(InputError, match="'a b' and 'a;b' give the same folder name"):
        open_run(config)


# No code from data


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def evil_model(tmp_path):
    """A good model folder with code and pickles beside, as a download may bring them."""
    folder, marker = tmp_path / "model", tmp_path / "code-was-run"
    tokenizer = builtin_tokenizer(["some text"], vocab_size=300)
    models.save(builtin_model(len(tokenizer), seed=0), tokenizer, folder)
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    (folder / "evil.py").write_text(f"{code}class Evil: pass\n")
    (folder / "__init__.py").write_text(code)
    for name in ("pytorch_model.bin", "vocab.pkl", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Evil(marker)))
    auto = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    for name, classes in (
        ("config.json", auto),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        keys = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**keys, "auto_map": classes}))
    return SimpleNamespace(folder=folder, marker=marker, size=len(tokenizer))


def test_code_and_pickles_in_a_model_folder_are_never_run(evil_model):
    check_folder(evil_model.folder)
    models.empty_model(evil_model.folder)
    models.load_tokenizer(evil_model.folder)
    loaded = models.load_model(evil_model.folder)
    whole = builtin_model(evil_model.size, seed=0)
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)
    assert not evil_model.marker.exists()


def test_pickled_weights_alone_are_refused(evil_model):
    (evil_model.folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights .expected model\.safetensors"):
        check_folder(evil_model.folder)
    with pytest.raises(OSError, match="safetensors"):
        models.load_model(evil_model.folder)
    assert not evil_model.marker.exists()


def test_a_data_sets_script_is_never_run(tmp_path):
    folder, marker = tmp_path / "evil", tmp_path / "code-was-run"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    rendering = {"prompt": "{prompt}", "answer": "{answer}"}
    task = huggingface.task(
        "mine", str(folder), {TRAIN: "train"}, subset=None, revision=None, **rendering
    )
    with pytest.raises(InputError, match="evil"):
        list(task.splits[TRAIN]())
    assert not marker.exists()


# No secret is written


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (URI, "http://***@127.0.0.1"),
        (f"tracking.uri={URI}:5000/x now", "tracking.uri=http://***@127.0.0.1:5000/x now"),
        ("postgresql://u:p/w@h/db?sslmode=on", "postgresql://***@h/db?sslmode=on"),
        ("https://hf_token@h/x", "https://***@h/x"),
        ("http://h/x?user=u&password=p&y=1", "http://h/x?user=u&password=***&y=1"),
        ("http://h/x?access_token=abc", "http://h/x?access_token=***"),
        ("https://h/a@b sqlite:////a@b/c", "https://h/a@b sqlite:////a@b/c"),
        ("no address, an@mail.of?a=b", "no address, an@mail.of?a=b"),
    ],
)
def test_credentials_in_addresses_are_masked(text, kept):
    assert masked(text) == kept


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN MLFLOW_TRACKING_PASSWORD AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN MY_API_KEY".split(),
)
def test_secrets_of_the_environment_are_masked(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t value")
    assert masked("401 for s3cr3t value, sorry") == "401 for ***, sorry"


def test_credentials_are_used_and_not_dumped(config_of):
    config = config_of("", f"tracking.uri={URI}")
    assert config.tracking.uri == URI
    assert loading.changed(config, {"seed": 3}).tracking.uri == URI
    assert PASSWORD not in loading.dump(config)
    assert PASSWORD not in str(config.model_dump(mode="json"))
    assert "uri: http://***@127.0.0.1" in loading.dump(config)


def test_a_config_whose_credentials_were_left_out_says_so(config_of, tmp_path):
    again = config_of(loading.dump(config_of("", f"tracking.uri={URI}")))
    with pytest.raises(InputError, match=r"^tracking\.uri: its credentials were never written"):
        Tracker(tmp_path, again.tracking.uri)


@pytest.mark.parametrize(
    "text",
    [
        f"tracking: {{uri: ['{URI}']}}",
        f"tracking: {{uri: '{URI}', uri: 2}}",
        f"tracking: {{enabled: '{URI}'}}",
        f"method: '{URI}'",
        f"tracking: '{URI}",
        f"tracking: {{uri: '{'x' * 60} {URI} {'y' * 60}', enabled: 5}}\nseed: '{URI}'",
    ],
)
def test_no_error_shows_credentials(config_of, text):
    with pytest.raises(InputError) as caught:
        config_of(text)
    assert PASSWORD not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", [PASSWORD, "hunter2"])
def test_a_server_that_cannot_be_reached_is_named_without_credentials(
    tmp_path, monkeypatch, password
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises((TrackingFailed, InputError)) as caught:  # The latter: no address at all.
        Tracker(tmp_path, f"http://someone:{password}@127.0.0.1:1")
    assert "cannot use MLflow at http" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def fails(config, inputs, out_dir, context):
    raise RuntimeError(f"denied for {os.environ['HF_TOKEN']} at {URI}")


def test_a_failed_stage_tells_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    stage = ResolvedStage(
        "toy", fails, {}, {}, tmp_path / "toy", {"fingerprint": "f"}, Local(tmp_path)
    )
    records = []
    with pytest.raises(RuntimeError):
        run_stages([stage], Context(), records.extend)
    (failed,) = [record for record in records if record["state"] == "failed"]
    assert failed["error"] == "RuntimeError: denied for *** at http://***@127.0.0.1"
    assert "hf_s3cr3t" not in failed["traceback"]
    assert "hunter2" not in failed["traceback"]
    assert "Traceback" in failed["traceback"]


@pytest.mark.ray
def test_nothing_that_a_run_leaves_holds_a_secret(finished):
    files = [file for file in finished.root.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    for file in files:
        content = file.read_bytes()
        for name, value in finished.secrets.items():
            assert value.encode() not in content, (name, file)
    for value in finished.secrets.values():
        assert value not in finished.output


# Loopback


def listeners(port):
    """Local addresses that listen on a port, from the kernel's tables."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ui(finished, tmp_path):
    """`agcl ui` on a copy of the finished runs' storage."""
    storage, port = tmp_path / "storage", free_port()
    shutil.copytree(finished.storage, storage)
    with (tmp_path / "out").open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jobs", "ui", "--storage", str(storage), "--port", str(port)],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while not listeners(port):
            assert server.poll() is None, "agcl ui ended"
            assert time.monotonic() < deadline, "agcl ui does not listen"
            time.sleep(0.2)
        yield SimpleNamespace(storage=storage, port=port, server=server, out=tmp_path / "out")
    finally:
        server.terminate()  # Killed, it would leave its server.
        server.wait(30)


@pytest.mark.slow
@pytest.mark.ray
def test_the_ui_is_on_loopback_and_a_run_records_there_without_leaving_its_password(
    finished, ui, undrawn
):
    assert listeners(ui.port) == {"0100007F"}  # 127.0.0.1
    uri = f"http://someone:{PASSWORD.replace('/', '%2F').replace('@', '%40')}@127.0.0.1:{ui.port}"
    config = finished.configs["sequential"].model_copy(
        update={"storage": Local(ui.storage), "name": "shown", "tracking": Tracking(uri=uri)}
    )
    run = open_run(config)
    command = masked(f"agcl run x.yaml tracking.uri={uri}")
    console = finished.console()
    execute({"sequential": run}, run.folder, title="shown", command=command, console=console)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{ui.storage}/mlflow.db")
    (found,) = client.search_runs(["1"], "attributes.run_name = 'shown'")
    assert found.info.status == "FINISHED"
    assert found.data.params["tracking.uri"] == f"http://***@127.0.0.1:{ui.port}"
    for file in [*run.folder.rglob("*"), *ui.storage.glob("mlflow.db*")]:
        if file.is_file():
            assert b"hunter2" not in file.read_bytes(), file
    assert "hunter2" not in console.file.getvalue()
    experiment = client.get_experiment("1")
    check_that_it_prints_its_address_and_ends(ui)
    view = json.loads(experiment.tags["mlflow.sharedViewState.agcl"])
    assert view["searchFilter"] == "tags.kind != 'stage'"
    assert "metrics.`average`" in view["selectedColumns"]


def check_that_it_prints_its_address_and_ends(ui):
    """With all of its processes, so that nobody listens any more."""
    ui.server.send_signal(signal.SIGTERM)
    assert ui.server.wait(timeout=20) == 130
    assert not listeners(ui.port)
    view = "workflowType=machine_learning&viewStateShareKey=agcl"
    address = f"http://127.0.0.1:{ui.port}/#/experiments/1/runs?{view}"
    # No line of the server that runs well, such as its requests.
    lines = ["starting MLflow; Ctrl-C stops it", f"MLflow UI   {address}"]
    assert ui.out.read_text().splitlines() == lines


def test_a_local_cluster_serves_no_dashboard_and_logs_no_environment(monkeypatch):
    started = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **settings: started.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1}}])
    with cluster.cluster(Resources()):
        assert started["include_dashboard"] is False
    # Ray writes the workers' environment into its logs.
    assert started["runtime_env"]["env_vars"].keys() <= cluster.WORKER_ENVIRONMENT.keys()


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_cluster_answers_nobody_without_the_token(monkeypatch):
    """Ray's own ports are on all interfaces: its token is what keeps others out."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with cluster.cluster(Resources()):
        address = ray.get_runtime_context().gcs_address
        status = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        for token, allowed in [({}, True), ({"RAY_AUTH_TOKEN": 64 * "0"}, False)]:
            asked = subprocess.run(
                status, env={**os.environ, **token}, capture_output=True, text=True, timeout=120
            )
            assert (asked.returncode == 0) == allowed
            assert ("AuthenticationError" in asked.stderr) != allowed
