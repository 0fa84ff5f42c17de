"""Storage on an object store, against a real S3 server: whole there or not there at all."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference.object_store import Server
from rich.console import Console

from agcl.errors import InputError
from pipeline import artifact, loading, mirror, object_store
from pipeline.artifact import CorruptArtifact
from pipeline.dag import Stage, resolve
from pipeline.mirror import fetch, is_complete, push
from pipeline.object_store import StoreFailed, cache_of
from pipeline.run import execute, open_run, rewrite_report
from pipeline.session import run_works
from pipeline.stages.context import Context
from pipeline.stored_checkpoint import StoredCheckpoint

FILES = {"a.txt": b"one", "deep/b é.bin": bytes(range(256)) * 4000, "empty": b""}
FINGERPRINT = "f00d"


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A new bucket, and an empty cache on this machine."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_PAUSES", (0.0, 0.0))
    move_to(tmp_path / "one", monkeypatch)
    return server.bucket()


def move_to(machine, monkeypatch):
    """What another machine knows: nothing but the store."""
    monkeypatch.setenv("AGCL_CACHE", str(machine))
    mirror._manifest.cache_clear()
    object_store.check.cache_clear()


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Go on as on another machine."""
    return lambda: move_to(tmp_path / "two", monkeypatch)


def folder_of(bucket, name="toy-f00d"):
    return cache_of(bucket.uri) / "stages" / name


def make(folder, files=None, fingerprint=FINGERPRINT):
    with artifact.writing(folder, {"fingerprint": fingerprint}) as out:
        for name, data in (files or FILES).items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
    return folder


def contents(folder):
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if name != "manifest.json"}


def test_an_artifact_comes_back_whole_on_another_machine(bucket, elsewhere):
    push(bucket.uri, make(folder_of(bucket)))
    manifest = json.loads(bucket.get("stages/toy-f00d/manifest.json"))
    assert sorted(bucket.names()) == sorted(
        ["stages/toy-f00d/manifest.json"]
        + [f"stages/toy-f00d/{manifest['attempt']}/{name}" for name in FILES]
    )
    elsewhere()
    assert is_complete(bucket.uri, folder_of(bucket), FINGERPRINT)
    assert not folder_of(bucket).exists()
    fetch(bucket.uri, folder_of(bucket))
    assert contents(folder_of(bucket)) == FILES
    assert artifact.is_complete(folder_of(bucket), FINGERPRINT)
    artifact.verify(folder_of(bucket))
    assert [path.name for path in folder_of(bucket).parent.iterdir()] == ["toy-f00d"]


def test_without_its_manifest_it_is_not_there(bucket):
    push(bucket.uri, make(folder_of(bucket)))
    bucket.delete("stages/toy-f00d/manifest.json")
    assert not is_complete(bucket.uri, folder_of(bucket), FINGERPRINT)


def test_the_manifest_is_written_last(bucket, monkeypatch):
    written, write = [], object_store.write

    def note(uri, name, content):
        written.append(sorted(bucket.names()))
        write(uri, name, content)

    monkeypatch.setattr(object_store, "write", note)
    push(bucket.uri, make(folder_of(bucket)))
    ((*before,),) = written
    assert len(before) == len(FILES)
    assert not any(key.endswith("manifest.json") for key in before)


def test_an_upload_that_was_cut_off_leaves_nothing_and_goes_on(bucket, monkeypatch):
    def interrupt(*rest):
        raise KeyboardInterrupt

    folder = make(folder_of(bucket))
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push(bucket.uri, folder)
    assert len(bucket.names()) == len(FILES)
    assert not is_complete(bucket.uri, folder, FINGERPRINT)
    lost = next(key for key in bucket.names() if key.endswith("a.txt"))
    bucket.delete(lost)
    sent, upload = [], object_store.upload
    monkeypatch.setattr(object_store, "upload", lambda *of: sent.append(of[2]) or upload(*of))
    push(bucket.uri, folder)
    assert sent == [lost]
    assert is_complete(bucket.uri, folder, FINGERPRINT)


