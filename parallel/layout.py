"""Which layout so many processes get: of those that are possible, the one that the cost model finds fastest."""

from dataclasses import dataclass

from longvid.plan import Plan
from parallel.cost import Costs, ModelShape, Timeline, best_split, simulate
from parallel.grid import Grid, make_grid


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A grid, the layers of each of its stages, and what the cost model expects of it."""

    grid: Grid
    layers: tuple[range, ...]
    planned: Timeline

    @property
    def in_words(self) -> str:
        """One line for people."""
        stages = ", ".join(f"{part.start}-{part.stop - 1}" for part in self.layers)
        lanes = f" for each of {self.grid.num_lanes} lanes of guidance" if self.grid.num_lanes > 1 else ""
        return f"{self.grid.num_stages} stages{lanes}, layers {stages}; idle {100 * self.planned.mean_idle:.0f} %"


def possible_grids(
    world_size: int, *, has_guidance: bool, num_layers: int, cfg_parallel: bool | None = None
) -> list[Grid]:
    """The grids that so many processes can form; `cfg_parallel` None leaves open what becomes of the lanes.

    Raises ValueError as `make_grid` does if there is none.
    """
    if cfg_parallel is not None:
        return [make_grid(world_size, has_guidance=has_guidance, num_layers=num_layers, cfg_parallel=cfg_parallel)]
    found, refused = [], []
    for lanes in (False, True):
        try:
            found.append(make_grid(world_size, has_guidance=has_guidance, num_layers=num_layers, cfg_parallel=lanes))
        except ValueError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def fastest(plan: Plan, grids: list[Grid], costs: Costs, shape: ModelShape) -> Layout:
    """The layout of least makespan; of equal ones the first."""
    layouts = []
    for grid in grids:
        layers = tuple(best_split(plan, grid, costs, shape.num_layers))
        layouts.append(Layout(grid=grid, layers=layers, planned=simulate(plan, grid, layers, costs, shape)))
    return min(layouts, key=lambda layout: layout.planned.makespan)
