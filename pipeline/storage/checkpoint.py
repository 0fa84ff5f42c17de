"""Checkpoints inside a task that outlive their node: an object store has them too."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from agcl.files.checkpoint import Checkpoint, Steps
from agcl.parallel import distributed
from torch import nn
from torch.optim import Optimizer

from pipeline.storage import mirror
from pipeline.storage.object_store import StoreFailed


class StoredCheckpoint(Checkpoint):
    """A checkpoint in the cache of an object store, uploaded whenever it is written.

    Where that fails training goes on, and there is an older one or none to go on from.
    """

    def __init__(self, file: Path, identity: str, seconds: float, store: str) -> None:
        super().__init__(file, identity, seconds)
        self.store = store

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Steps:
        """As `Checkpoint.restore`, from the store where the file is not here."""
        if distributed.rank() == 0 and not self.file.exists():
            with suppress(StoreFailed):
                mirror.pull_file(self.store, self.file)
        return super().restore(parameters, optimizer)

    def write_if_due(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        """As `Checkpoint.write_if_due`; the time for the upload counts too."""
        before = self.written
        super().write_if_due(parameters, optimizer, steps)
        if distributed.rank() == 0 and self.written != before and self.file.exists():
            started = time.monotonic()
            with suppress(StoreFailed):
                mirror.push_file(self.store, self.file)
            self.written = time.monotonic()
            self.taken += self.written - started

    def remove(self) -> None:
        """Remove the file, here and on the store."""
        super().remove()
        with suppress(StoreFailed):
            mirror.remove_file(self.store, self.file)
