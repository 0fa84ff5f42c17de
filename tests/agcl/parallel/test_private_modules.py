"""The private names of torch that agcl relies on. Torch may change them in any minor version."""

import inspect

import torch
from reference.private import check_takes, found

C10D = "torch.distributed.distributed_c10d"
OPTIMIZER = "agcl/modulation/optimizer.py"


def test_ranks_meet_in_the_store_of_the_default_group():
    check_takes(f"{C10D}._get_default_store", user="agcl/parallel/distributed.py")
    store = torch.distributed.HashStore()
    assert [store.add("key", n) for n in (1, 0, 1)] == [1, 1, 2], "a store's add no longer counts"


def test_sharded_models_use_the_default_group():
    path = "torch.distributed.device_mesh.DeviceMesh.from_group"
    check_takes(path, "group", "device_type", user="agcl/parallel/sharding.py")


def test_the_optimizer_s_kernels_take_what_they_are_given():
    before, shares = [torch.tensor([1.0, 1.0])], [torch.tensor([0.0, 1.0])]
    now = [torch.tensor([3.0, 3.0])]
    torch._foreach_lerp_(now, before, shares)
    torch._foreach_mul_(now, 2)
    torch._foreach_div_(now, 4)
    torch._foreach_add_(now, now)
    torch._foreach_sub_(now, before)
    torch._foreach_copy_(before, now)
    assert before[0].tolist() == [2.0, 0.0]
    given = inspect.signature(found("torch.optim.adamw.adamw")).parameters
    needed = {"fused", "amsgrad", "beta1", "beta2", "lr", "weight_decay", "eps", "maximize"}
    assert needed <= set(given), f"torch.optim.adamw.adamw takes {list(given)}; {OPTIMIZER}"
    first = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
    assert list(given)[:6] == first, f"torch.optim.adamw.adamw takes {list(given)}; {OPTIMIZER}"


def test_a_compiled_layer_falls_back_only_after_the_limit_that_agcl_sets():
    assert isinstance(found("torch._dynamo.config.recompile_limit"), int)
    assert issubclass(found("torch._dynamo.exc.BackendCompilerFailed"), Exception)
    assert hasattr(torch.nn.Module(), "_compiled_call_impl")
