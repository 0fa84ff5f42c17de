"""Storage on an object store: what is asked of it, what a config says, and a whole run."""

import io

import pytest
from rich.console import Console

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.results.report import rewrite_report
from pipeline.run import execute, open_run
from pipeline.storage import Bucket, Local, object_store
from pipeline.storage.object_store import StoreFailed


def test_a_request_that_fails_is_sent_again(bucket, monkeypatch):
    left = [OSError("AWS Error INTERNAL_FAILURE"), OSError("AWS Error SLOW_DOWN")]

    def request():
        if left:
            raise left.pop()
        return "done"

    assert object_store._retried(bucket.uri, request) == "done"
    left += [OSError("AWS Error SLOW_DOWN")] * 3
    with pytest.raises(StoreFailed, match=f"storage: {bucket.uri}: AWS Error SLOW_DOWN"):
        object_store._retried(bucket.uri, request)
    left += [OSError("AWS Error ACCESS_DENIED"), OSError("never seen")][::-1]
    with pytest.raises(StoreFailed, match="ACCESS_DENIED"):
        object_store._retried(bucket.uri, request)


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
    Bucket(bucket.uri).check_writable()
    assert bucket.names() == [".writable"]
    with server.asking_who_it_is():
        for check in (Bucket(bucket.uri).check, Bucket(bucket.uri).check_writable):
            with pytest.raises(InputError, match=rf"^storage: {bucket.uri}: .*INVALID_ACCESS_KEY"):
                check()
    object_store.check(bucket.uri)


def config(tmp_path, *settings):
    file = tmp_path / "config.yaml"
    file.write_text("tracking: {enabled: false}")
    return loading.load(file, settings)


def test_a_config_keeps_the_uri_and_has_a_folder_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("AGCL_CACHE", str(tmp_path / "cache"))
    one = config(tmp_path, "storage=s3://bucket/prefix/")
    assert one.storage == Bucket("s3://bucket/prefix")
    assert one.storage.root.parent == tmp_path / "cache"
    assert "storage: s3://bucket/prefix\n" in loading.dump(one)
    assert config(tmp_path, "storage=s3://bucket/other").storage.root != one.storage.root
    local = config(tmp_path, f"storage={tmp_path}")
    assert local.storage == Local(tmp_path)
    assert local.storage.root == tmp_path
    monkeypatch.setenv("AGCL_STORAGE", "gs://from/environment")
    assert config(tmp_path).storage == Bucket("gs://from/environment")


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
    bucket, elsewhere, tiny_config, run_in_process, undrawn
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
    assert rewrite_report(f"{bucket.uri}/tiny") == again.folder / "report.html"
    with pytest.raises(
        InputError, match=rf"name: {bucket.uri}/tiny holds a run with seed=0, not 1;"
    ):
        open_run(tiny_config(bucket.uri, *settings, "seed=1"))
    bucket.delete("tiny/config.yaml")
    open_run(tiny_config(bucket.uri, *settings, "seed=1"))


def test_mlflow_needs_an_address_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"^tracking\.uri: required if storage is an object store"):
        config(tmp_path, "storage=s3://bucket", "tracking.enabled=true")
    for server in ("http://127.0.0.1:5000", "databricks"):
        config(tmp_path, "storage=s3://bucket", f"tracking={{uri: '{server}'}}")
    for database in ("sqlite:////shared/mlflow.db", "postgresql://host/mlflow", "file:///mlruns"):
        of_database = f"tracking={{uri: '{database}'}}"
        with pytest.raises(InputError, match=r"^tracking\.uri: must be a server \(http"):
            config(tmp_path, "storage=s3://bucket", of_database)
        config(tmp_path, "storage=s3://bucket", of_database, "tracking.enabled=false")
        config(tmp_path, of_database)
