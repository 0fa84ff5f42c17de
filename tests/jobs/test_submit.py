"""What is sent to a cluster, without one."""

import subprocess

import pytest

from agcl.errors import InputError
from jobs import cli, submit


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Submits from an empty folder; gives the command that Ray gets and its environment."""
    found = {}

    def run(command, env, check):
        found.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(submit.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    return found


def test_the_command_is_a_job_of_the_working_directory(asked):
    assert cli.main(["submit", "--address", "http://head:8265", "run", "facts", "seed=2"]) == 0
    ray, *rest = asked["command"]
    assert ray.endswith("/ray")
    assert rest[:6] == ["job", "submit", "--address", "http://head:8265", "--working-dir", "."]
    assert rest[-6:] == ["python", "-m", "jobs", "run", "facts", "seed=2"]


def test_a_token_is_used_where_there_is_one(asked, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    cli.main(["submit", "run", "facts"])
    assert "RAY_AUTH_MODE" not in asked["env"]
    (tmp_path / "token").write_text("secret")
    cli.main(["submit", "run", "facts"])
    assert asked["env"]["RAY_AUTH_MODE"] == "token"


def test_a_folder_that_is_too_large_is_named(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "_MOST_BYTES", 1000)
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    (outside / "weights").write_bytes(b"0" * 5000)
    (tmp_path / "models").symlink_to(outside)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_bytes(b"0" * 5000)
    submit.check_size(tmp_path)
    (tmp_path / "extra").symlink_to(outside)
    with pytest.raises(InputError, match=r"^submit: .*of which extra has"):
        submit.check_size(tmp_path)


def test_no_command_is_bad_input(asked):
    assert cli.main(["submit"]) == cli.BAD_INPUT


def test_what_git_ignores_is_not_sent_and_not_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "_MOST_BYTES", 1000)
    for name in ("wandb", "env"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "log").write_bytes(b"0" * 5000)
    (tmp_path / "env" / ".gitignore").write_text("*\n")  # As virtualenv writes it.
    with pytest.raises(InputError, match="has 0 MB to send, of which wandb has"):
        submit.check_size(tmp_path)
    (tmp_path / ".gitignore").write_text("wandb/\n")
    submit.check_size(tmp_path)
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    with pytest.raises(InputError, match="of which"):
        submit.check_size(tmp_path)


def test_an_interrupt_says_that_the_job_goes_on(monkeypatch, tmp_path, capsys):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "run", "facts"]) == cli.INTERRUPTED
    said = capsys.readouterr().err
    assert "ray job stop" in said
    assert "finished stages are kept" not in said
