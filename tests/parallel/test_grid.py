"""Places, ranks and edges of grids."""

from dataclasses import replace

import pytest

from parallel.grid import DECODE_LAGS, Degrees, Grid, Limits, cut_rows, possible_grids, row_ranges

GRIDS = [Grid(num_stages=stages, num_bands=bands, num_lanes=lanes)
         for stages in (1, 2, 3, 5) for bands in (1, 2, 3) for lanes in (1, 2)]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_place_is_taken_once_and_the_head_is_rank_0(grid):
    places = [grid.place(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size
    assert places[0].stage == grid.num_stages - 1 and places[0].lane in (None, 0) and places[0].band == 0
    for peers in grid.peers():
        assert len({(places[rank].stage, places[rank].lane) for rank in peers}) == 1
        assert [places[rank].band for rank in peers] == list(range(grid.num_bands))
    assert sorted(rank for peers in grid.peers() for rank in peers) == list(range(grid.world_size))
    assert [grid.rank(place.lane or 0, place.stage, place.band) for place in places] == list(range(grid.world_size))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_edges_are_the_ways_of_latents_hidden_states_and_velocities(grid):
    edges = list(grid.edges())
    assert len(set(edges)) == len(edges) and all(a != b for a, b in edges)
    for lane in range(grid.num_lanes):
        for band in range(grid.num_bands):
            way = [0, *(grid.rank(lane, stage, band) for stage in range(grid.num_stages)), 0]
            assert all(pair in edges for pair in zip(way, way[1:], strict=False) if pair[0] != pair[1])
    of_head = grid.num_stages if grid.num_stages > 1 else 0
    assert len(edges) == of_head + (grid.num_lanes * grid.num_bands - 1) * (grid.num_stages + 1)


LIMITS = Limits(num_layers=6, num_heads=12, num_rows=5, num_lanes=2)


def degrees_of(grids):
    """Of those that leave the decoder whole; that the same with it cut, at every lag, come after them."""
    found = [(grid.num_stages, grid.num_bands, grid.num_lanes, grid.cuts_decoder, grid.decode_lag) for grid in grids]
    whole = [degrees for degrees in found if not degrees[3]]
    cut = [(*degrees[:3], True, lag) for degrees in whole if degrees[0] * degrees[2] > 1 for lag in range(DECODE_LAGS)]
    assert found == whole + cut
    return [degrees[:3] for degrees in whole]


def test_the_back_of_a_decoder_is_the_first_stage_s_or_the_twin_s():
    cut = lambda stages, lanes: Grid(num_stages=stages, num_bands=3, num_lanes=lanes, cuts_decoder=True)  # noqa: E731
    assert [cut(*of).back for of in ((1, 1), (2, 1), (4, 1), (1, 2), (3, 2))] == [0, 3, 3, 3, 15]
    assert cut(3, 2).place(15) == replace(cut(3, 2).place(0), lane=1) and cut(4, 1).place(3).stage == 0
    assert replace(cut(3, 2), cuts_decoder=False).back == 0


def test_a_decoder_is_cut_or_not_as_asked():
    assert all(grid.cuts_decoder for grid in possible_grids(4, LIMITS, Degrees(cuts_decoder=True)))
    assert not any(grid.cuts_decoder for grid in possible_grids(4, LIMITS, Degrees(cuts_decoder=False)))
    with pytest.raises(ValueError, match="parallel_vae cuts the decoder .* use --nproc 2 or more"):
        possible_grids(4, LIMITS, Degrees(stages=1, sequence=4, cuts_decoder=True))


@pytest.mark.parametrize("size, asked, expected", [
    (12, {}, [(6, 1, 2)]), (5, {}, [(5, 1, 1)]), (4, {}, [(4, 1, 1), (2, 1, 2)]), (4, {"lanes": 2}, [(2, 1, 2)]),
    (4, {"lanes": 1}, [(4, 1, 1)]), (4, {"sequence": 2}, [(2, 2, 1), (1, 2, 2)]), (4, {"stages": 4}, [(4, 1, 1)]),
    (16, {"sequence": 4, "lanes": 2}, [(2, 4, 2)]), (2, {"stages": 1}, [(1, 1, 2)]),
    (24, {"stages": 3, "sequence": 4, "lanes": 2}, [(3, 4, 2)]),
])  # fmt: skip
def test_grids_that_are_possible(size, asked, expected):
    assert degrees_of(possible_grids(size, LIMITS, Degrees(**asked))) == expected


def test_rows_are_cut_without_being_asked_only_where_that_is_allowed():
    free = degrees_of(possible_grids(12, LIMITS, Degrees(), may_cut_rows=True))
    assert free == [(6, 1, 2), (6, 2, 1), (3, 2, 2), (4, 3, 1), (2, 3, 2), (3, 4, 1)]
    assert all(stages * bands * lanes == 12 for stages, bands, lanes in free)


@pytest.mark.parametrize("size, guided, asked, said", [
    (2, False, {"lanes": 2}, "a guidance scale of 1 has one"),
    (3, True, {"lanes": 2}, "an even number of processes, not 3; try 4"),
    (7, False, {}, "nproc=7 makes 7 stages.* use 1 to 6 processes"),
    (14, True, {"lanes": 2}, "use 1 to 12 processes"),
    (0, True, {}, "nproc=0"),
    (5, True, {"sequence": 5}, "sequence_parallel=5 must divide the model's 12 heads; use 1, 2, 3, 4, 6 or 12"),
    (0, True, {"sequence": 0}, "sequence_parallel=0 must divide"),
    (6, True, {"sequence": 6}, "latents of this size have 5; use 1, 2, 3 or 4, or a greater --height"),
    (6, True, {"sequence": 4}, "nproc=6 must be a multiple of sequence x lanes, 4; try 8"),
    (4, True, {"stages": 3}, r"3 x 1 x 1 is 3, not nproc=4; give --nproc 3, or leave one of them open"),
    (4, True, {"stages": 2, "sequence": 2, "lanes": 2}, "2 x 2 x 2 is 8, not nproc=4; give --nproc 8"),
    (7, True, {"stages": 7}, "stages=7: each keeps at least one of the model's 6 layers; use 1 to 6"),
])  # fmt: skip
def test_layouts_that_cannot_be(size, guided, asked, said):
    with pytest.raises(ValueError, match=said):
        possible_grids(size, replace(LIMITS, num_lanes=1 + guided), Degrees(**asked))


@pytest.mark.parametrize("num_rows, num_bands, expected", [(8, 2, (4, 4)), (30, 4, (8, 8, 7, 7)), (3, 3, (1, 1, 1))])
def test_rows_are_cut_as_equally_as_can_be(num_rows, num_bands, expected):
    assert cut_rows(num_rows, num_bands) == expected
    assert [row for rows in row_ranges(num_rows, num_bands) for row in rows] == list(range(num_rows))