def test_a_process_killed_while_it_uploads_leaves_nothing(bucket, tmp_path, server):
    folder = make(folder_of(bucket), {f"{i}.bin": os.urandom(2**19) for i in range(30)})
    code = (
        "import sys; from pathlib import Path; from pipeline.mirror import push\n"
        "print('now', flush=True); push(sys.argv[1], Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", code, bucket.uri, folder]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not bucket.names():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert 0 < len(bucket.names()) < 30
    assert not is_complete(bucket.uri, folder, FINGERPRINT)
    push(bucket.uri, folder)
    assert is_complete(bucket.uri, folder, FINGERPRINT)


def test_two_that_upload_at_once_never_mix_files(bucket, monkeypatch, tmp_path):
    def on(machine):
        move_to(tmp_path / machine, monkeypatch)
        return {name: data + machine.encode() for name, data in FILES.items()}

    def there():
        move_to(tmp_path / f"reader-{time.monotonic_ns()}", monkeypatch)
        fetch(bucket.uri, folder_of(bucket))
        return contents(folder_of(bucket))

    ones = on("one")
    make(folder_of(bucket), ones)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", lambda *rest: None)
        push(bucket.uri, folder_of(bucket))  # All but its last step.
    twos = on("two")
    push(bucket.uri, make(folder_of(bucket), twos))
    assert there() == twos
    on("one")
    push(bucket.uri, folder_of(bucket))
    assert there() == ones
    assert len(bucket.names()) == 2 * len(FILES) + 1


def damage(bucket, name, content):
    key = next(key for key in bucket.names() if key.endswith(name))
    bucket.put(key, content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"One", r"a\.txt is not what was written"),
        ("a.txt", b"", r"a\.txt is not what was written"),
        ("manifest.json", b'{"fingerprint": "f00d"', r"manifest\.json is not JSON"),
        ("manifest.json", b"{}", r"manifest\.json lacks"),
        ("manifest.json", b'{"fingerprint": "f00d", "files": {}}', r"manifest\.json lacks its att"),
    ],
)
def test_damage_on_the_store_is_found_and_named_by_its_uri(bucket, elsewhere, name, content, said):
    push(bucket.uri, make(folder_of(bucket)))
    damage(bucket, name, content)
    elsewhere()
    with pytest.raises(CorruptArtifact, match=rf"^artifact {bucket.uri}/stages/toy-f00d .*{said}"):
        fetch(bucket.uri, folder_of(bucket))
    assert not folder_of(bucket).exists()
    assert list(folder_of(bucket).parent.glob("*")) == []


def test_a_lost_file_and_another_fingerprint_are_named(bucket, elsewhere):
    push(bucket.uri, make(folder_of(bucket)))
    with pytest.raises(CorruptArtifact, match="toy-f00d is corrupt: its fingerprint is another"):
        is_complete(bucket.uri, folder_of(bucket), "beef")
    bucket.delete(next(key for key in bucket.names() if key.endswith("a.txt")))
    elsewhere()
    with pytest.raises(CorruptArtifact, match=r"toy-f00d is corrupt: a\.txt is not what was"):
        fetch(bucket.uri, folder_of(bucket))


def test_a_name_that_leaves_the_folder_is_refused(bucket, elsewhere, tmp_path):
    push(bucket.uri, make(folder_of(bucket)))
    manifest = json.loads(bucket.get("stages/toy-f00d/manifest.json"))
    manifest["files"]["../../escaped"] = manifest["files"].pop("a.txt")
    bucket.put("stages/toy-f00d/manifest.json", json.dumps(manifest).encode())
    elsewhere()
    with pytest.raises(CorruptArtifact, match="escaped"):
        fetch(bucket.uri, folder_of(bucket))
    assert not list(tmp_path.rglob("escaped"))


def test_one_downloads_and_the_others_on_its_machine_wait(bucket, elsewhere, monkeypatch):
    push(bucket.uri, make(folder_of(bucket)))
    elsewhere()
    taken, download = [], object_store.download
    monkeypatch.setattr(object_store, "download", lambda *of: taken.append(of[1]) or download(*of))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(bucket.uri, folder_of(bucket)), range(4)))
    assert len(taken) == len(FILES)
    assert contents(folder_of(bucket)) == FILES


