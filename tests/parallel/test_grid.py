"""Places, ranks and edges of grids."""

import pytest

from parallel.grid import Grid, make_grid

GRIDS = [Grid(num_stages=stages, num_lanes=lanes) for stages in (1, 2, 3, 5) for lanes in (1, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_place_is_taken_once_and_the_head_is_rank_0(grid):
    places = [grid.place(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size
    assert places[0].stage == grid.num_stages - 1 and places[0].lane in (None, 0)
    assert [grid.rank(place.lane or 0, place.stage) for place in places] == list(range(grid.world_size))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_edges_are_the_ways_of_latents_hidden_states_and_velocities(grid):
    edges = list(grid.edges())
    assert len(set(edges)) == len(edges) and all(a != b for a, b in edges)
    for lane in range(grid.num_lanes):
        way = [0, *(grid.rank(lane, stage) for stage in range(grid.num_stages)), 0]
        assert all(pair in edges for pair in zip(way, way[1:], strict=False) if pair[0] != pair[1])
    lane_0 = grid.num_stages if grid.num_stages > 1 else 0
    assert len(edges) == lane_0 + (grid.num_lanes - 1) * (grid.num_stages + 1)


@pytest.mark.parametrize("size, guided, cfg, said", [
    (2, False, True, "a guidance scale of 1 has one"),
    (3, True, True, "an even number of processes, not 3; try 4"),
    (7, True, False, "nproc=7 makes 7 stages"),
    (14, True, True, "use 1 to 12 processes"),
    (0, True, False, "nproc=0"),
])  # fmt: skip
def test_layouts_that_cannot_be(size, guided, cfg, said):
    with pytest.raises(ValueError, match=said):
        make_grid(size, has_guidance=guided, num_layers=6, cfg_parallel=cfg)


def test_lanes_take_half_of_the_processes():
    assert make_grid(8, has_guidance=True, num_layers=6, cfg_parallel=True) == Grid(num_stages=4, num_lanes=2)
    assert make_grid(6, has_guidance=True, num_layers=6) == Grid(num_stages=6)
