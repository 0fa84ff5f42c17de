"""How fast a model trains, and what it takes: tokens per second, peak memory, share of the peak."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from agcl.parallel import distributed

_PEAK_TERAFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Peak dense bfloat16 FLOP/s of data sheets, by part of a device's name; first match wins."""


def meter(model: PreTrainedModel) -> Callable[[Sequence[int]], dict[str, float]]:
    """Start to measure. Call the result after every step, with the length of each row of the step.

    It returns `tokens_per_second` of all ranks together since the last call, `peak_memory_gb` of
    this process (on a GPU: of torch's tensors on it, since this function was called), and on a
    known GPU `mfu`, the model FLOPs utilization (Chowdhery 2022, "PaLM", appendix B): the share of
    the ranks' peak in dense bfloat16 that the step's arithmetic comes to. Counted are, per token, 4
    FLOPs per weight of the layers and 2 more if it is trained, and 12 x layers x width x length for
    attention; not the head, which computes answer tokens only, nor what is recomputed.
    """
    device, config = model.device, model.config
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {p for module in embeddings if module is not None for p in module.parameters()}
    counted = [p for p in model.parameters() if p not in outside]
    per_token = sum((6 if p.requires_grad else 4) * _weights(p) for p in counted)
    per_pair = 12 * config.num_hidden_layers * config.hidden_size
    peak = _peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if device.type == "cuda":
        _highest_before[device] = highest_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
    last = time.perf_counter()

    def measure(lengths: Sequence[int]) -> dict[str, float]:
        nonlocal last
        now = time.perf_counter()
        seconds, last = now - last, now
        tokens = sum(lengths)
        found = {
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_gb": round(peak_memory(device) / 1e9, 3),
        }
        if peak:
            flops = per_token * tokens + per_pair * sum(length**2 for length in lengths)
            found["mfu"] = round(flops / seconds / (peak * distributed.world_size()), 4)
        return found

    return measure


def _peak(name: str) -> float | None:
    """FLOP per second of a GPU; None if it is not in the table."""
    return next((1e12 * t for part, t in _PEAK_TERAFLOPS.items() if part in name), None)


def _weights(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; bitsandbytes packs two into a byte."""
    return parameter.numel() * (1 if parameter.is_floating_point() else 2)


_highest_before: dict[torch.device, int] = {}
"""Peak of each GPU before it was last set back."""


def highest_memory(device: torch.device) -> int:
    """`peak_memory` since the process started, whatever was metered in between."""
    return max(_highest_before.get(device, 0), peak_memory(device))


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory of a GPU, as torch allocated it, or else of this process, in bytes."""
    if device and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Linux, where rusage would include the parent's peak; some sandboxes leave the line out.
    if status.exists() and (peak := status.read_text().partition("VmHWM:")[2]):
        return 1024 * int(peak.split()[0])
    # Kilobytes, but on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