def test_a_stage_that_reads_only_some_files_gets_no_others(bucket, elsewhere):
    push(bucket.uri, make(folder_of(bucket)))
    assert fetch(bucket.uri, folder_of(bucket), ["a.txt"]) == folder_of(bucket)
    elsewhere()
    for wanted in (["a.txt", "none"], ["empty"]):
        some = fetch(bucket.uri, folder_of(bucket), wanted)
        assert some != folder_of(bucket)
        assert fetch(bucket.uri, folder_of(bucket), wanted[::-1]) == some
        artifact.verify(some)
        assert contents(some) == {name: FILES[name] for name in wanted if name in FILES}
    assert not folder_of(bucket).exists()


def test_one_file_is_read_without_the_others(bucket, elsewhere):
    push(bucket.uri, make(folder_of(bucket)))
    elsewhere()
    assert mirror.read(bucket.uri, folder_of(bucket), "a.txt") == b"one"
    assert mirror.read(bucket.uri, folder_of(bucket), "none") is None
    assert not folder_of(bucket).exists()
    damage(bucket, "a.txt", b"two")
    with pytest.raises(CorruptArtifact, match=r"a\.txt"):
        mirror.read(bucket.uri, folder_of(bucket), "a.txt")


def test_results_go_there_and_come_back_without_links_and_scratch(bucket, elsewhere):
    folder = cache_of(bucket.uri) / "run"
    with mirror.results(bucket.uri, folder):
        (folder / "trials" / "0").mkdir(parents=True)
        (folder / ".ray-train").mkdir()
        for name in ("metrics.json", "trials/0/trial.json", ".ray-train/x", "a.part", "b.lock"):
            (folder / name).write_text(name)
        (folder / "link").symlink_to("metrics.json")
        (folder / "stage").symlink_to(folder / "trials", target_is_directory=True)
    assert bucket.names() == ["run/metrics.json", "run/trials/0/trial.json"]
    elsewhere()
    folder = cache_of(bucket.uri) / "run"

    def fail():
        with mirror.results(bucket.uri, folder):
            assert (folder / "trials" / "0" / "trial.json").read_text() == "trials/0/trial.json"
            (folder / "error.log").write_text("why")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bucket.get("run/error.log") == b"why"


class Toys:
    """A chain of three stages that count their calls; `after` is called at the end of each."""

    def __init__(self, uri):
        self.uri, self.calls, self.after = uri, [], lambda name: None

    def run(self, config, inputs, out_dir, context):
        self.calls.append(config["name"])
        text = "".join((folder / "out.txt").read_text() for folder in inputs.values())
        (out_dir / "out.txt").write_text(text + config["name"])
        self.after(config["name"])

    def works(self):
        stages, last = [], {}
        for name in "abc":
            stages.append(Stage(name, self.run, {"name": name}, last))
            last = {"before": stages[-1]}
        return list(resolve(stages, self.uri).values())

    def start(self):
        self.calls, records = [], []
        try:
            run_works(self.works(), Context(), records.extend)
        except Exception as error:
            return records, error
        return records, None


@pytest.fixture
def toys(bucket):
    return Toys(bucket.uri)


def test_stages_that_another_machine_finished_are_neither_run_nor_downloaded(toys, elsewhere):
    assert toys.start()[1] is None
    assert toys.calls == ["a", "b", "c"]
    elsewhere()
    assert toys.start() == ([], None)
    assert toys.calls == []
    assert not list(cache_of(toys.uri).rglob("out.txt"))
    assert [work.read("out.txt") for work in toys.works()] == [b"a", b"ab", b"abc"]


def test_a_stage_downloads_what_it_reads_and_no_more(toys, bucket, elsewhere):
    assert toys.start()[1] is None
    last = toys.works()[-1].folder
    bucket.delete(f"stages/{last.name}/manifest.json")
    elsewhere()
    assert toys.start()[1] is None
    assert toys.calls == ["c"]
    assert [work.folder.exists() for work in toys.works()] == [False, True, True]


