"""Prepare a task from JSON Lines with a memory cap per process; print the largest private memory.

`python prepare_in_little_memory.py ROWS.jsonl FOLDER CAP_BYTES`: RLIMIT_DATA, inherited by Ray's
processes, kills any process that needs more.
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path

import psutil


def main(rows: Path, folder: Path, cap: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    import ray

    from agcl.model.builtin import builtin_tokenizer
    from agcl.tasks import facts
    from pipeline.stages.context import Context
    from pipeline.stages.prepare import prepare

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    texts = (row.prompt for row in facts.base(entities=8, seed=0).splits["train"]())
    builtin_tokenizer(texts).save_pretrained(folder / "tokenizer")
    out = folder / "out"
    out.mkdir()
    largest: dict[int, int] = {}
    threading.Thread(target=watch, args=(largest,), daemon=True).start()
    templates = {"prompt": "{prompt}", "answer": "{answer}"}
    config = {
        "task": {"format": "jsonl", "name": "large", **templates},
        "selection": {"train_rows": None, "test_rows": None, "validation": 0.0, "seed": 0},
        "max_length": 4000,
        "truncate": "drop",
        "chat_template": False,
    }
    prepare(config, {"tokenizer": folder / "tokenizer", "file/train": rows}, out, Context())
    counts = json.loads((out / "summary.json").read_text())["splits"]["train"]
    size = (out / "train.arrow").stat().st_size
    print(json.dumps({"largest": max(largest.values()), "size": size, **counts}))


def watch(largest: dict[int, int]) -> None:
    me = psutil.Process()
    while True:
        for process in [me, *me.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue
            private = memory.rss - memory.shared
            largest[process.pid] = max(largest.get(process.pid, 0), private)
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
