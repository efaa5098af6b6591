"""The training step follows its objective: what is combined, what is learned, what is kept, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from longvid.intervals import IntervalCost
from longvid.levels import LevelSampler
from longvid.models.dit import DiT
from longvid.multitask import Multitask, interval_losses, nash_weights
from longvid.weighting import LossWeighting, min_snr_weight
from pipelines import train, train_dit
from pipelines.film_latents import FILM_SETS, LONG, OPENINGS, FilmLatents, film_at
from pipelines.flags import parser
from pipelines.objective import Objective, WithUncertainty, combined_loss, task_gradients
from pipelines.optimise import LoopConfig
from pipelines.train import dit_options
from pipelines.train_dit import CLEAN, TINY_DIT, DiTTraining, latent_errors, long_batch, opening_batch

EDGES = (0.2, 0.4, 0.6)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "text_dim": 8}


class RandomFilms(FilmLatents):
    def __init__(self, films):
        self.latents = torch.randn(6, 8, films.num_latents, 4, 4, generator=torch.Generator().manual_seed(1))
        self.films = [film_at(0, i) for i in range(6)]


SETS = {films.name: RandomFilms(films) for films in FILM_SETS}


def texts(*captions):
    return torch.randn(len(captions), 5, 8, generator=torch.Generator().manual_seed(2))


def training(out=".", num_steps=1, objective=None, **options) -> DiTTraining:
    loop = LoopConfig(out=out, num_steps=num_steps, batch_size=3, learning_rate=1e-3, log_every=1, save_every=2)
    return DiTTraining(loop=loop, objective=objective or Objective(), **options)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(train_dit, "TINY_DIT", replace(TINY_DIT, **SMALL))
    monkeypatch.setattr(train_dit, "MEASURED_BATCHES", 1)


@pytest.fixture
def problem():
    """A model of few parameters, and its errors, counts and levels: every latent another task of regression."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    x, y = torch.randn(4, 5, 6), torch.randn(4, 5)
    levels = torch.rand(4, 5)
    counts = torch.rand(4, 5) < 0.8
    return model, lambda: ((model(x)[..., 0] - y).square(), counts, levels)


def gradient_of(objective, model, errors, edges=EDGES):
    model.zero_grad()
    losses = combined_loss(objective, model, errors, edges, np.random.default_rng(0))
    losses["loss"].backward()
    return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_without_options_it_is_the_mean_over_latents_that_count(problem):
    model, errors_of = problem
    error, counts, levels = errors_of()
    plain = combined_loss(Objective(), model, (error, counts, levels), (), np.random.default_rng(0))
    torch.testing.assert_close(plain["loss"], error[counts].mean())
    weighting = Objective(loss_weighting=LossWeighting.MIN_SNR)
    weighted = combined_loss(weighting, model, (error, counts, levels), (), np.random.default_rng(0))
    torch.testing.assert_close(weighted["loss"], (error * min_snr_weight(levels))[counts].mean())


@pytest.mark.parametrize("is_absent", [False, True])
def test_a_nash_step_serves_every_interval_alike(problem, is_absent):
    """The gradient g fulfils g_i . g = 1 / a_i for each interval's own gradient g_i."""
    model, errors_of = problem
    error, counts, levels = errors_of()
    if is_absent:
        counts = counts & (levels > EDGES[0])
    losses, present = interval_losses(error, counts, levels, EDGES)
    own = task_gradients(model, losses, present)
    assert present.tolist() == [not is_absent, True, True, True] == own.any(1).tolist()
    found, combined = gradient_of(Objective(multitask=Multitask.NASH), model, (error, counts, levels))
    weights = torch.from_numpy(nash_weights((own @ own.T).double().numpy())).float()
    torch.testing.assert_close((own @ combined * weights)[present], torch.ones(int(present.sum())), atol=1e-3, rtol=0)
    torch.testing.assert_close(combined, weights @ own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["error"], error[counts].mean())


def test_a_pcgrad_step_takes_conflict_out_and_nothing_else():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[[1.0, 0.0], [-1.0, 1.0]]]), torch.tensor([[-0.5, -0.5]])
    errors = lambda: ((model(x)[..., 0] - y).square(), torch.ones(1, 2).bool(), torch.tensor([[0.1, 0.9]]))  # noqa: E731
    _, freed = gradient_of(Objective(multitask=Multitask.PCGRAD), model, errors(), (0.5,))
    torch.testing.assert_close(freed, torch.tensor([0.5, 1.5]))
    x[0, 1, 0] = 1.0
    _, agreed = gradient_of(Objective(multitask=Multitask.PCGRAD), model, errors(), (0.5,))
    torch.testing.assert_close(agreed, torch.tensor([2.0, 1.0]))


