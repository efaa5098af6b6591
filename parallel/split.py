"""Which layers each stage keeps. Plain Python."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def split_layers(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Contiguous ranges of layers, one per stage and none empty, whose greatest cost is least.

    `costs` are of the layers, `first` and `last` what the two end stages do besides (embedding; solver, decoding), all
    in one unit. Of equal splits it is the one whose earlier stages have more layers. Exact, by dynamic programming
    over the number of layers given away. Raises ValueError for more stages than layers.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{num_stages} stages of {len(costs)} layers: a stage needs a layer; use 1 to {len(costs)}")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        ends = first * (stage == 0) + last * (stage == num_stages - 1)
        return before[stop] - before[start] + ends

    @cache
    def best(stage: int, start: int) -> tuple[float, int]:
        """Least greatest cost of this stage and all after it, and where this one stops."""
        if stage == num_stages - 1:
            return cost(stage, start, len(costs)), len(costs)
        stops = range(start + 1, len(costs) - (num_stages - 1 - stage) + 1)
        return min(
            ((max(cost(stage, start, stop), best(stage + 1, stop)[0]), stop) for stop in stops),
            key=lambda found: (found[0], -found[1]),
        )

    ranges, start = [], 0
    for stage in range(num_stages):
        stop = best(stage, start)[1]
        ranges.append(range(start, stop))
        start = stop
    return ranges
