"""Training as one CUDA graph: its parts against torch's and the films' own, on a CPU."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from longvid.captions import caption
from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from longvid.models.text import TextEncoder
from longvid.worlds import draw
from pipelines import draw_films
from pipelines.configure import BASE
from pipelines.draw_films import draw_and_encode, draw_anywhere
from pipelines.film_latents import BLOCK, LONG, OPENINGS, PICTURES, SINK, encode_film, film_at
from pipelines.graph_training import GraphTraining, StackedMuon
from pipelines.optimise import LoopConfig
from pipelines.resident_films import ResidentFilms, StepSizes, bias, read, recalled, step_loss
from pipelines.train_dit import CLEAN, DiTTraining, Teacher, prepare, velocity_of


def test_stacked_muon_is_torchs():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (24, 16), (8, 40), (6, 4, 3, 3))]
    theirs = [nn.Parameter(p.detach().clone().flatten(1)) for p in ours]
    before = [p.detach().clone() for p in ours]
    stacked = StackedMuon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1).clone()
        stacked.step(torch.tensor(0.02))
        reference.step()
    for a, b, old in zip(ours, theirs, before, strict=True):
        moved = (a.detach() - old).norm()
        assert moved > 0.1 and (a.detach().flatten(1) - b.detach()).norm() < 0.05 * moved  # products are in bfloat16


def test_the_model_and_its_follower_get_the_averages():
    torch.manual_seed(0)
    model, follower, x = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), torch.randn(64, 4)
    training = GraphTraining(model, lambda: (model(x) - 2 * x).square().mean(), learning_rate=0.05, ema_decay=0.5,
                             follower=follower)  # fmt: skip
    records = list(training.run(1.0))
    assert records[-1]["step"] == records[-1]["of"] and records[-1]["loss"] < 0.1 * records[0]["loss"]
    assert torch.equal(follower.weight, training.averages[0]) and not torch.equal(follower.weight, model.weight)
    training.put_averages()
    assert torch.equal(follower.weight, model.weight)


def test_gradients_agree_with_plain_ones_for_the_same_randomness():
    torch.manual_seed(0)
    model, signs = nn.Linear(4, 4), []

    def loss():
        return (model(torch.randn(64, 4)) - 1).square().mean() * (signs.pop() if signs else 1)

    training = GraphTraining(model, loss, learning_rate=0.05, ema_decay=0.5)
    assert training.agreement() == pytest.approx(1, abs=1e-6) and all(p.grad is None for p in model.parameters())
    signs += [1, -1]
    assert training.agreement() == pytest.approx(-1, abs=1e-6)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="for a GPU")
@pytest.mark.parametrize("kind", ("pictures", "openings", "long"))
def test_gradients_on_a_gpu_are_the_plain_ones(kind, sets, encoder, tmp_path):
    """Of as many films as a step of the training in scripts/train_on_gpu.py has, since kernels depend on shapes."""
    loop = LoopConfig(out=tmp_path, num_steps=1, batch_size=1, learning_rate=1e-3)
    config = DiTTraining(loop=loop, fps=16, device="cuda", compile=True)
    dit, frozen = (
        load_dit(open_folder(BASE), torch.float32, "cuda").requires_grad_(wanted) for wanted in (True, False)
    )
    for model in (dit, frozen):
        prepare(model, config)
    on_gpu = TextEncoder.load(BASE, torch.float32, "cuda")
    films = ResidentFilms({kind: sets[kind]}, on_gpu, config, StepSizes())
    for teacher in (None, Teacher(dit=frozen, no_text=films.no_text, scale=3.0)):
        training = GraphTraining(
            dit, partial(step_loss, dit, films, frozen, teacher), learning_rate=1e-3, ema_decay=0.9
        )
        assert training.agreement() > 0.98


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.load(BASE, torch.float32)


@pytest.fixture(scope="module")
def sets():
    """Few films of each kind, two at a time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(draw_films, "AT_ONCE", 2)
        vae = load_vae(open_folder(BASE), torch.float32)
        counts = {PICTURES: 8, OPENINGS: 4, LONG: 4}
        return dict(draw_and_encode(vae, counts, seed=5, workers=1, seconds=1000))


def test_films_are_those_of_their_addresses(sets):
    vae = load_vae(open_folder(BASE), torch.float32)
    assert [len(sets[name]["latents"]) for name in ("pictures", "openings", "long")] == [8, 4, 4]
    assert sets["long"]["is_cut"].tolist() == [False, False, True, True]
    for name, films, place, index in (("pictures", PICTURES, 1, 2), ("long", LONG, 0, 0), ("long", LONG, 2, 1)):
        film = film_at(5, films.first + index)
        wanted, found = encode_film(vae, film, films.num_latents), sets[name]["latents"][place].float()
        assert (found - wanted).square().mean() < 1e-3 * wanted.square().mean()  # bfloat16
        rng = np.random.default_rng((5, films.first + index, 1))
        assert sets[name]["captions"][place] == [caption(film.world, rng) for _ in range(4)]


def test_none_is_begun_after_the_time():
    vae = load_vae(open_folder(BASE), torch.float32)
    with pytest.raises(ValueError, match="no time.*pictures"):
        dict(draw_and_encode(vae, {PICTURES: 64}, seed=5, workers=1, seconds=0))


