"""`agcl compare`: several methods and seeds over the same sequence, shared stages computed once."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Choose every method's settings by its trials, if any; run it with every seed; print all."""
    from agcl.errors import InputError
    from jobs.execution import execute_runs
    from jobs.tuning import tune
    from pipeline.config import loading
    from pipeline.config.config import Config
    from pipeline.config.presets import METHODS
    from pipeline.run import open_run
    from pipeline.search import tuning

    methods = list(METHODS) if arguments.methods == "all" else arguments.methods.split(",")
    methods = list(dict.fromkeys(methods))
    for method in methods:
        if method not in METHODS:
            raise InputError(f"--methods: no method {method!r} (there are {', '.join(METHODS)})")
    settings = list(arguments.settings)
    first = loading.load(arguments.config, settings, method=methods[0])
    if arguments.trials > 1 and not first.evaluation.validation:
        settings.append(f"evaluation.validation={tuning.VALIDATION}")
    folder = first.storage.root / f"{first.name}-compare"

    def load(more: list[str], method: str) -> Config:
        return loading.load(arguments.config, [*settings, *more], method=method)

    chosen: dict[str, list[str]] = {method: [] for method in methods}
    if arguments.trials > 1:
        chosen = tune(load, methods, arguments.trials, folder, command)
    runs = {}
    for method in methods:
        config = load(chosen[method], method)
        for seed in range(config.seed, config.seed + arguments.seeds):
            label = method if arguments.seeds == 1 else f"{method}-seed{seed}"
            runs[label] = open_run(config.model_copy(update={"seed": seed}), folder / label)
    return execute_runs(runs, folder, folder.name, command)
