"""The layout that is chosen is the fastest of all that are possible."""

import pytest

from longvid.plan import make_plan
from parallel.cost import Costs, ModelShape, simulate
from parallel.layout import fastest, possible_grids
from parallel.split import split_layers
from pipelines.methods import METHODS

SHAPE = ModelShape(num_layers=6, dim=8, ffn_dim=16, tokens_per_latent=4, latent_bytes=64, bytes_per_element=4)


@pytest.mark.parametrize("costs", [Costs(), Costs(decode=30.0), Costs(latency=2.0), Costs(first=1.0, last=2.0)])
def test_no_possible_layout_is_faster(costs):
    plan = make_plan(METHODS["rolling"](num_steps=4, guidance_scale=3.0), 30)
    grids = possible_grids(4, has_guidance=True, num_layers=6)
    assert {(grid.num_stages, grid.num_lanes) for grid in grids} == {(4, 1), (2, 2)}
    chosen = fastest(plan, grids, costs, SHAPE)
    for grid in grids:
        layers = split_layers([1.0] * 6, grid.num_stages)
        assert chosen.planned.makespan <= simulate(plan, grid, layers, costs, SHAPE).makespan
    assert sum(map(len, chosen.layers)) == 6 and f"{chosen.grid.num_stages} stages" in chosen.in_words


@pytest.mark.parametrize("size, guided, cfg, expected", [
    (12, True, None, [(6, 2)]), (5, True, None, [(5, 1)]), (4, False, None, [(4, 1)]),
    (4, True, False, [(4, 1)]), (4, True, True, [(2, 2)]),
])  # fmt: skip
def test_grids_that_are_possible(size, guided, cfg, expected):
    grids = possible_grids(size, has_guidance=guided, num_layers=6, cfg_parallel=cfg)
    assert [(grid.num_stages, grid.num_lanes) for grid in grids] == expected


@pytest.mark.parametrize("size, guided", [(13, True), (7, False), (0, True)])
def test_none_is_possible(size, guided):
    with pytest.raises(ValueError, match="use 1 to"):
        possible_grids(size, has_guidance=guided, num_layers=6)
