"""The layout that is chosen is the fastest of all that are possible."""

import pytest

from longvid.plan import make_plan
from parallel.cost import Costs, ModelShape, simulate
from parallel.grid import Degrees, Limits, possible_grids
from parallel.layout import fastest
from parallel.split import split_layers
from pipelines.methods import METHODS

SHAPE = ModelShape(
    num_layers=6, dim=8, ffn_dim=16, num_rows=2, tokens_per_latent=4, latent_bytes=64, bytes_per_element=4
)


def test_bands_are_chosen_where_links_are_fast_and_there_is_one_pass_at_a_time():
    """A window of one lane leaves stages nothing to do at once; heads can be shared, if links are not too slow."""
    plan = make_plan(METHODS["skyreels-sync"](num_steps=4, guidance_scale=1.0), 25)
    limits = Limits(num_layers=6, num_heads=2, num_rows=2, num_lanes=1)
    grids = possible_grids(2, limits, Degrees(), may_cut_rows=True)
    found = [fastest(plan, grids, Costs(bandwidth=bandwidth), SHAPE).grid for bandwidth in (1e6, 10.0)]
    assert [grid.num_bands for grid in found] == [2, 1]


@pytest.mark.parametrize("costs", [Costs(), Costs(decode=30.0), Costs(latency=2.0), Costs(first=1.0, last=2.0)])
def test_no_possible_layout_is_faster(costs):
    plan = make_plan(METHODS["rolling"](num_steps=4, guidance_scale=3.0), 30)
    limits = Limits(num_layers=6, num_heads=2, num_rows=2, num_lanes=2)
    grids = possible_grids(4, limits, Degrees(), may_cut_rows=True)
    assert {(g.num_stages, g.num_bands, g.num_lanes) for g in grids} == {(4, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2)}
    chosen = fastest(plan, grids, costs, SHAPE)
    for grid in grids:
        layers = split_layers([1.0] * 6, grid.num_stages)
        assert chosen.planned.makespan <= simulate(plan, grid, layers, costs, SHAPE).makespan
    assert sum(map(len, chosen.layers)) == 6 and f"{chosen.grid.num_stages} stages" in chosen.in_words


def test_a_machine_that_turned_out_slower_is_expected_to_take_longer():
    """Twice the time for all passes and all decoding is twice the makespan; more of one alone is less than that."""
    plan = make_plan(METHODS["rolling"](num_steps=4, guidance_scale=3.0), 30)
    grids = possible_grids(2, Limits(num_layers=6, num_heads=2, num_rows=2, num_lanes=2), Degrees())
    layout = fastest(plan, grids, Costs(fixed=1.0, per_pair=0.1, first=0.5, last=0.2, decode=3.0), SHAPE)
    passes, decode = layout.planned.pass_time, layout.planned.decode_time
    assert decode == pytest.approx(3.0 * 30) and passes > decode
    assert layout.at_speed(passes, decode).makespan == pytest.approx(layout.planned.makespan)
    twice = layout.at_speed(2 * passes, 2 * decode)
    assert twice.makespan == pytest.approx(2 * layout.planned.makespan)
    assert (twice.pass_time, twice.decode_time) == pytest.approx((2 * passes, 2 * decode))
    assert layout.planned.makespan < layout.at_speed(2 * passes, decode).makespan < twice.makespan
