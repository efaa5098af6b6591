"""What each process did when, in the trace format that Chrome and Perfetto show, beside what was planned."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from parallel.cost import Timeline
from parallel.layout import Layout

MEASURED, PLANNED = 0, 1
"""Process ids in the file; its threads are ranks."""


class Span(NamedTuple):
    """Something that took from `start` to `end`, nanoseconds of the wall clock; `about` names block, step and lane."""

    name: str
    start: int
    end: int
    about: dict


class Trace:
    """Spans of this process. On a GPU each waits for the device, so that it shows when the work was done."""

    def __init__(self, device: str):
        self.device = device
        self.spans: list[Span] = []

    @contextmanager
    def span(self, name: str, **about) -> Iterator[None]:
        """Note what happens within."""
        start = time.time_ns()
        yield
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.spans.append(Span(name, start, time.time_ns(), about))


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """Seconds from the first span of any process to the end of the last."""
    everything = [span for of_rank in spans for span in of_rank]
    return (max(span.end for span in everything) - min(span.start for span in everything)) / 1e9


def idle(spans: Sequence[Sequence[Span]]) -> list[float]:
    """Share of the makespan in which each process has no span, by rank."""
    whole = makespan(spans)
    return [1 - sum(span.end - span.start for span in of_rank) / 1e9 / whole for of_rank in spans]


def _total(spans: Sequence[Sequence[Span]], name: str) -> float:
    """Seconds in spans of that name, of all processes."""
    return sum(span.end - span.start for of_rank in spans for span in of_rank if span.name == name) / 1e9


def chrome_trace(spans: Sequence[Sequence[Span]], layout: Layout | None) -> dict:
    """The file's content: spans of each rank, and below them what the cost model expected from the first on.

    In `otherData` are both makespans, and what it expects of a machine that is as fast as this one was in this run.
    """
    origin = min(span.start for of_rank in spans for span in of_rank)
    events = [_name(MEASURED, "measured")]
    for rank, of_rank in enumerate(spans):
        events += [_event(MEASURED, rank, span.name, (span.start - origin) / 1e3, (span.end - span.start) / 1e3,
                          span.about) for span in of_rank]  # fmt: skip
    summary = {"measured_makespan_s": makespan(spans), "measured_idle": idle(spans)}
    if layout is not None:
        planned = layout.planned
        events += [_name(PLANNED, "planned"), *_planned_events(planned)]
        at_speed = layout.at_speed(_total(spans, "pass"), _total(spans, "decode"))
        summary |= {"planned_makespan_s": planned.makespan, "planned_at_its_speed_s": at_speed.makespan,
                    "planned_idle": list(planned.idle)}  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": summary}


def _planned_events(planned: Timeline) -> Iterator[dict]:
    for rank in range(planned.grid.world_size):
        for i, p in enumerate(planned.plan.passes):
            start, end = planned.starts[rank, i], planned.ends[rank, i]
            if end == end:
                yield _event(PLANNED, rank, "pass", 1e6 * start, 1e6 * (end - start), about(p))
        for start, end, block in planned.decoding(rank):
            yield _event(PLANNED, rank, "decode", 1e6 * start, 1e6 * (end - start), {"block": block})


def about(p) -> dict:
    """Which pass it is."""
    return {"tick": p.tick, "lane": p.lane, "blocks": [cover.block for cover in p.covers]}


def _event(process: int, rank: int, name: str, start: float, duration: float, args: dict) -> dict:
    return {"ph": "X", "pid": process, "tid": rank, "name": name, "ts": start, "dur": duration, "args": args}


def _name(process: int, name: str) -> dict:
    return {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
