"""Operations of a layer are those that torch counts, and costs by roofline are what they say."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvid.plan import make_plan
from parallel.cost import ModelShape
from parallel.roofline import Link, Processor, layer_operations, roofline_costs
from pipelines.methods import dualparal
from tests.whole_clip import tiny_dit

LINK = Link(name="a", latency=0.5, bandwidth=8.0)


def test_operations_are_those_that_torch_counts():
    dims = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40}
    counts = []
    for num_layers in (1, 2):
        dit, x = tiny_dit(num_layers=num_layers, **dims), torch.randn(1, 4, 3, 8, 8)
        text = dit.text_features(torch.randn(1, 5, 8))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            dit(x, torch.full((1, 3), 500.0), text)
        counts.append(counter.get_total_flops())
    shape = ModelShape(num_layers=1, dim=24, ffn_dim=40, num_rows=4, tokens_per_latent=16, latent_bytes=1,
                       bytes_per_element=4)  # fmt: skip
    per_latent, per_pair = layer_operations(shape, 5)
    assert counts[1] - counts[0] == pytest.approx(3 * per_latent + 9 * per_pair, rel=0.02)


def test_costs_grow_with_work_and_shrink_with_the_processor():
    shape = ModelShape(num_layers=4, dim=64, ffn_dim=256, num_rows=4, tokens_per_latent=64, latent_bytes=4096,
                       bytes_per_element=2)  # fmt: skip
    slow, fast = (Processor(name="p", peak=peak, memory_bandwidth=1e9, share=0.5) for peak in (1e12, 2e12))
    p = make_plan(dualparal(num_steps=2), 32).passes[0]
    a, b = (roofline_costs(shape, processor, LINK, text_tokens=8, decode=0.25) for processor in (slow, fast))
    per_latent, per_pair = layer_operations(shape, 8)
    operations = per_latent * p.num_latents + per_pair * p.num_latents * (p.num_latents + p.num_context)
    assert a.layer(p) == pytest.approx(operations / 0.5e12 + shape.layer_bytes / 1e9)
    assert a.layer(p) - a.fixed == pytest.approx(2 * (b.layer(p) - b.fixed)) and a.decode == 0.25
    assert (a.latency, a.bandwidth) == (0.5, 8.0)