def test_a_step_of_uncertainty_weighting_learns_its_variances(problem):
    dit, errors_of = problem
    model = WithUncertainty(dit, 4)
    _, combined = gradient_of(Objective(multitask=Multitask.UNCERTAINTY), model, errors_of())
    losses, _ = interval_losses(*errors_of(), EDGES)
    torch.testing.assert_close(model.log_variances.grad, (1 - losses) / 2)
    assert len(combined) == 7 + 4


def test_no_interval_in_a_batch_trains_nothing(problem):
    model, errors_of = problem
    for multitask in (Multitask.PCGRAD, Multitask.NASH):
        error, counts, levels = errors_of()
        _, combined = gradient_of(Objective(multitask=multitask), model, (error, counts & False, levels))
        assert (combined == 0).all()


OBJECTIVES = [
    Objective(multitask=Multitask.UNCERTAINTY, loss_weighting=LossWeighting.MIN_SNR),
    Objective(multitask=Multitask.PCGRAD, num_intervals=3, interval_cost=IntervalCost.TIMESTEP),
    Objective(multitask=Multitask.NASH, num_intervals=3, interval_cost=IntervalCost.AFFINITY),
    Objective(immiscible=True, balance_first=True),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(objective.changes()))
def test_a_cut_run_goes_on_with_its_objective(tmp_path, small, objective):
    """What is learned and measured beside the model is kept; other options are refused."""
    run = lambda out, **k: train_dit.train_dit(training(tmp_path / out, 25, objective), SETS, texts, **k)  # noqa: E731
    *uncut, last = run("a")
    assert len(uncut) == 25 and all(np.isfinite(record["loss"]) for record in uncut)
    DiT(train_dit.TINY_DIT).load_state_dict(last["dit"].state_dict())
    cut = run("b")
    while next(cut)["step"] < 19:
        pass
    cut.close()
    *resumed, last_resumed = run("b", resume=True)
    assert [record["loss"] for record in resumed] == [record["loss"] for record in uncut[18:]]
    assert all(map(torch.equal, last["dit"].parameters(), last_resumed["dit"].parameters()))
    *plain, _ = train_dit.train_dit(training(tmp_path / "plain", 3), SETS, texts)
    assert [record["loss"] for record in plain] != [record["loss"] for record in uncut[:3]]
    with pytest.raises(ValueError, match="(multitask|immiscible).* differ"):
        next(train_dit.train_dit(training(tmp_path / "b", 25), SETS, texts, resume=True))
    with pytest.raises(ValueError, match=r"\(levels differ\)"):
        next(train_dit.train_dit(training(tmp_path / "b", 25, objective, levels=LevelSampler.IID), SETS, texts,
                                 resume=True))  # fmt: skip


def test_levels_are_drawn_by_the_sampler_that_is_named():
    for seed in range(30):
        sync = training(levels=LevelSampler.SYNC)
        for batch in (
            long_batch(np.random.default_rng(seed), sync, SETS[LONG.name]),
            opening_batch(np.random.default_rng(seed), sync, SETS[OPENINGS.name]),
        ):
            assert (batch.levels == batch.levels[:, :1]).all()
        fopp = long_batch(np.random.default_rng(seed), training(levels=LevelSampler.FOPP), SETS[LONG.name])
        assert (fopp.levels.diff(dim=1) >= 0).all()
    iid = long_batch(np.random.default_rng(0), training(levels=LevelSampler.IID, start_share=1.0), SETS[LONG.name])
    assert (iid.levels.diff(dim=1) < 0).any()
    found = dit_options({"levels": "fopp", "immiscible": True})
    assert found == {"levels": LevelSampler.FOPP, "objective": Objective(immiscible=True)}


