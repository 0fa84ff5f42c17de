"""What attribution and scoring cost, as ratios of two things done in turn in one process."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from reference.tiny import exact_match
from torch import Tensor

from agcl.attribution import attribute
from agcl.attribution.inputs import InputMoment
from agcl.importance import Moment
from agcl.loss import summed_loss
from agcl.lrp import attributed_linears, weight_of
from agcl.model.forward import answer_logits, autocast
from agcl.tasks.batches import collate, in_order
from bench.measure import Figure, Run, Setting, figure, pairs
from pipeline.config.method import Importance as Settings


def attribution_against_training(setting: Setting) -> Figure:
    """Attributing batches, K = 4, against a plain forward and backward of each."""
    plain = plain_passes(setting)
    return pairs("attribute", attributed(setting), plain, setting, 1.3, "forward + backward")


def moments_against_training(setting: Setting) -> Figure:
    """What a projection alone needs of attribution, against a plain forward and backward.

    Without the decomposition at the end, which does not depend on the number of batches.
    """
    moments = attributed(setting, entries=False, moments="relevance")
    with not_decomposed():
        return pairs("moments", moments, plain_passes(setting), setting, 1.1, "forward + backward")


def uniform_against_forward(setting: Setting) -> Figure:
    """The same with equal weights, which need no backward pass, against a plain forward."""
    moments = attributed(setting, entries=False, moments="uniform")

    def forward() -> None:
        for _ in range(setting.batches):
            with torch.no_grad(), autocast(setting.device, setting.precision):
                answer_logits(setting.model, setting.batch)

    with not_decomposed():
        return pairs("uniform", moments, forward, setting, 1.25, "forward")


def decomposition(setting: Setting) -> Figure:
    """Decomposing all moments once, against a plain forward and backward of the batches."""
    made: list[tuple[InputMoment, Tensor]] = []
    with not_decomposed(lambda moment: made.append((moment, moment.sum))):
        attributed(setting, entries=False, moments="uniform")()

    def decompose() -> None:
        for moment, matrix in made:
            moment.sum = matrix
            moment.moment(keep=0.95)

    plain = plain_passes(setting)
    return pairs("decompose", decompose, plain, setting, math.inf, "forward + backward")


@contextmanager
def not_decomposed(
    instead: Callable[[InputMoment], object] = lambda moment: None,
) -> Iterator[None]:
    """Attribute without decomposing moments."""
    decompose = InputMoment.moment

    def nothing(moment: InputMoment, *, keep: float) -> Moment:
        instead(moment)
        return Moment(torch.zeros(len(moment.sum), 0), torch.zeros(0), 0.0)

    InputMoment.moment = nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        InputMoment.moment = decompose  # type: ignore[method-assign]


def attribution_against_a_loop(setting: Setting) -> Figure:
    """Attributing batches, K = 4, against single samples with weight gradients."""
    model = setting.model
    weights = {n: weight_of(m).detach() for n, m in attributed_linears(model).items()}
    stacks = {n: torch.full((4, *w.shape), -torch.inf) for n, w in weights.items()}
    top = {name: stack.to(model.device) for name, stack in stacks.items()}
    parameters = dict(model.named_parameters())

    def loop() -> None:
        for row in setting.rows * setting.batches:
            with autocast(setting.device, setting.precision):
                loss = summed_loss(model, collate([row]).to(model.device))
            loss.backward()
            for name, stack in top.items():
                gradient = parameters[name].grad
                assert gradient is not None
                value = (gradient if gradient.shape == stack.shape[1:] else gradient.T).clone()
                value *= weights[name]
                for slot in stack:
                    low = torch.minimum(slot, value)
                    torch.maximum(slot, value, out=slot)
                    value = low
            model.zero_grad()

    return pairs("attribute_loop", attributed(setting), loop, setting, 0.35, "single samples")


def artifact(setting: Setting) -> Figure:
    """Bytes of the importance file of a projection, against the model's weights in bfloat16.

    All rows are attributed once, in batches of 8, and as much of the moments is kept as by default:
    few rows of few tokens make a smaller file than a task does.
    """
    size, keep = 8, Settings.model_fields["keep"].default
    found = attribute(
        setting.model,
        (collate([setting.rows[i] for i in part]) for part in in_order(len(setting.rows), size)),
        moments="relevance",
        entries=False,
        correct_only=False,
        precision=setting.precision,
        keep=keep,
    )
    with TemporaryDirectory() as folder:
        file = Path(folder) / "importance"
        found.save(file)
        taken = (file.stat().st_size / 1e6, 2e-6 * setting.num_weights)
    kept = [moment.kept for moment in found.moments.values()]
    ranks = [len(moment.energies) / len(moment.directions) for moment in found.moments.values()]
    note = (
        f"{sum(len(row.input_ids) for row in setting.rows)} tokens; of a moment's trace the files "
        f"keep {min(kept):.3f} to {max(kept):.3f}, median {median(kept):.3f} (importance.keep "
        f"{keep}), in a median of {median(ranks):.3f} of its directions"
    )
    return figure("artifact", [taken], 0.15, "bfloat16 weights of the model", "MB", note)


def exact_match_against_generate(setting: Setting) -> Figure:
    """Exact match by one forward pass against transformers' `generate` on the same rows."""
    forced, decoded = exact_match_both_ways(setting)
    return pairs("exact_match", forced, decoded, setting, 0.2, "transformers' generate")


def exact_match_both_ways(setting: Setting) -> tuple[Run, Run]:
    """By one forward pass, and by `generate` of as many tokens as the longest answer has.

    Both give the same verdicts, which is looked at once.
    """
    model, rows, device = setting.model, setting.rows, setting.model.device
    answers = [row.input_ids[row.prompt_tokens :] for row in rows]
    end = rows[0].input_ids[-1]
    width = max(row.prompt_tokens for row in rows)
    prompts = torch.full((len(rows), width), end)
    mask = torch.zeros_like(prompts)
    for place, row in enumerate(rows):  # Padded on the left.
        prompts[place, width - row.prompt_tokens :] = torch.tensor(
            row.input_ids[: row.prompt_tokens]
        )
        mask[place, width - row.prompt_tokens :] = 1

    def decoded() -> list[bool]:
        with torch.no_grad():
            found = cast(Any, model).generate(
                prompts.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(map(len, answers)),
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        told = found[:, width:].tolist()
        return [ids[: len(a)] == a for ids, a in zip(told, answers, strict=True)]

    def forced() -> list[bool]:
        return exact_match(model, rows, batch_size=len(rows))

    assert forced() == decoded()
    return forced, decoded


def plain_passes(setting: Setting) -> Run:
    """A forward and backward of each batch that `attributed` attributes."""
    model, batch = setting.model, setting.batch

    def run() -> None:
        for _ in range(setting.batches):
            with autocast(setting.device, setting.precision):
                loss = summed_loss(model, batch)
            loss.backward()
            model.zero_grad()

    return run


def attributed(setting: Setting, top_k: int = 4, **options: Any) -> Run:
    """An attribution of all rows, several times over."""
    batches = [setting.batch] * setting.batches
    options |= {"top_k": top_k, "correct_only": False, "precision": setting.precision}

    def run() -> None:
        attribute(setting.model, batches, **options)

    return run
