"""The command line in an empty folder."""

import pytest
import yaml

from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.tasks import facts
from jobs import cli


@pytest.fixture
def agcl(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; gives its exit code and its lines on stderr."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err.splitlines()

    run.place = place
    return run


@pytest.fixture
def refused(agcl):
    """Runs `agcl run` on a config that must be refused before any work; gives the one line."""

    def run(config, *settings):
        file = agcl.place.parent / "config.yaml"
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        file.write_text(text, encoding="utf-8")
        code, lines = agcl("run", file, *settings)
        assert code == cli.BAD_INPUT
        assert len(lines) == 1, lines
        assert lines[0].startswith("agcl: ")
        assert not list(agcl.place.iterdir()), "bad input must leave nothing behind"
        return lines[0]

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model of the built-in kind, as a user's folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    rows = facts.base(entities=8, seed=0).splits["train"]()
    tokenizer = builtin_tokenizer(f"{row.prompt}{row.answer}" for row in rows)
    models.save(builtin_model(len(tokenizer), seed=0), tokenizer, folder)
    return folder
