"""What attribution and protection cost, as ratios of two things done in turn in one process."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from reference.tiny import exact_match
from torch import Tensor

from agcl.attribution import attribute
from agcl.attribution.inputs import InputMoment
from agcl.importance import Moment
from agcl.lrp import attributed_linears, weight_of
from agcl.model.forward import answer_logits, compiled
from agcl.modulation import GatedAdamW, random_bases
from agcl.tasks.batches import collate
from agcl.train import summed_loss, train_task
from bench.measure import Figure, Run, Setting, pairs


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
            with torch.no_grad():
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
            summed_loss(model, collate([row]).to(model.device)).backward()
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


def gated_step(setting: Setting) -> Figure:
    """A step of the gated optimizer against one of `torch.optim.AdamW(foreach=True)`."""
    model = setting.model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    gate = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.dim() == 2}
    gated = GatedAdamW(model.named_parameters(), gate=gate, lr=1e-7)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-7, foreach=True)
    figure = pairs("gated_step", gated.step, plain.step, setting, 1.15, "AdamW(foreach=True)")
    model.zero_grad()
    return figure


def projected_step(setting: Setting) -> Figure:
    """A training step with a projection (5 % of the directions) against a plain one."""
    model = setting.model
    linears = attributed_linears(model)
    widths = {name: weight_of(module).shape[1] for name, module in linears.items()}
    like = {name: torch.empty(w, max(1, round(0.05 * w))) for name, w in widths.items()}
    named = [(n, p) for n, p in model.named_parameters() if n in linears]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in named:
        parameter.requires_grad_(True)
    basis = random_bases(like, seed=0)
    size = len(setting.rows)
    options: dict[str, Any] = {"epochs": 1, "batch_size": size, "micro_batch_size": size, "seed": 0}
    projected = GatedAdamW(named, basis=basis, lr=1e-7)
    plain = GatedAdamW(named, lr=1e-7)
    figure = pairs(
        "projected_step",
        lambda: train_task(model, setting.rows, projected, **options),
        lambda: train_task(model, setting.rows, plain, **options),
        setting,
        1.2,
        "plain step, same weights trained",
    )
    model.requires_grad_(True)
    return figure


def packed_step(setting: Setting) -> Figure:
    """A training step on packed rows against one on padded rows; all rows in one micro-batch."""
    packed, padded = _step(setting, packing=True), _step(setting)
    return pairs("packed_step", packed, padded, setting, 1.0, "the step on padded rows")


def compiled_step(setting: Setting) -> Figure:
    """A training step through `torch.compile` against one without, all rows in one micro-batch."""
    plain = _step(setting)

    def through_compile() -> None:
        with compiled(setting.model):
            plain()

    return pairs("compiled_step", through_compile, plain, setting, 1.0, "the step without")


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


def _step(setting: Setting, **options: Any) -> Run:
    model, size = setting.model, len(setting.rows)
    optimizer = GatedAdamW(model.named_parameters(), lr=1e-7)
    options |= {"epochs": 1, "batch_size": size, "micro_batch_size": size, "seed": 0}
    return lambda: train_task(model, setting.rows, optimizer, **options)


def plain_passes(setting: Setting) -> Run:
    """A forward and backward of each batch that `attributed` attributes."""
    model, batch = setting.model, setting.batch

    def run() -> None:
        for _ in range(setting.batches):
            summed_loss(model, batch).backward()
            model.zero_grad()

    return run


def attributed(setting: Setting, top_k: int = 4, **options: Any) -> Run:
    """An attribution of all rows, several times over."""
    batches = [setting.batch] * setting.batches

    def run() -> None:
        attribute(setting.model, batches, top_k=top_k, correct_only=False, **options)

    return run
