"""The figures of a search, as PNG bytes: front, parallel coordinates, importance of settings."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import optuna
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pipeline.config.search import Choice, Dimension, LogUniform
from pipeline.results.drawing import GREY, INK, new_figure, plain, png
from pipeline.search.space import distributions
from pipeline.search.trial import Trial, pareto_front

_FEWEST = 4
"""Finished trials below which nothing can be said of a setting's importance."""
_NAMED = 4
"""Trials at one point of the front whose numbers are written out."""


def search_figures(
    space: Mapping[str, Dimension], trials: Sequence[Trial], best: Trial | None
) -> dict[str, bytes]:
    """Every figure that the trials allow: file name -> PNG bytes."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.last]
    if not finished or best is None:
        return {}
    drawn = {"parallel-coordinates.png": _parallel(space, finished, best)}
    if finished[0].last and finished[0].last.retained is not None:
        drawn["pareto-front.png"] = _front(finished, best)
    importance = setting_importance(space, finished)
    if importance:
        drawn["setting-importance.png"] = _importance(importance)
    return {name: png(figure) for name, figure in drawn.items()}


def setting_importance(
    space: Mapping[str, Dimension], finished: Sequence[Trial]
) -> dict[str, float]:
    """Share of the average's variation among the better trials that each setting explains.

    PED-ANOVA (Watanabe 2023), by Optuna. Empty for too few trials, or where all are alike.
    """
    if len(finished) < _FEWEST or len({_average(trial) for trial in finished}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    of_space = distributions(space)
    for trial in finished:
        params = {key: _index(space[key], value) for key, value in trial.settings.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=of_space, value=_average(trial))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _front(finished: Sequence[Trial], best: Trial) -> Figure:
    """Learned against retained, the Pareto front joined."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    front = sorted(pareto_front(finished), key=_sides)
    axes.plot(*zip(*map(_sides, front), strict=True), color=GREY, linewidth=0.9, linestyle=":")
    points: dict[tuple[float, float], list[Trial]] = {}
    for trial in finished:
        points.setdefault(_sides(trial), []).append(trial)
    for (x, y), there in points.items():
        edge = INK if there[0] in front else GREY
        fill = "#2f81f7" if best in there else INK if there[0] in front else "none"
        axes.plot(x, y, marker="o", markersize=6, linestyle="", color=edge, markerfacecolor=fill)
        numbers = ", ".join(str(trial.number) for trial in there[:_NAMED])
        numbers += ", …" if len(there) > _NAMED else ""
        axes.annotate(
            numbers, (x, y), xytext=(-5, 5), textcoords="offset points", ha="right", fontsize=7
        )
    axes.set_xlabel("learned: mean score right after training", fontsize=8, color=INK)
    axes.set_ylabel("retained: mean final score of the earlier tasks", fontsize=8, color=INK)
    axes.grid(color="#d8dee4", linewidth=0.6)
    plain(axes)
    return figure


def _parallel(space: Mapping[str, Dimension], finished: Sequence[Trial], best: Trial) -> Figure:
    """One line a trial through its settings to its average, darker the better."""
    keys = list(space)
    figure = new_figure(max(5.0, 1.7 * (len(keys) + 1)), 4.0)
    axes = figure.subplots()
    averages = [_average(trial) for trial in finished]
    low, high = min(averages), max(averages)
    shade = Normalize(low - 0.3 * (high - low or 1), high)
    for trial in sorted(finished, key=_average):
        places = [_place(space[key], trial.settings[key]) for key in keys]
        places.append((_average(trial) - low) / (high - low) if high > low else 0.5)
        colour = (
            "#2f81f7" if trial is best else matplotlib.colormaps["Greys"](shade(_average(trial)))
        )
        axes.plot(range(len(places)), places, color=colour, linewidth=2.2 if trial is best else 1.1)
    for x, key in enumerate([*keys, "average"]):
        axes.axvline(x, color=GREY, linewidth=0.8)
        ends = _ends(space[key]) if key in space else (f"{low:.3f}", f"{high:.3f}")
        for y, text in zip((-0.03, 1.03), ends, strict=True):
            axes.text(
                x, y, text, fontsize=7, color=INK, ha="center", va="top" if y < 0 else "bottom"
            )
    axes.set_xticks(range(len(keys) + 1), [_label(key) for key in [*keys, "average"]])
    axes.set(ylim=(-0.12, 1.12), yticks=[])
    axes.set_title(f"blue: trial {best.number}, the best", fontsize=8.5, color=INK, loc="left")
    plain(axes)
    return figure


def _importance(importance: Mapping[str, float]) -> Figure:
    figure = new_figure(6.4, 0.9 + 0.4 * len(importance))
    axes = figure.subplots()
    shares = dict(sorted(importance.items(), key=lambda item: item[1]))
    axes.barh(list(shares), list(shares.values()), color=GREY)
    axes.set_xlim(0, 1)
    axes.set_xlabel(
        "share of the average's variation among the better trials (PED-ANOVA)",
        fontsize=8,
        color=INK,
    )
    plain(axes)
    return figure


def _sides(trial: Trial) -> tuple[float, float]:
    assert trial.last is not None
    return trial.last.learned, trial.last.retained or 0.0


def _average(trial: Trial) -> float:
    assert trial.last is not None
    return trial.last.average


def _index(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(value) if isinstance(dimension, Choice) else value


def _place(dimension: Dimension, value: Any) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if isinstance(dimension, Choice):
        return dimension.values.index(value) / max(1, len(dimension.values) - 1)
    if isinstance(dimension, LogUniform):
        return math.log(value / dimension.low) / math.log(dimension.high / dimension.low)
    return float((value - dimension.low) / (dimension.high - dimension.low))


def _ends(dimension: Dimension) -> tuple[str, str]:
    if isinstance(dimension, Choice):
        return str(dimension.values[0]), str(dimension.values[-1])
    return f"{dimension.low:.4g}", f"{dimension.high:.4g}"


def _label(key: str) -> str:
    return key.replace(".", "\n", 1) if len(key) > 14 else key
