"""The command `agcl`: parses arguments, calls the pipeline, maps outcomes to exit codes."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

_DESCRIPTION = """\
Attribution-guided continual learning of large language models on Ray.

Takes one model through a sequence of tasks, measures which weights carried the right answers of
each, protects them while later tasks are learned, and reports what is forgotten.
"""
_EPILOG = """\
Settings are key.path=value and beat the file: training.epochs=4 protect.0.kind=gate
protect.0.strength=0.5. Exit codes: 0 done, 1 a stage failed, 2 bad config or input, 130
interrupted. Any run can be interrupted and run again: finished stages are not computed twice.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    # argparse leaves settings that stand behind an option.
    parsed, behind = parser.parse_known_args(arguments)
    if unknown := [a for a in behind if a.startswith("-") or "settings" not in parsed]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if behind:
        parsed.settings += behind
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    from agcl.errors import InputError
    from pipeline.errors import Failed
    from pipeline.secrets import masked
    from pipeline.storage.object_store import StoreFailed

    try:
        job = import_module(f"jobs.{parsed.job}")  # Takes seconds, which --help need not wait.
        return int(job.main(parsed, masked("agcl " + " ".join(arguments))) or OK)
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
        return _say(FAILED, f"{os.strerror(error.errno)}: {error.filename}")
    finally:
        signal.signal(signal.SIGTERM, previous)


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
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add(commands, "run", "one method over one sequence", config=True)
    sub = _add(commands, "compare", "several methods side by side", config=True)
    sub.add_argument(
        "--methods",
        default="sequential,agcl",
        help="separated by commas, or all (default: %(default)s); see `agcl methods`",
    )
    sub.add_argument(
        "--seeds", type=_positive, default=1, help="seeds per method, counting up from the config's"
    )
    sub.add_argument(
        "--trials",
        type=_positive,
        default=1,
        help="tuning trials per method, on validation rows and with a seed that no reported run "
        "has: its defaults, then other learning rates and values of its knob (default: no tuning)",
    )
    sub = _add(commands, "search", "tune one method's settings and learning rate", config=True)
    sub.add_argument(
        "--trials",
        type=_positive,
        default=12,
        help="points to try, first the config itself (default: %(default)s); the config's section "
        "search sets what varies, by default the scaling of the protections and the learning rate",
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
        "print the stages, what is done, and memory, disk and time for the rest; run nothing",
        config=True,
    )
    sub.add_argument(
        "--no-probe",
        dest="probe",
        action="store_false",
        help="leave out memory, disk and time, found by trying the first stages on a few rows",
    )
    sub = _add(commands, "methods", "list the methods, or show one")
    sub.add_argument("method", nargs="?", help="a method's name, to see what it sets")
    sub = _add(commands, "report", "rewrite report.html of a finished run, comparison or search")
    sub.add_argument("run_dir", help="folder, such as storage/facts, or its URI")
    sub = _add(commands, "ui", "start the MLflow UI on loopback")
    sub.add_argument("--storage", type=Path, default=Path("storage"), help="(default: storage)")
    sub.add_argument("--port", type=int, default=5000, help="(default: 5000)")
    return parser


def _add(commands: Any, name: str, text: str, *, config: bool = False) -> argparse.ArgumentParser:
    """Add the command whose `main` is in the module of its name."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG if config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(job=name)
    if config:
        parser.add_argument("config", type=Path, help="YAML file, such as jobs/configs/facts.yaml")
        parser.add_argument("settings", nargs="*", metavar="key.path=value")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
