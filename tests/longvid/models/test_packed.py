"""Packed linear layers against the plain ones."""

import copy

import pytest
import torch
from torch import nn

from longvid.models.dit import SKYREELS, DiT, DiTConfig
from longvid.models.packed import PackedLinear, can_pack, pack

CONFIG = DiTConfig(
    class_name=SKYREELS, num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
    freq_dim=32, ffn_dim=80, num_layers=2,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this torch does not pack linear layers")


@torch.no_grad()
def test_a_packed_model_gives_what_the_plain_one_gives():
    torch.manual_seed(0)
    plain = DiT(CONFIG).eval()
    packed = pack(copy.deepcopy(plain))
    x, timesteps = torch.randn(1, 4, 3, 6, 10), torch.tensor([[100.0, 500, 900]])
    text = torch.randn(1, 7, 24)
    outs = [dit(x, timesteps, dit.text_features(text)) for dit in (plain, packed)]
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=0, atol=2e-5)
    for i in plain.layers:
        for kv, other in zip(outs[0][1][i], outs[1][1][i], strict=True):
            torch.testing.assert_close(kv, other, rtol=0, atol=2e-5)


def test_every_linear_layer_of_the_blocks_is_packed_and_no_other():
    packed = pack(DiT(CONFIG, range(1, 2)))
    assert not any(isinstance(module, nn.Linear) for module in packed.blocks.modules())
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 8
    assert isinstance(packed.proj_out, nn.Linear) and packed.proj_dtype == torch.float32


def test_what_cannot_be_packed_stays():
    plain = DiT(CONFIG).double()
    assert pack(plain) is plain and isinstance(plain.blocks["0"].attn1.to_q, nn.Linear)
    assert plain.blocks["0"].ffn.net[0].proj.weight.dtype == torch.float64
