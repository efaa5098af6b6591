"""Which layout so many processes get: of those that are possible, the one that the cost model finds fastest."""

from dataclasses import dataclass

from longvid.plan import Plan
from parallel.cost import Costs, ModelShape, Timeline, best_split, simulate
from parallel.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A grid, the layers of each of its stages, and what the cost model expects of it by those costs."""

    grid: Grid
    layers: tuple[range, ...]
    costs: Costs
    shape: ModelShape
    planned: Timeline

    def at_speed(self, pass_time: float, decode_time: float) -> Timeline:
        """What it expects where all passes, and all decoding, take that time in sum: the machine was not as fast as
        when it was measured."""
        passes, decode = pass_time / self.planned.pass_time, decode_time / self.planned.decode_time
        return simulate(self.planned.plan, self.grid, self.layers, self.costs.at_speed(passes, decode), self.shape)

    @property
    def in_words(self) -> str:
        """One line for people."""
        stages = ", ".join(f"{part.start}-{part.stop - 1}" for part in self.layers)
        grid, idle = self.grid, 100 * self.planned.mean_idle
        bands = f" of {grid.num_bands} processes that share its heads" if grid.num_bands > 1 else ""
        lanes = f" for each of {grid.num_lanes} lanes of guidance" if grid.num_lanes > 1 else ""
        back = f", the decoder's back on process {grid.back}, {grid.decode_lag} passes late" if grid.back else ""
        return f"{grid.num_stages} stages{bands}{lanes}, layers {stages}{back}; idle {idle:.0f} %"


def fastest(plan: Plan, grids: list[Grid], costs: Costs, shape: ModelShape) -> Layout:
    """The layout of least makespan; of equal ones the first. Decoders whose front costs nothing are left whole."""
    layouts, whole = [], [grid for grid in grids if not grid.cuts_decoder]
    grids = whole if whole and not costs.front else grids
    for grid in grids:
        layers = tuple(best_split(plan, grid, costs, shape))
        planned = simulate(plan, grid, layers, costs, shape)
        layouts.append(Layout(grid=grid, layers=layers, costs=costs, shape=shape, planned=planned))
    return min(layouts, key=lambda layout: layout.planned.makespan)
