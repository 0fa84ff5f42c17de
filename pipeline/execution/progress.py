"""Progress of running stages: live bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from pipeline.stages.context import Record

_SECONDS_BETWEEN_LINES = 20.0
_SHOWN: Mapping[str, Callable[[Any], str]] = {
    "loss": "loss {:.4f}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "mfu": "{:.0%} of peak".format,
    "peak_memory_gb": "{:.1f} GB".format,
    "seconds_left": lambda seconds: f"{duration(seconds)} left",
}
"""The metrics of a step that are shown while a stage runs."""


class StageProgress:
    """Shows a bar for all stages and one per running stage, and leaves a line per finished one."""

    def __init__(self, console: Console, titles: Mapping[str, str]) -> None:
        """`titles` are the names to show, by artifact."""
        self.console, self.num_done = console, 0
        self.names = titles
        self.titles = {artifact: escape(title) for artifact, title in titles.items()}
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.began = self.said = time.monotonic()
        self.all = self.bars.add_task("", total=len(titles), detail="")
        self.wait_for("Ray to start")
        self.running: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> "StageProgress":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def wait_for(self, what: str) -> None:
        """Show what the first stage waits for."""
        self.bars.update(self.all, description=f"[dim]waiting for {what}[/]")

    def observe(self, records: Iterable[Record]) -> None:
        """Show records of stages: started, metrics, a note, lost, finished or failed."""
        for record in records:
            artifact = str(record["artifact"])
            match record.get("state"):
                case "started":
                    if not (self.running or self.num_done):
                        self.began = time.monotonic()
                    bar = self.bars.add_task(self.titles[artifact], total=None, detail="")
                    self.running[artifact] = (bar, time.monotonic())
                    self.bars.update(self.all, description="[bold]all stages[/]")
                case "finished" | "failed" | "lost" as state:
                    self._end(artifact, state)
                case _ if "warning" in record:
                    warn(self.console, f"{self.names[artifact]}: {record['warning']}")
                case _ if "note" in record:
                    self._say(artifact, escape(str(record["note"])))
                case _:
                    self._advance(artifact, record)

    def _advance(self, artifact: str, record: Record) -> None:
        if artifact not in self.running:
            return
        bar = self.running[artifact][0]
        of = next((key for key in record if key.startswith("of_")), "")
        total = record.get(of)
        self.bars.update(
            bar, completed=float(record["step"]), total=float(total) if total else None
        )
        detail = ", ".join(show(record[key]) for key, show in _SHOWN.items() if key in record)
        self.bars.update(bar, detail=detail)
        if not self.console.is_terminal:
            done = f"{record['step']}/{total} {of.removeprefix('of_')}"
            if not total:
                done = f"{record['step']} rows" if "rows" in record else f"task {record['step']}"
            self._say_now_and_then(artifact, ", ".join(filter(None, (done, detail))))

    def _say_now_and_then(self, artifact: str, detail: str) -> None:
        """Print the progress of a long stage occasionally."""
        if time.monotonic() - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self._say(artifact, detail)

    def _say(self, artifact: str, text: str) -> None:
        line = f"       {self.titles[artifact]} {text}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _end(self, artifact: str, state: str) -> None:
        bar, started = self.running.pop(artifact, (None, time.monotonic()))
        if bar is not None:
            self.bars.remove_task(bar)
        self.num_done += state == "finished"
        self.bars.update(self.all, completed=self.num_done, detail=self._time_left())
        title = self.titles[artifact]
        if state == "lost":
            line = f"[yellow]lost[/] a worker in {title}; restarting it"
        else:
            mark = "[red]failed[/]" if state == "failed" else "[green]done[/]"
            seconds = time.monotonic() - started
            line = f"{mark} {title} [dim]{seconds:.1f} s ({self.num_done}/{len(self.titles)})[/]"
        self.console.print(f"  {line}", highlight=False)

    def _time_left(self) -> str:
        """By the mean of the stages so far, some of which ran side by side."""
        if not self.num_done:
            return ""
        each = (time.monotonic() - self.began) / self.num_done
        return f"about {duration(each * (len(self.titles) - self.num_done))} left"


def duration(seconds: float) -> str:
    """Minutes and seconds: 3:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def warn(console: Console, message: str) -> None:
    """Print a warning of one line."""
    console.print(f"  [yellow]warning[/] {escape(message)}", highlight=False, soft_wrap=True)
