"""`agcl compare`: several methods and seeds over the same sequence, shared stages computed once."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Run every method with every seed and print them side by side."""
    from agcl.errors import InputError
    from jobs.execution import execute_runs
    from pipeline import loading
    from pipeline.config import PRESETS
    from pipeline.run import open_run

    methods = list(dict.fromkeys(arguments.methods.split(",")))
    runs = {}
    for method in methods:
        if method not in PRESETS:
            raise InputError(f"--methods: no method {method!r} (there are {', '.join(PRESETS)})")
        first = loading.load(arguments.config, arguments.settings, method=method)
        for seed in range(first.seed, first.seed + arguments.seeds):
            label = method if arguments.seeds == 1 else f"{method}-seed{seed}"
            config = first.model_copy(update={"seed": seed})
            runs[label] = open_run(config, config.storage / f"{config.name}-compare" / label)
    folder = next(iter(runs.values())).folder.parent
    return execute_runs(runs, folder, folder.name, command)
