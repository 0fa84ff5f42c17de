import json
import os
import signal
import subprocess
import sys
import time

import pytest
import ray
import torch

from pipeline.storage import artifact
from pipeline.storage.artifact import CorruptArtifact, is_complete, read_manifest, verify, writing

RECORD = {"stage": "toy", "fingerprint": "f00d", "config": {"epochs": 2}}


def make(folder, files=None):
    with writing(folder, RECORD) as out:
        for name, data in (files or {"a.txt": b"one", "deep/b.bin": b"two!"}).items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "stages" / "toy-f00d")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_whole_artifact_appears_under_its_name_only_at_the_end(tmp_path):
    folder = tmp_path / "stages" / "toy"
    with writing(folder, RECORD) as out:
        assert out == folder.with_name("toy.part")
        assert list(out.iterdir()) == []
        (out / "a.txt").write_text("one")
        assert not folder.exists()
    assert names(folder.parent) == ["toy"]
    assert (folder / "a.txt").read_text() == "one"
    assert is_complete(folder, "f00d")
    verify(folder)


def test_the_manifest_records_what_was_made_from_what(folder):
    manifest = read_manifest(folder)
    assert {key: manifest[key] for key in RECORD} == RECORD
    assert manifest["files"] == {
        "a.txt": {"bytes": 3, "sha256": artifact.file_hash(folder / "a.txt")},
        "deep/b.bin": {"bytes": 4, "sha256": artifact.file_hash(folder / "deep" / "b.bin")},
    }
    assert time.time() - 60 < manifest["started"] <= time.time()
    assert 0 <= manifest["seconds"] < 60
    assert manifest["git"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["ray"] == ray.__version__


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    folder = tmp_path / "stages" / "toy"

    def fail():
        with writing(folder, RECORD) as out:
            (out / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(folder.parent) == []
    assert not is_complete(folder, "f00d")


def test_a_part_left_by_a_kill_is_never_taken_for_the_artifact_nor_for_its_start(tmp_path):
    folder = tmp_path / "stages" / "toy"
    left = folder.with_name("toy.part")
    left.mkdir(parents=True)
    (left / "a.txt").write_text("half")
    (left / "stale.txt").write_text("stale")
    (left / "manifest.json").write_text(json.dumps({"fingerprint": "f00d", "files": {}}))
    assert not is_complete(folder, "f00d")
    assert read_manifest(folder) is None
    make(folder)
    assert names(folder) == ["a.txt", "deep", "manifest.json"]
    assert names(folder.parent) == ["toy"]
    assert (folder / "a.txt").read_text() == "one"


def test_a_process_killed_while_it_writes_leaves_only_a_part(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.storage.artifact import writing\n"
        "with writing(Path(sys.argv[1]), {'fingerprint': 'f00d'}) as out:\n"
        "    (out / 'a.txt').write_text('half'); print('now', flush=True); time.sleep(60)\n"
    )
    folder = tmp_path / "toy"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert names(tmp_path) == ["toy.part"]
    assert not is_complete(folder, "f00d")
    make(folder)
    assert names(tmp_path) == ["toy"]
    assert is_complete(folder, "f00d")


def test_no_folder_is_no_artifact(tmp_path):
    assert read_manifest(tmp_path / "none") is None
    assert not is_complete(tmp_path / "none", "f00d")
    with pytest.raises(CorruptArtifact, match=r"none is corrupt.*manifest\.json"):
        verify(tmp_path / "none")


def lose_file(folder):
    (folder / "a.txt").unlink()


def truncate(folder):
    (folder / "a.txt").write_bytes(b"on")


def garble_manifest(folder):
    (folder / "manifest.json").write_text('{"fingerprint": "f00d", ')


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def list_manifest(folder):
    (folder / "manifest.json").write_text("[1]")


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def other_fingerprint(folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "beef"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_file, r"a\.txt is missing"),
        (truncate, r"a\.txt has a different size"),
        (garble_manifest, r"manifest\.json is not JSON"),
        (empty_manifest, r"manifest\.json lacks"),
        (list_manifest, r"manifest\.json lacks"),
        (lose_manifest, r"manifest\.json"),
        (other_fingerprint, "fingerprint"),
    ],
)
def test_damage_that_shows_without_reading_is_named_with_its_folder(folder, damage, said):
    damage(folder)
    with pytest.raises(CorruptArtifact, match=rf"(?s)^(?!.*\n).*toy-f00d.*{said}"):
        is_complete(folder, "f00d")


