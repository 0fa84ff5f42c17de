"""Artifacts on an object store, a real S3 server: whole there or not there at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from reference.stored import FILES, FINGERPRINT, contents, folder_of, make, move_to

from agcl.errors import InputError
from pipeline.storage import Bucket, artifact, object_store
from pipeline.storage.artifact import CorruptArtifact


def test_an_artifact_comes_back_whole_on_another_machine(bucket, elsewhere):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    manifest = json.loads(bucket.get("stages/toy-f00d/manifest.json"))
    assert sorted(bucket.names()) == sorted(
        ["stages/toy-f00d/manifest.json"]
        + [f"stages/toy-f00d/{manifest['attempt']}/{name}" for name in FILES]
    )
    elsewhere()
    assert Bucket(bucket.uri).is_complete(folder_of(bucket.uri), FINGERPRINT)
    assert not folder_of(bucket.uri).exists()
    Bucket(bucket.uri).fetch(folder_of(bucket.uri))
    assert contents(folder_of(bucket.uri)) == FILES
    assert artifact.is_complete(folder_of(bucket.uri), FINGERPRINT)
    artifact.verify(folder_of(bucket.uri))
    assert [path.name for path in folder_of(bucket.uri).parent.iterdir()] == ["toy-f00d"]


def test_without_its_manifest_it_is_not_there(bucket):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    bucket.delete("stages/toy-f00d/manifest.json")
    assert not Bucket(bucket.uri).is_complete(folder_of(bucket.uri), FINGERPRINT)


def test_the_manifest_is_written_last(bucket, monkeypatch):
    written, write = [], object_store.write

    def note(uri, name, content):
        written.append(sorted(bucket.names()))
        write(uri, name, content)

    monkeypatch.setattr(object_store, "write", note)
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    ((*before,),) = written
    assert len(before) == len(FILES)
    assert not any(key.endswith("manifest.json") for key in before)


def test_an_upload_that_was_cut_off_leaves_nothing_and_goes_on(bucket, monkeypatch):
    def interrupt(*rest):
        raise KeyboardInterrupt

    folder = make(folder_of(bucket.uri))
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Bucket(bucket.uri).publish(folder)
    assert len(bucket.names()) == len(FILES)
    assert not Bucket(bucket.uri).is_complete(folder, FINGERPRINT)
    lost = next(key for key in bucket.names() if key.endswith("a.txt"))
    bucket.delete(lost)
    sent, upload = [], object_store.upload
    monkeypatch.setattr(object_store, "upload", lambda *of: sent.append(of[2]) or upload(*of))
    Bucket(bucket.uri).publish(folder)
    assert sent == [lost]
    assert Bucket(bucket.uri).is_complete(folder, FINGERPRINT)


def test_a_process_killed_while_it_uploads_leaves_nothing(bucket, tmp_path, server):
    folder = make(folder_of(bucket.uri), {f"{i}.bin": os.urandom(2**19) for i in range(30)})
    code = (
        "import sys; from pathlib import Path; from pipeline.storage import Bucket\n"
        "print('now', flush=True); Bucket(sys.argv[1]).publish(Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", code, bucket.uri, folder]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not bucket.names():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert 0 < len(bucket.names()) < 30
    assert not Bucket(bucket.uri).is_complete(folder, FINGERPRINT)
    Bucket(bucket.uri).publish(folder)
    assert Bucket(bucket.uri).is_complete(folder, FINGERPRINT)


def test_two_that_upload_at_once_never_mix_files(bucket, monkeypatch, tmp_path):
    def on(machine):
        move_to(tmp_path / machine, monkeypatch)
        return {name: data + machine.encode() for name, data in FILES.items()}

    def there():
        move_to(tmp_path / f"reader-{time.monotonic_ns()}", monkeypatch)
        Bucket(bucket.uri).fetch(folder_of(bucket.uri))
        return contents(folder_of(bucket.uri))

    ones = on("one")
    make(folder_of(bucket.uri), ones)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write", lambda *rest: None)
        Bucket(bucket.uri).publish(folder_of(bucket.uri))  # All but its last step.
    twos = on("two")
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri), twos))
    assert there() == twos
    on("one")
    Bucket(bucket.uri).publish(folder_of(bucket.uri))
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
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    damage(bucket, name, content)
    elsewhere()
    with pytest.raises(CorruptArtifact, match=rf"^artifact {bucket.uri}/stages/toy-f00d .*{said}"):
        Bucket(bucket.uri).fetch(folder_of(bucket.uri))
    assert not folder_of(bucket.uri).exists()
    assert list(folder_of(bucket.uri).parent.glob("*")) == []


def test_a_lost_file_and_another_fingerprint_are_named(bucket, elsewhere):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    with pytest.raises(
        CorruptArtifact, match="toy-f00d is corrupt: it has a different fingerprint"
    ):
        Bucket(bucket.uri).is_complete(folder_of(bucket.uri), "beef")
    bucket.delete(next(key for key in bucket.names() if key.endswith("a.txt")))
    elsewhere()
    with pytest.raises(CorruptArtifact, match=r"toy-f00d is corrupt: a\.txt is not what was"):
        Bucket(bucket.uri).fetch(folder_of(bucket.uri))


def test_a_name_that_leaves_the_folder_is_refused(bucket, elsewhere, tmp_path):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    manifest = json.loads(bucket.get("stages/toy-f00d/manifest.json"))
    manifest["files"]["../../escaped"] = manifest["files"].pop("a.txt")
    bucket.put("stages/toy-f00d/manifest.json", json.dumps(manifest).encode())
    elsewhere()
    with pytest.raises(CorruptArtifact, match="escaped"):
        Bucket(bucket.uri).fetch(folder_of(bucket.uri))
    assert not list(tmp_path.rglob("escaped"))


def test_one_downloads_and_the_others_on_its_machine_wait(bucket, elsewhere, monkeypatch):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    elsewhere()
    taken, download = [], object_store.download
    monkeypatch.setattr(object_store, "download", lambda *of: taken.append(of[1]) or download(*of))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Bucket(bucket.uri).fetch(folder_of(bucket.uri)), range(4)))
    assert len(taken) == len(FILES)
    assert contents(folder_of(bucket.uri)) == FILES


def test_a_stage_that_reads_only_some_files_gets_no_others(bucket, elsewhere):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    assert Bucket(bucket.uri).fetch(folder_of(bucket.uri), ["a.txt"]) == folder_of(bucket.uri)
    elsewhere()
    for wanted in (["a.txt", "none"], ["empty"]):
        some = Bucket(bucket.uri).fetch(folder_of(bucket.uri), wanted)
        assert some != folder_of(bucket.uri)
        assert Bucket(bucket.uri).fetch(folder_of(bucket.uri), wanted[::-1]) == some
        artifact.verify(some)
        assert contents(some) == {name: FILES[name] for name in wanted if name in FILES}
    assert not folder_of(bucket.uri).exists()


def test_one_file_is_read_without_the_others(bucket, elsewhere):
    Bucket(bucket.uri).publish(make(folder_of(bucket.uri)))
    elsewhere()
    assert Bucket(bucket.uri).read(folder_of(bucket.uri), "a.txt") == b"one"
    assert Bucket(bucket.uri).read(folder_of(bucket.uri), "none") is None
    assert not folder_of(bucket.uri).exists()
    damage(bucket, "a.txt", b"two")
    with pytest.raises(CorruptArtifact, match=r"a\.txt"):
        Bucket(bucket.uri).read(folder_of(bucket.uri), "a.txt")


def test_results_go_there_and_come_back_without_links_and_scratch(bucket, elsewhere):
    folder = Bucket(bucket.uri).root / "run"
    with Bucket(bucket.uri).results(folder):
        (folder / "trials" / "0").mkdir(parents=True)
        (folder / ".ray-train").mkdir()
        for name in ("metrics.json", "trials/0/trial.json", ".ray-train/x", "a.part", "b.lock"):
            (folder / name).write_text(name)
        (folder / "link").symlink_to("metrics.json")
        (folder / "stage").symlink_to(folder / "trials", target_is_directory=True)
    assert bucket.names() == ["run/metrics.json", "run/trials/0/trial.json"]
    elsewhere()
    folder = Bucket(bucket.uri).root / "run"

    def fail():
        with Bucket(bucket.uri).results(folder):
            assert (folder / "trials" / "0" / "trial.json").read_text() == "trials/0/trial.json"
            (folder / "error.log").write_text("why")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bucket.get("run/error.log") == b"why"


def test_any_file_system_of_pyarrow_will_do(tmp_path, monkeypatch, elsewhere):
    move_to(tmp_path / "one", monkeypatch)
    uri = (tmp_path / "share").as_uri()
    Bucket(uri).check()
    Bucket(uri).check_writable()
    folder = folder_of(uri)
    Bucket(uri).publish(make(folder))
    elsewhere()
    folder = folder_of(uri)
    Bucket(uri).fetch(folder)
    assert contents(folder) == FILES


def test_the_ranks_of_a_machine_drop_a_replaced_checkpoint_together(tmp_path, monkeypatch):
    """All look before the first one deletes it."""
    move_to(tmp_path / "one", monkeypatch)
    bucket = Bucket((tmp_path / "share").as_uri())
    folder = folder_of(bucket.uri)
    file = artifact.checkpoint_of(folder)
    file.parent.mkdir(parents=True)
    file.write_text("older")
    object_store.write(bucket.uri, f"stages/{file.name}", b"newer, of another machine")
    modified, ranks = Bucket._modified, Barrier(2)

    def looked(*of):
        found = modified(*of)
        ranks.wait(timeout=10)
        return found

    monkeypatch.setattr(Bucket, "_modified", looked)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: bucket.checkpoint(folder, FINGERPRINT, 600), range(2)))
    assert not file.exists()


def test_a_run_that_was_deleted_in_the_bucket_does_not_come_back_from_the_cache(
    tmp_path, monkeypatch
):
    move_to(tmp_path / "one", monkeypatch)
    bucket = Bucket((tmp_path / "share").as_uri())
    folder = bucket.root / "run"
    with bucket.results(folder):
        (folder / "logs").mkdir(parents=True)
        for name in ("metrics.json", "report.html", "logs/train.log"):
            (folder / name).write_text("old")
    (folder / ".tasks").mkdir()
    (folder / ".tasks" / "scratch").write_text("of another command")
    shutil.rmtree(tmp_path / "share" / "run")
    with bucket.results(folder):
        (folder / "config.yaml").write_text("seed: 1")
    assert sorted(file.name for file in (tmp_path / "share" / "run").iterdir()) == ["config.yaml"]
    assert (folder / ".tasks" / "scratch").exists()


def test_a_relative_cache_is_refused(tmp_path, monkeypatch):
    """Workers have other working folders."""
    move_to(tmp_path, monkeypatch)
    bucket = Bucket((tmp_path / "share").as_uri())
    bucket.check()
    for relative in ("cache", "./cache"):
        monkeypatch.setenv("AGCL_CACHE", relative)
        with pytest.raises(InputError, match=r"^AGCL_CACHE: must be an absolute path, not"):
            bucket.check()
    monkeypatch.setenv("AGCL_CACHE", "~/cache")
    bucket.check()
