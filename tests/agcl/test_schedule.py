"""Learning-rate schedules over a task's steps."""

import pytest
import torch
from reference import tiny
from transformers import get_scheduler

from agcl.schedule import rate_factor
from agcl.train import train_task


def factors(num_steps, schedule, warmup=0.0):
    steps = range(1, num_steps + 1)
    return [rate_factor(step, num_steps, schedule=schedule, warmup=warmup) for step in steps]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("rising", [0, 3])
def test_it_equals_transformers_schedule_except_in_warmup(schedule, rising):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=rising, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    found = factors(12, schedule, warmup=rising / 12)
    assert found[rising:] == pytest.approx(expected[rising:], abs=1e-12)
    assert found[:rising] == pytest.approx([1 / 3, 2 / 3, 1.0][:rising])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_every_rate_is_positive_and_the_peak_is_reached(schedule, warmup, num_steps):
    found = factors(num_steps, schedule, warmup)
    assert min(found) > 0
    assert max(found) == 1


def test_every_group_of_the_optimizer_follows_it(llama):
    first, *others = llama.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": others, "lr": 0.1}])
    rates, logged = [], []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    train_task(
        llama,
        tiny.random_rows(8),
        optimizer,
        epochs=2,
        batch_size=4,
        micro_batch_size=4,
        seed=0,
        schedule="linear",
        warmup=0.25,
        log=lambda metrics, step: logged.append(metrics["learning_rate"]),
    )
    expected = [1, 1, 2 / 3, 1 / 3]
    assert rates == [pytest.approx([0.3 * factor, 0.1 * factor]) for factor in expected]
    assert logged == [first for first, _ in rates]