def flip(folder):
    file = folder / "deep" / "b.bin"
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "said"), [(flip, r"deep/b\.bin"), (lose_file, r"a\.txt")])
def test_damage_inside_a_file_is_found_by_verify_and_named(folder, damage, said):
    verify(folder)
    damage(folder)
    with pytest.raises(CorruptArtifact, match=rf"toy-f00d.*{said}"):
        verify(folder)


def test_of_files_that_nobody_reads_the_contents_are_not_looked_at(folder):
    flip(folder)
    verify(folder, ["a.txt", "not-there.json"])
    with pytest.raises(CorruptArtifact, match=r"deep/b\.bin"):
        verify(folder, ["deep/b.bin"])


def test_a_fingerprint_depends_on_every_value_and_not_on_the_order_of_keys():
    one = artifact.fingerprint({"a": 1, "b": [1, 2], "c": {"d": "é"}})
    assert one == artifact.fingerprint({"c": {"d": "é"}, "b": [1, 2], "a": 1})
    others = [
        {"a": 2, "b": [1, 2], "c": {"d": "é"}},
        {"a": 1, "b": [2, 1], "c": {"d": "é"}},
        {"a": 1, "b": [1, 2], "c": {"d": "e"}},
        {"a": 1, "b": [1, 2]},
        {"a": "1", "b": [1, 2], "c": {"d": "é"}},
    ]
    assert len({one, *map(artifact.fingerprint, others)}) == 6


def test_a_content_hash_sees_new_content_with_the_old_size_and_time(tmp_path):
    found = set()
    for text in ("one", "two"):
        (tmp_path / "a").write_text(text)
        os.utime(tmp_path / "a", (1_700_000_000, 1_700_000_000))
        found.add(artifact.content_hash(tmp_path / "a"))
        time.sleep(0.02)  # Change times are as coarse as the kernel's clock.
    assert len(found) == 2


def test_a_content_hash_sees_names_and_bytes_of_matching_files_and_not_the_place(tmp_path):
    def folder(name, files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    patterns = ("*.json", "w*")
    first = folder("one", {"a.json": "1", "w.bin": "2", "readme": "x"})
    hashed = artifact.content_hash(first, patterns)
    same = folder("two", {"a.json": "1", "w.bin": "2", "readme": "other"})
    assert artifact.content_hash(same, patterns) == hashed
    for number, files in enumerate(
        [{"a.json": "1", "w.bin": "3"}, {"b.json": "1", "w.bin": "2"}, {"a.json": "1"}]
    ):
        assert artifact.content_hash(folder(f"x{number}", files), patterns) != hashed


def test_a_content_hash_sees_folders_behind_links_and_no_hidden_files(tmp_path):
    """An editor's swap file is not data; a folder on another disk is."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (folder / "link").symlink_to(other, target_is_directory=True)
    hashed = artifact.content_hash(folder, ("**/*",))
    (folder / ".a.txt.swp").write_text("a")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("main")
    assert artifact.content_hash(folder, ("**/*",)) == hashed
    (other / "b.txt").write_text("another")
    assert artifact.content_hash(folder, ("**/*",)) != hashed


def test_a_file_written_aside_replaces_the_old_one_whole(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old" * 100)
    artifact.write_json(file, {"é": 1.5})
    assert json.loads(file.read_text(encoding="utf-8")) == {"é": 1.5}
    assert names(tmp_path) == ["x.json"]


def test_an_installed_package_has_no_commit_of_the_repository_around_it(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    package = tmp_path / "venv" / "site-packages" / "agcl"
    package.mkdir(parents=True)
    monkeypatch.setattr(artifact.agcl, "__file__", str(package / "__init__.py"))
    artifact.provenance.cache_clear()
    try:
        assert artifact.provenance()["git"] == "not a git checkout"
    finally:
        artifact.provenance.cache_clear()
