"""What is done token by token, compiled, against what it stands for."""

import copy
import shutil

import pytest
import torch

from longvid.models.attention import KV, Sight, look, rotation
from longvid.models.dit import SKYREELS, DiT, DiTConfig

CONFIG = DiTConfig(
    class_name=SKYREELS, num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
    freq_dim=32, ffn_dim=80, num_layers=2,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="a C++ compiler is needed")


@torch.no_grad()
def test_a_compiled_model_gives_what_the_plain_one_gives_at_any_length_without_compiling_anew():
    from longvid.models.compiled import compile_token_wise

    torch.manual_seed(0)
    plain = DiT(CONFIG).eval()
    compiled = compile_token_wise(copy.deepcopy(plain))
    text = torch.randn(1, 7, 24)
    for length in (3, 2, 5, 4):
        x, timesteps = torch.randn(1, 4, length, 6, 10), torch.linspace(100, 900, length)[None]
        with torch.compiler.set_stance("default" if length in (3, 2) else "fail_on_recompile"):
            outs = [dit(x, timesteps, dit.text_features(text)) for dit in (plain, compiled)]
        torch.testing.assert_close(outs[0][0], outs[1][0], rtol=0, atol=2e-5)
        for i in plain.layers:
            for kv, other in zip(outs[0][1][i], outs[1][1][i], strict=True):
                torch.testing.assert_close(kv, other, rtol=0, atol=2e-5)


@torch.no_grad()
def test_rotations_count_from_the_first_latent_seen():
    from longvid.models.compiled import COMPILED

    torch.manual_seed(0)
    own, before = (KV(*torch.randn(2, 1, length, 4, 3, 16)) for length in (2, 3))
    query, turn = torch.randn(1, 2, 4, 3, 16), rotation(5, 2, 2, 16, torch.device("cpu"))
    sight = Sight(0, 2, 0, before=(before,))
    found, wanted = look(query, own, sight, turn, by=COMPILED.rotate), look(query, own, sight, turn)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    one = look(query.bfloat16(), KV(*(x.bfloat16() for x in own)), Sight(0, 2, 0), turn, by=COMPILED.rotate)
    assert one.dtype == torch.bfloat16
