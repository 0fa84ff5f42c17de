"""What `agcl ui` prints of MLflow's server. A real one runs in `test_security.py`."""

import socket
import sys

import pytest

from agcl.errors import InputError
from pipeline.tracking import ui

STARTS = "starting MLflow; Ctrl-C stops it"
SAID = """\
[MLflow] Security middleware enabled with default settings
2026/01/01 10:00:00 INFO:     Started server process [5859]
2026/01/01 10:00:01 INFO:     127.0.0.1:5000 - "GET / HTTP/1.1" 200
2026/01/01 10:00:02 ERROR:    Exception in ASGI application
Traceback (most recent call last):
sqlite3.OperationalError: database is locked
"""
PORT = 39271


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Runs `serve` with a server that says `SAID` and ends; its exit code and what is logged."""
    (tmp_path / ui.DATABASE).touch()
    server = tmp_path / "server"
    server.write_text(f"#!{sys.executable}\nprint({SAID!r}, end='')\nraise SystemExit(3)\n")
    server.chmod(0o755)
    monkeypatch.setattr(ui, "_view", lambda storage: [])
    monkeypatch.setattr(ui.sys, "executable", str(server))

    def run(**options):
        logged = []
        return ui.serve(tmp_path, PORT, lambda page: None, logged.append, **options), logged

    return run


def test_only_errors_are_shown(served):
    assert served() == (3, [STARTS, *SAID.splitlines()[3:]])


def test_verbose_shows_all(served):
    assert served(verbose=True) == (3, [STARTS, *SAID.splitlines()])


def test_a_port_that_is_in_use_is_named(served):
    with socket.socket() as other:
        other.bind(("127.0.0.1", PORT))
        other.listen()
        with pytest.raises(InputError, match=f"--port: {PORT}: Address already in use"):
            served()
    assert served()[0] == 3