def test_an_upload_that_fails_fails_the_stage_and_is_made_good_without_computing_it_again(
    toys, bucket, server
):
    def lose_bucket(name):
        if name == "b":
            for key in bucket.names():
                bucket.delete(key)
            server.client.delete_bucket(Bucket=bucket.name)

    toys.after = lose_bucket
    records, error = toys.start()
    assert isinstance(error, StoreFailed)
    (failed,) = [record for record in records if record.get("state") == "failed"]
    assert failed["error"].startswith(f"storage: {bucket.uri}: ")
    assert "NO_SUCH_BUCKET" in failed["error"]
    assert [work.folder.exists() for work in toys.works()] == [True, True, False]
    server.client.create_bucket(Bucket=bucket.name)
    mirror._manifest.cache_clear()
    toys.after = lambda name: None
    records, error = toys.start()
    assert error is None
    assert toys.calls == ["c"]
    assert [work.is_complete() for work in toys.works()] == [True] * 3


def test_a_checkpoint_outlives_its_machine_until_it_is_not_needed(bucket, elsewhere):
    def trained():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        file = artifact.checkpoint_of(folder_of(bucket))
        checkpoint = StoredCheckpoint(file, FINGERPRINT, 1e-9, bucket.uri)
        return dict(model.named_parameters()), optimizer, checkpoint

    weights, optimizer, checkpoint = trained()
    assert checkpoint.restore(weights, optimizer) == []
    checkpoint.file.parent.mkdir(parents=True)
    weights["weight"].sum().backward()
    optimizer.step()
    checkpoint.write_if_due(weights, optimizer, [({"loss": 0.5}, 1)])
    elsewhere()
    others, optimizer, checkpoint = trained()
    assert not torch.equal(others["weight"], weights["weight"])
    assert checkpoint.restore(others, optimizer) == [({"loss": 0.5}, 1)]
    assert torch.equal(others["weight"], weights["weight"])
    assert optimizer.state[others["weight"]]["step"] == 1
    checkpoint.remove()
    assert not checkpoint.file.exists()
    assert bucket.names() in ([], ["stages/"])  # pyarrow leaves the folder.
    checkpoint.remove()