def test_the_first_latents_weight_is_the_first_latents_alone():
    torch.manual_seed(0)
    dit = DiT(replace(TINY_DIT, **SMALL))
    batch = long_batch(np.random.default_rng(3), training(), SETS[LONG.name])
    text, noise = torch.randn(3, 5, 8), torch.randn(batch.clean.shape)
    with torch.no_grad():
        plain, doubled = (latent_errors(dit, batch, text, noise, w * torch.ones(8))[0] for w in (1, 2))
    torch.testing.assert_close(doubled[:, 0], 2 * plain[:, 0])
    assert torch.equal(doubled[:, 1:], plain[:, 1:])


def test_flags_offer_what_there_is():
    command = next(a for a in parser()._actions if a.dest == "command").choices["train"]
    offered = {action.dest: action.choices for action in command._actions}
    for name, kind in (("levels", LevelSampler), ("loss_weighting", LossWeighting), ("multitask", Multitask),
                       ("interval_cost", IntervalCost)):  # fmt: skip
        assert offered[name] == list(kind)


@pytest.mark.parametrize("words, said", [
    (("dit", "--levels", "rising"), "invalid choice: 'rising' (choose from"),
    (("dit", "--multitask", "uw", "--num-intervals", "1"), "num_intervals=1 must be between 2 and 20; try 5"),
    (("dit", "--num-intervals", "4"), "num_intervals=4 needs a way to combine intervals; add --multitask uw"),
    (("dit", "--interval-cost", "affinity"), "interval_cost=affinity needs a way"),
    (("vae", "--loss-weighting", "min-snr"), "loss_weighting is an option of the part dit, not of vae; leave it out"),
])  # fmt: skip
def test_options_that_cannot_be_met_are_refused(longvid, here, words, said):
    ran = longvid("train", *words, "--out", "checkpoints", model=None)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1
    assert not list(here.iterdir())


def test_the_command_trains_as_its_flags_say(longvid, here, small, monkeypatch):
    monkeypatch.setattr(train, "FilmLatents", lambda folder, films: SETS[films.name])
    monkeypatch.setattr(train, "load_text", lambda out: texts)
    monkeypatch.setattr(train, "TINY_DIT", train_dit.TINY_DIT)
    words = ("--levels", "fopp", "--loss-weighting", "min-snr", "--multitask", "nash", "--num-intervals", 3,
             "--interval-cost", "affinity", "--immiscible", "--balance-first")  # fmt: skip
    sizes = ("--steps", 2, "--batch-size", 3, "--out", "checkpoints")
    ran = longvid("train", "dit", *words, *sizes, model=None)
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["step"] == 2 and np.isfinite(record["loss"]) and np.isfinite(record["error"])
    assert len(json.loads((here / "checkpoints/dit/intervals.json").read_text())["edges"]) == 2
    assert train.load_dit(here / "checkpoints").config == train_dit.TINY_DIT
    state = torch.load(here / "checkpoints/dit/state.pt", weights_only=True)["config"]
    given = {"levels": "fopp", "loss_weighting": "min-snr", "multitask": "nash", "num_intervals": 3,
             "interval_cost": "affinity", "immiscible": True, "balance_first": True}  # fmt: skip
    assert given.items() <= state.items()
    ran = longvid("train", "dit", "--resume", *sizes, model=None)
    assert ran.code == 2 and "multitask" in ran.err and "levels" in ran.err and "differ" in ran.err


def test_intervals_lie_above_what_counts_as_clean():
    for cost in (IntervalCost.TIMESTEP, IntervalCost.LOG_SNR):
        objective = Objective(multitask=Multitask.NASH, interval_cost=cost)
        edges = train_dit.edges_at(0, 10, objective, CLEAN, None, None)
        assert len(edges) == 4 and edges[0] > CLEAN and edges[-1] < 1 and (np.diff(edges) > 0).all()


def test_affinity_is_measured_once_and_kept(tmp_path):
    objective, path = Objective(multitask=Multitask.NASH, interval_cost=IntervalCost.AFFINITY), tmp_path / "i.json"
    measured = iter([(0.1, 0.2, 0.3, 0.4)])
    at = lambda step: train_dit.edges_at(step, 40, objective, CLEAN, path, lambda: next(measured))  # noqa: E731
    before = train_dit.edges_at(0, 40, replace(objective, interval_cost=IntervalCost.LOG_SNR), CLEAN, path, None)
    assert at(0) == at(1) == before and not path.exists()
    assert at(2) == at(3) == at(39) == (0.1, 0.2, 0.3, 0.4)
    path.unlink()
    with pytest.raises(ValueError, match="measured at step 2, is missing"):
        at(3)