def test_films_for_the_decoder_differ_and_repeat(monkeypatch):
    monkeypatch.setattr(draw_films, "AT_ONCE", 2)
    first, again = (draw_anywhere(3, 5, seed=1, workers=2).copy() for _ in range(2))
    assert first.shape == (4, 5, 128, 128, 3) and (first == again).all()
    assert all((first[i] != first[j]).any() for i in range(4) for j in range(i))
    assert (first[0][0] != draw(film_at(5, 0).world, 1)[0]).any()


def test_text_is_read_as_the_encoder_reads_it(encoder):
    texts = ["a red ball bounces", "Zwei Bälle", "x" * 300, ""]
    found, wanted = read(encoder, texts).float(), encoder(*texts)
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert torch.equal((found == 0).all(-1), (wanted == 0).all(-1))


@pytest.fixture(scope="module")
def films(sets, encoder, tmp_path_factory):
    torch.manual_seed(0)
    loop = LoopConfig(out=tmp_path_factory.mktemp("loop"), num_steps=1, batch_size=1, learning_rate=1e-3)
    config = DiTTraining(loop=loop, fps=16, drop_text=0.5)
    sizes = StepSizes(pictures=2, openings=2, causal=3, joint=1, recalled_share=0.5)
    return ResidentFilms(sets, encoder, config, sizes)


def test_batches_are_as_the_host_would_make_them(films, sets):
    torch.manual_seed(1)
    batch, states = films.pictures()
    assert batch.clean.shape == (8, 8, 1, 16, 16) and len(states) == 2 and batch.mask is None
    assert (batch.levels.view(2, 4).diff() > 0).all() and torch.equal(batch.counts, batch.levels > CLEAN)
    assert torch.equal(batch.clean[0], batch.clean[3])
    batch, states = films.openings()
    assert batch.clean.shape == (2, 8, 4, 16, 16) and batch.levels.shape == (2, 4)
    assert (batch.levels[:, 1:] == batch.levels[:, 1:2]).all()
    batch, states = films.clips()
    assert batch.clean.shape == (4, 8, 10, 16, 16) and batch.mask.shape == (4, 1, 640, 640)
    first = sets["long"]["latents"][:, :, :SINK].float()
    which = [next(i for i in range(4) if torch.equal(clip[:, :SINK], first[i])) for clip in batch.clean]
    for clip, film, counts, levels in zip(batch.clean, which, batch.counts, batch.levels, strict=True):
        whole = sets["long"]["latents"][film].float()
        offset = next(o for o in range(7) if torch.equal(clip[:, SINK:], whole[:, SINK + o : SINK + o + 9]))
        has_gap = offset > 0 or film >= 2
        assert torch.equal(counts[SINK + BLOCK :], (levels > CLEAN)[SINK + BLOCK :])
        assert not has_gap or not counts[: SINK + BLOCK].any()
    dropped = [torch.equal(found, films.no_text[0]) for found in torch.cat([films.clips()[1] for _ in range(16)])]
    assert 16 < sum(dropped) < 48


def test_a_share_of_the_clips_loses_its_text(films):
    torch.manual_seed(4)
    states = films.clips()[1]
    assert torch.equal(films.without_some(states, 0.0), states)
    assert torch.equal(films.without_some(states, 1.0), films.no_text.expand_as(states))


def test_the_bias_hides_what_the_mask_hides(films):
    dit = load_dit(open_folder(BASE), torch.float32)
    mask = torch.tensor([[True, False], [True, True]])
    x, t = torch.randn(1, 8, 2, 16, 16), torch.tensor([[300.0, 700.0]])
    with torch.no_grad():
        text = dit.text_features(films.no_text.float())
        assert torch.allclose(dit(x, t, text, mask=bias(mask).float())[0], dit(x, t, text, mask=mask)[0], atol=1e-5)


def test_context_alone_is_recalled(films):
    torch.manual_seed(2)
    dit = load_dit(open_folder(BASE), torch.float32).requires_grad_(False)
    batch, states = next(drawn for _ in range(99) if (drawn := films.clips())[0].levels.min() <= CLEAN)
    found = recalled(batch, states, dit, films.config, share=1.0)
    is_context = (batch.levels <= CLEAN)[:, None, :, None, None].expand_as(batch.clean)
    assert is_context.any() and torch.equal(found.clean[~is_context], batch.clean[~is_context])
    error = (found.clean - batch.clean)[is_context].square().mean()
    assert 0 < error < 0.5 * batch.clean.square().mean()  # the model knows what its context shows
    assert torch.equal(recalled(batch, states, dit, films.config, share=0.0).clean, batch.clean)


def test_a_step_trains_on_all_three_kinds_and_on_the_teacher(films):
    torch.manual_seed(3)
    dit, frozen = (load_dit(open_folder(BASE), torch.float32).requires_grad_(wanted) for wanted in (True, False))
    loss = step_loss(dit, films, frozen, None)
    loss.backward()
    assert 0.05 < loss < 1 and all(p.grad is not None for p in dit.parameters() if p.requires_grad)
    teacher = Teacher(dit=frozen, no_text=films.no_text, scale=1.0)
    assert step_loss(dit, films, frozen, teacher).item() < 1e-3  # at scale 1 the teacher says what the model says
    guided = Teacher(dit=frozen, no_text=films.no_text, scale=3.0)
    assert step_loss(dit, films, frozen, guided).item() > 0.02
    batch, states = films.openings()
    assert not guided(batch, batch.clean, states, dtype="bfloat16", fps=16).requires_grad
    assert velocity_of(dit, batch, batch.clean, states, dtype="bfloat16", fps=16).requires_grad
