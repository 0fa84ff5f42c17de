"""Disk that a config needs, by a formula, from its model's shape alone."""

from pipeline.config.method import Project
from pipeline.estimate.setting import FLOAT, HALF, Part, Parts, Setting, entries
from pipeline.estimate.training import state_size, trained_weights


def disk_per_task(setting: Setting) -> Parts:
    """What a task leaves in the storage, and a checkpoint while it is trained."""
    config = setting.config
    saves_model = not config.adapter or config.adapter.merge
    trained = max(trained_weights(setting, protects=p) for p in (False, bool(config.protect)))
    moments = any(isinstance(item, Project) for item in config.measured)
    files = 1 + config.sums_moments  # Its own, and the sum of all so far.
    importance = files * HALF * setting.kept * moments
    importance += HALF * entries(setting.protected) * config.measures_entries
    size = FLOAT if config.trains_factors else setting.weight_bytes
    alone = config.measures_solos
    return (
        Part("model", setting.weight_bytes * setting.shape.weights * saves_model),
        Part("model trained alone", setting.weight_bytes * setting.shape.weights * alone),
        Part(
            "merged model",
            setting.weight_bytes * setting.shape.weights * (config.merge is not None),
        ),
        Part("adapter", (1 + config.starts_from_corda) * FLOAT * entries(setting.factors)),
        Part("importance", importance * bool(config.measured)),
        Part(
            "checkpoint",
            (size * trained + state_size(config, trained))
            * bool(config.resources.checkpoint_minutes),
        ),
    )