def test_a_request_that_fails_is_sent_again(bucket, monkeypatch):
    left = [OSError("AWS Error INTERNAL_FAILURE"), OSError("AWS Error SLOW_DOWN")]

    def request():
        if left:
            raise left.pop()
        return "done"

    assert object_store._trying(bucket.uri, request) == "done"
    left += [OSError("AWS Error SLOW_DOWN")] * 3
    with pytest.raises(StoreFailed, match=f"storage: {bucket.uri}: AWS Error SLOW_DOWN"):
        object_store._trying(bucket.uri, request)
    left += [OSError("AWS Error ACCESS_DENIED"), OSError("never seen")][::-1]
    with pytest.raises(StoreFailed, match="ACCESS_DENIED"):
        object_store._trying(bucket.uri, request)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://no-such-bucket/prefix", "there is no bucket no-such-bucket"),
        ("nfs://host/folder", "nfs://host/folder: Unrecognized filesystem type"),
        ("s3://b?colour=red", "s3://b: Unexpected query parameter in S3 URI: 'colour'"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_before_any_work(bucket, uri, said):
    with pytest.raises(InputError, match=rf"(?s)^(?!.*\n)storage: {said}"):
        object_store.check(uri)


@pytest.mark.slow  # pyarrow itself tries for six seconds.
def test_a_server_that_is_down_is_named_before_any_work(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"^storage: s3://some/where: .*NETWORK_CONNECTION"):
        object_store.check("s3://some/where")


def test_a_store_that_refuses_is_named_before_any_work(bucket, server):
    object_store.check_writable(bucket.uri)
    assert bucket.names() == [".writable"]
    with server.asking_who_it_is():
        for check in (object_store.check, object_store.check_writable):
            with pytest.raises(InputError, match=rf"^storage: {bucket.uri}: .*INVALID_ACCESS_KEY"):
                check(bucket.uri)
    object_store.check(bucket.uri)


def test_any_file_system_of_pyarrow_will_do(tmp_path, monkeypatch, elsewhere):
    move_to(tmp_path / "one", monkeypatch)
    uri = (tmp_path / "share").as_uri()
    object_store.check(uri)
    object_store.check_writable(uri)
    folder = cache_of(uri) / "stages" / "toy-f00d"
    push(uri, make(folder))
    elsewhere()
    folder = cache_of(uri) / "stages" / "toy-f00d"
    fetch(uri, folder)
    assert contents(folder) == FILES


def config(tmp_path, *settings):
    file = tmp_path / "config.yaml"
    file.write_text("tracking: {enabled: false}")
    return loading.load(file, settings)


def test_a_config_keeps_the_uri_and_has_a_folder_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("AGCL_CACHE", str(tmp_path / "cache"))
    one = config(tmp_path, "storage=s3://bucket/prefix/")
    assert one.storage == "s3://bucket/prefix"
    assert one.local_storage.parent == tmp_path / "cache"
    assert "storage: s3://bucket/prefix\n" in loading.dump(one)
    assert config(tmp_path, "storage=s3://bucket/other").local_storage != one.local_storage
    local = config(tmp_path, f"storage={tmp_path}")
    assert local.storage == local.local_storage == tmp_path
    monkeypatch.setenv("AGCL_STORAGE", "gs://from/environment")
    assert config(tmp_path).storage == "gs://from/environment"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:pa/ss@bucket/x",
        "s3://someone@bucket",
        "s3://bucket/x?secret_key=pa/ss&scheme=http",
    ],
)
def test_credentials_in_the_uri_are_refused_and_not_shown(tmp_path, uri):
    with pytest.raises(InputError, match=r"^storage: credentials do not go into the URI") as caught:
        config(tmp_path, f"storage={uri}")
    assert "pa/ss" not in str(caught.value)


def test_a_run_goes_on_anywhere_and_leaves_everything_on_the_store(
    bucket, elsewhere, tiny_config, run_in_process
):
    settings = (
        "tracking.enabled=false",
        "training.epochs=1",
        "model.pretraining.epochs=1",
        "importance.correct_only=false",
    )

    def finish():
        run = open_run(tiny_config(bucket.uri, *settings))
        console = Console(file=io.StringIO(), width=200)
        runs = {"agcl": run}
        (result,) = execute(runs, run.folder, title="tiny", command="agcl run", console=console)
        return run, result, console.file.getvalue()

    open_run(tiny_config(bucket.uri, *settings))
    assert bucket.names() == []
    run_in_process(tiny_config(bucket.uri, *settings))
    run, first, output = finish()
    assert "every stage is complete already" in output
    assert set(bucket.names()) >= {
        f"tiny/{name}" for name in ("config.yaml", "metrics.json", "report.html", "model/README.md")
    }
    assert not any(name.endswith((".lock", ".part", ".checkpoint")) for name in bucket.names())
    final = bucket.get("tiny/model/location.txt").decode().strip()
    assert f"{final.removeprefix(bucket.uri + '/')}/model.safetensors" in bucket.names()
    elsewhere()
    again, second, output = finish()
    assert "every stage is complete already" in output
    assert second.metrics == first.metrics
    assert again.folder != run.folder
    assert not (again.folder.parent / "stages").exists()
    assert rewrite_report(f"{bucket.uri}/tiny", "agcl test") == again.folder / "report.html"
    with pytest.raises(
        InputError, match=rf"name: {bucket.uri}/tiny holds a run with another 'seed' section"
    ):
        open_run(tiny_config(bucket.uri, *settings, "seed=1"))
    bucket.delete("tiny/config.yaml")
    open_run(tiny_config(bucket.uri, *settings, "seed=1"))


def test_mlflow_needs_an_address_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"^tracking\.uri: must be set where storage is an object"):
        config(tmp_path, "storage=s3://bucket", "tracking.enabled=true")
    config(tmp_path, "storage=s3://bucket", "tracking={uri: 'http://127.0.0.1:5000'}")
