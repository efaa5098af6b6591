"""The training loop: it learns, a cut run goes on as if it had not been cut, and it never trains over a checkpoint."""

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.optimise import LoopConfig, optimise
from pipelines.optimizers import Optimizers, warmed_cosine
from pipelines.train import check_new


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 6, 2), nn.Flatten(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def losses_of(net: nn.Module):
    def loss_at(step: int) -> dict:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 2, 2, 2, 2, generator=generator)
        return {"loss": (net(x)[:, 0] - x.sum((1, 2, 3, 4)).tanh()).square().mean()}

    return loss_at


def config(out, **changes) -> LoopConfig:
    values = {"num_steps": 40, "batch_size": 16, "learning_rate": 0.02, "warmup_steps": 5, "log_every": 1}
    return LoopConfig(out=out, **{**values, "save_every": 15, **changes})


def test_every_parameter_has_exactly_one_optimizer_and_muon_moves_the_module_itself(tmp_path):
    net = model()
    optimizers = Optimizers(net, config(tmp_path))
    owned = [p for group in optimizers.adamw.param_groups for p in group["params"]] + optimizers.matrices
    assert sorted(map(id, owned)) == sorted(map(id, net.parameters()))
    before = net[0].weight.clone()
    losses_of(net)(0)["loss"].backward()
    optimizers.step(1.0)
    assert not torch.equal(net[0].weight, before)


def test_it_learns(tmp_path):
    net = model()
    records = list(optimise(net, losses_of(net), config(tmp_path, num_steps=150)))
    assert np.mean([r["loss"] for r in records[-10:]]) < 0.3 * np.mean([r["loss"] for r in records[:10]])


def test_a_cut_run_resumed_is_the_uncut_run(tmp_path):
    uncut_net = model()
    uncut = list(optimise(uncut_net, losses_of(uncut_net), config(tmp_path / "a")))
    net = model()
    for record in optimise(net, losses_of(net), config(tmp_path / "b")):
        if record["step"] == 33:
            break
    net = model()
    resumed = list(optimise(net, losses_of(net), config(tmp_path / "b"), resume=True))
    assert [r["step"] for r in resumed] == list(range(31, 41))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in uncut[30:]]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), uncut_net.parameters(), strict=True))


def test_resuming_with_another_configuration_says_what_differs(tmp_path):
    net = model()
    list(optimise(net, losses_of(net), config(tmp_path)))
    with pytest.raises(ValueError, match="learning_rate"):
        list(optimise(net, losses_of(net), config(tmp_path, learning_rate=0.01), resume=True))
    with pytest.raises(ValueError, match="--resume"):
        check_new(tmp_path, resume=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    net = model()
    good = losses_of(net)
    with pytest.raises(FloatingPointError, match="step 20"):
        list(optimise(net, lambda step: good(step) if step < 20 else {"loss": good(step)["loss"] * torch.nan},
                      config(tmp_path)))  # fmt: skip
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 15


def test_warm_up_then_cosine():
    loop = config("unused", num_steps=105)
    shares = [warmed_cosine(step, loop) for step in range(105)]
    assert shares[4] == 1.0 and shares[0] == 0.2
    assert (np.diff(shares[5:]) < 0).all() and 0.02 <= shares[-1] < 0.03
