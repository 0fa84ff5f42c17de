"""The figures of a search as PNG bytes, drawn by Optuna."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.visualization import matplotlib as draw

from pipeline.config.search import Dimension
from pipeline.search.space import distributions
from pipeline.search.trial import Trial

_FEWEST = 4
"""Finished trials below which the importance of a setting says nothing."""
_FRONTS = {
    "pareto-front.png": ["learned", "retained"],
    "pareto-front-base.png": ["average", "base_kept"],
}
"""The two sides of each Pareto front, drawn where both were measured."""


def search_figures(space: Mapping[str, Dimension], trials: Sequence[Trial]) -> dict[str, bytes]:
    """Every figure that the finished trials allow: file name -> PNG bytes."""
    finished = [(trial, trial.last) for trial in trials if trial.state == "finished" and trial.last]
    if not finished:
        return {}
    study = _study(space, finished, "average")
    plots: dict[str, Any] = {
        "optimization-history.png": partial(draw.plot_optimization_history, study),
        "slices.png": partial(draw.plot_slice, study),
    }
    if len(finished) >= _FEWEST and len({last.average for _, last in finished}) > 1:
        # PED-ANOVA (Watanabe 2023): what tells the better trials from the rest.
        plots["setting-importance.png"] = partial(
            draw.plot_param_importances,
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
        )
    figures = {name: partial(plot, target_name="average") for name, plot in plots.items()}
    for name, sides in _FRONTS.items():
        if all(getattr(finished[0][1], side) is not None for side in sides):
            of_sides = _study(space, finished, *sides)
            figures[name] = partial(draw.plot_pareto_front, of_sides, target_names=sides)
    matplotlib.use("Agg")  # Optuna draws with pyplot, which would look for a display.
    with pyplot.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's plots are experimental; axes may be one point.
        return {name: _png(plot()) for name, plot in figures.items()}


def _study(
    space: Mapping[str, Dimension], finished: Sequence[tuple[Trial, Any]], *scores: str
) -> optuna.Study:
    """The finished trials as a study of these scores."""
    study = optuna.create_study(directions=["maximize"] * len(scores))
    for trial, last in finished:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.settings),
                distributions=distributions(space),
                values=[getattr(last, score) for score in scores],
            )
        )
    return study


def _png(axes: Any) -> bytes:
    """The figure of one plot, or of an array of plots, as PNG bytes."""
    figure = getattr(axes, "flat", [axes])[0].figure
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
