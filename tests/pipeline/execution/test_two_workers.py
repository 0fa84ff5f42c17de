"""Two Ray Train workers, killed in between or not, against the finished runs' one."""

import json
import signal

import pytest
import torch
from reference.driver import wait_until_no_process_is_left

from agcl.importance import Importance

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("killed", "shared"),
    [
        (False, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_two_workers_give_what_one_gives(finished, driver, killed, shared):
    alone = {name: found.folder for name, found in finished.runs["gradient"].resolved.items()}
    settings = ["resources.num_workers=2", f"resources.shard_model={shared}"]
    if killed:
        assert driver.stop_at("train-1-harbour", signal.SIGKILL, *settings) == -signal.SIGKILL
        wait_until_no_process_is_left(driver.storage)
    before = driver.finished()
    code, _, err = driver.finish(*settings)
    assert code == 0, err
    assert before.items() <= driver.finished().items()
    assert not list(driver.storage.rglob("*.part"))
    one, two = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (alone["report"], driver.run)
    )
    if shared:  # A shared model adds up in another order.
        kl = [metrics["base"].pop("kl_answers") for metrics in (one, two)]
        assert kl[1] == pytest.approx(kl[0], rel=1e-3)
    assert one.items() <= two.items()
    folders = {name: driver.run / name.replace("/", "-") for name in alone}
    for stage in ("pretrain", "train/1-harbour", "train/2-valley"):
        one, two = (
            [json.loads(line)["loss"] for line in (run[stage] / "log.jsonl").open()]
            for run in (alone, folders)
        )
        assert len(one) > 1
        # Adam lets rounding grow from step to step.
        assert two == pytest.approx(one, rel=1e-3 if shared else 1e-5)
    one, two = (
        Importance.load(run["attribute/1-harbour"] / "importance.safetensors").entries
        for run in (alone, folders)
    )
    for name, entry in one.items():
        # Stored in bfloat16.
        torch.testing.assert_close(two[name], entry, rtol=0.02, atol=1e-6 if shared else 1e-7)
