"""The command `agcl`: parses arguments, calls the pipeline, maps outcomes to exit codes."""

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from agcl import __version__

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

_CONFIGS = Path(__file__).parent / "configs"
_BUNDLED = ", ".join(sorted(file.stem for file in _CONFIGS.glob("*.yaml")))
_OF_PIPELINE = (
    *("ray", "mlflow", "pydantic", "yaml", "rich", "datasets", "optuna", "scipy", "matplotlib"),
    *("jinja2", "psutil", "tensorboardX"),
)
"""Modules of the extra `pipeline`: `pip install agcl` alone installs the command without them."""

_DESCRIPTION = """\
Attribution-guided continual learning of large language models on Ray.

Takes one model through a sequence of tasks, measures which inputs of its layers carried what it
knew and the right answers of each task, keeps later updates off them, and reports what is
forgotten.
"""
_EPILOG = """\
Settings are key.path=value and beat the file: training.epochs=4 protect.0.kind=gate
protect.0.strength=0.5. Exit codes: 0 done, 1 a stage failed, 2 bad config or input, 130
interrupted. Any run can be interrupted and run again: finished stages are not computed twice.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # Names and rows may not fit the terminal's code.
    parsed = _parsed(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(parsed, shlex.join(["agcl", *arguments]))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(parsed: argparse.Namespace, command: str) -> int:
    """Run a parsed command; say in one line why it failed."""
    missing = next((name for name in _OF_PIPELINE if find_spec(name) is None), None)
    if missing:
        print(f"agcl: no module {missing}; pip install 'agcl[pipeline]'", file=sys.stderr)
        return BAD_INPUT
    from agcl.errors import InputError
    from pipeline.errors import Failed
    from pipeline.secrets import masked
    from pipeline.storage.object_store import StoreFailed

    try:
        if "config" in parsed:
            _check(parsed)
        if (
            "run_dir" in parsed
            and "://" not in parsed.run_dir
            and not Path(parsed.run_dir).is_dir()
        ):
            raise InputError(f"no folder {parsed.run_dir}")
        job = import_module(f"jobs.{parsed.job}")  # Takes seconds, which --help need not wait.
        return int(job.main(parsed, masked(command)) or OK)
    except InputError as error:
        return _say(BAD_INPUT, str(error))
    except KeyboardInterrupt:
        return _say(
            INTERRUPTED, "interrupted; finished stages are kept, and the same command resumes"
        )
    except (StoreFailed, Failed) as error:
        return _say(FAILED, str(error))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _say(BAD_INPUT, f"{os.strerror(error.errno)}: {error.filename[:200]}")
        if error.errno not in _FULL_OR_FORBIDDEN:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _say(FAILED, f"{os.strerror(error.errno)}{where}")


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    # argparse leaves settings that stand behind an option.
    parsed, behind = parser.parse_known_args(arguments or ["--help"])
    if unknown := [a for a in behind if a.startswith("-") or "settings" not in parsed]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if behind:
        parsed.settings += behind
    return parsed


def _check(parsed: argparse.Namespace) -> None:
    """Find typing errors in the config before the imports of a command, which take seconds."""
    from agcl.errors import InputError
    from pipeline.config.presets import METHODS, no_method

    bundled = _CONFIGS / f"{parsed.config}.yaml"
    if not parsed.config.is_file() and bundled.is_file():
        parsed.config = bundled
    methods: list[str | None] = [None]
    if "methods" in parsed:
        named = list(METHODS) if parsed.methods == "all" else parsed.methods.split(",")
        parsed.methods = methods = [*named]
        if any(setting.startswith("method=") for setting in parsed.settings):
            raise InputError("method: the methods to compare are those of --methods")
        for index, method in enumerate(named):
            if method not in METHODS:
                raise InputError(f"--methods: {no_method(method)}")
            if method in named[:index]:
                raise InputError(f"--methods: {method} is named twice")
    _check_config(parsed, methods)
    if sys.stderr.isatty():  # The imports, and then a look at all rows, take seconds.
        print("checking config, model and data ...", file=sys.stderr, flush=True)


def _check_config(parsed: argparse.Namespace, methods: Sequence[str | None]) -> None:
    """Check the config with every method; say which one an error is about, if not about all."""
    from agcl.errors import InputError
    from pipeline.config import loading, sources

    wrong: dict[str | None, str] = {}
    for method in methods:
        try:
            sources.check_places(loading.load(parsed.config, parsed.settings, method=method))
        except InputError as error:
            wrong[method] = str(error)
    for method, said in wrong.items():
        if len(wrong) == len(methods) and len(set(wrong.values())) == 1:
            raise InputError(said)
        raise InputError(f"--methods: with {method}, {said}")


def _say(code: int, message: str) -> int:
    from pipeline.secrets import masked

    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
    print(f"agcl: {masked(line)}", file=sys.stderr)
    return code


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agcl",
        allow_abbrev=False,  # `--seed 42` would be 42 seeds.
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agcl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sub = _add(commands, "init", "write a commented config for your model and data")
    sub.add_argument("model", help="folder, or id on the Hugging Face hub")
    sub.add_argument(
        "data",
        nargs="+",
        help="one task each, in training order: a file (.jsonl, .json, .parquet, .csv, .tsv; also "
        ".gz), or a folder with train and perhaps test and validation files",
    )
    sub.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    sub.add_argument(
        "--output", type=Path, default=Path("config.yaml"), help="(default: %(default)s)"
    )
    _add(commands, "run", "one method over one sequence", config=True)
    sub = _add(commands, "compare", "several methods side by side", config=True)
    sub.add_argument(
        "--methods",
        default="sequential,agcl",
        help="separated by commas, or all (default: %(default)s); see `agcl methods`",
    )
    sub.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        help="seeds per method, counting up from the config's (default: %(default)s)",
    )
    sub.add_argument(
        "--trials",
        type=_positive,
        default=1,
        help="tuning trials per method, on validation rows and with a seed that no reported run "
        "has: its defaults, then other learning rates and values of its knob; a new winner's run "
        "replaces the old winner's (default: 1, only the defaults, so no tuning)",
    )
    sub = _add(commands, "search", "tune one method's settings and learning rate", config=True)
    sub.add_argument(
        "--trials",
        type=_positive,
        default=12,
        help="number of trials; the first has the config's own values (default: %(default)s); the "
        "config's section search sets what varies, by default the scaling of the protections and "
        "the learning rate",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="resume an interrupted search (the same command without this does too, but starts a "
        "new search if there is none)",
    )
    _add(
        commands,
        "tasks",
        "show what every task is made of: rows, tokens, rows left out, rendered examples",
        config=True,
    )
    sub = _add(
        commands,
        "plan",
        "print the stages, what is done, and memory, disk and time for the rest; run nothing (a "
        "model folder needs no weights, and this machine no GPU: config.json and tokenizer are "
        "enough to predict memory)",
        config=True,
    )
    sub.add_argument(
        "--formula-only",
        action="store_true",
        help="only predict by formula; do not measure the first stages on a few rows",
    )
    sub.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="say which stages fit a GPU of this size, such as 80GB, and what to change if "
        "one does not (default: this machine's GPU)",
    )
    sub = _add(commands, "methods", "list the methods, or show one")
    sub.add_argument("method", nargs="?", help="a method's name, to see what it sets")
    sub = _add(commands, "report", "rewrite report.html of a finished run, comparison or search")
    sub.add_argument("run_dir", help="folder, such as storage/facts, or its URI")
    sub = _add(commands, "submit", "run a command on a cluster, as a Ray job (jobs/CLUSTER.md)")
    sub.add_argument(
        "--address", default="http://127.0.0.1:8265", help="of the dashboard (default: %(default)s)"
    )
    sub.add_argument(
        "command", nargs=argparse.REMAINDER, help="such as: run facts resources.num_workers=2"
    )
    sub = _add(commands, "ui", "start the MLflow UI on loopback")
    sub.add_argument(
        "--storage",
        default=os.environ.get("AGCL_STORAGE", "storage"),
        help="folder of the runs (default: the environment's AGCL_STORAGE, otherwise storage)",
    )
    sub.add_argument("--port", type=int, default=5000, help="(default: 5000)")
    sub.add_argument("--verbose", action="store_true", help="show all that MLflow's server logs")
    return parser


def _add(commands: Any, name: str, text: str, *, config: bool = False) -> argparse.ArgumentParser:
    """Add the command whose `main` is in the module of its name."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG if config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(job=name)
    if config:
        parser.add_argument("config", type=Path, help=f"YAML file, or one of {_BUNDLED}")
        parser.add_argument("settings", nargs="*", metavar="key.path=value")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
