"""Each part of the embedded model's recipe, a few steps of it, on shapes as small as they go."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from longvid import worlds
from longvid.flow import add_noise
from longvid.models.dit import DiT
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from pipelines import film_latents, train_dit, train_vae
from pipelines.film_latents import (
    BLOCK,
    CLIP,
    FILM_SETS,
    LONG,
    OPENINGS,
    PICTURES,
    RUN,
    SINK,
    FilmLatents,
    encode_film,
    encode_films,
    film_at,
)
from pipelines.film_latents import make_latents as make
from pipelines.objective import Objective, combined_loss
from pipelines.optimise import LoopConfig
from pipelines.optimizers import Part
from pipelines.train_decoder import DecoderTraining, train_decoder
from pipelines.train_dit import (
    CLEAN,
    COPIES,
    TINY_DIT,
    DiTTraining,
    Teacher,
    draw_batch,
    errors_of,
    latent_errors,
    long_batch,
)
from pipelines.train_text import caption_batch
from pipelines.train_vae import TINY_VAE, VAETraining, film_crops, vae_loss


def loop(tmp_path, **changes) -> LoopConfig:
    return LoopConfig(out=tmp_path, **{"num_steps": 2, "batch_size": 2, "learning_rate": 1e-3, **changes})


def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig.from_dict({**TINY_VAE, "base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1]})).eval()


def test_crops_are_a_function_of_their_address():
    first = film_crops(np.random.default_rng((0, 5)), 2, 5, 48)
    assert first.shape == (2, 3, 5, 48, 48) and first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, film_crops(np.random.default_rng((0, 5)), 2, 5, 48))


def test_vae_loss_has_gradients_everywhere_and_statistics_normalise(tmp_path):
    vae = small_vae()
    video = film_crops(np.random.default_rng(0), 1, 9, 32)
    losses = vae_loss(vae, video, VAETraining(loop=loop(tmp_path)), torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    measured = train_vae.with_statistics(vae, np.random.default_rng(0), num_films=3)
    z = torch.cat([measured.encode(film_crops(np.random.default_rng(i), 1, 9, 128))[0] for i in range(3)])
    assert z.detach().std() == pytest.approx(1, abs=0.4)


def test_a_decoder_trained_on_goes_on_in_midstream_and_its_encoder_stays(tmp_path):
    vae, before = small_vae(), small_vae()
    z = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    _, state = vae.decode(z[:, :, :1])
    torch.testing.assert_close(vae.reconstruct(vae.denormalised(z[:, :, 1:]), state).detach(),
                               vae.reconstruct(vae.denormalised(z)).detach()[:, :, 1:])  # fmt: skip
    config = DecoderTraining(loop=loop(tmp_path, batch_size=1), num_latents=2, pasts=(1,))
    *records, last = train_decoder(vae, config)
    assert records and all(np.isfinite(record["loss"]) for record in records)
    weights = last["decoder"].state_dict()
    for name, value in before.state_dict().items():
        is_decoders = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(value, weights[name]) != is_decoders, name


def test_films_are_stored_once_and_sampled_as_sink_and_run(tmp_path, monkeypatch):
    monkeypatch.setattr(film_latents, "FURTHEST", 12)
    vae = small_vae()
    assert list(make(tmp_path, vae, 0, LONG, 4, shard=2)) == [2, 4]
    stamps = [p.stat().st_mtime_ns for p in sorted((tmp_path / LONG.name).iterdir())]
    list(make(tmp_path, vae, 0, LONG, 4, shard=2))
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / LONG.name).iterdir())]
    assert stamps == kept, "shards that are there are kept"
    films = FilmLatents(tmp_path, LONG)
    assert films.latents.shape == (4, 8, SINK + RUN, 16, 16)
    clips, captions, has_gap = films.sample_runs(np.random.default_rng(0), 40)
    assert clips.shape == (40, 8, SINK + CLIP, 16, 16) and len(captions) == 40
    whole = [films.latents[i, :, : SINK + CLIP].float() for i, film in enumerate(films.films) if film.start == SINK]
    for clip, gap in zip(clips, has_gap, strict=True):
        assert any(torch.equal(clip[:, :SINK], film[:, :SINK].float()) for film in films.latents)
        assert gap != any(torch.equal(clip, film) for film in whole)
    assert 5 < has_gap.sum() < 38


def test_no_two_sets_share_a_film():
    ranges = sorted((films.first, films.first + films.num_films) for films in FILM_SETS)
    assert all(stop <= start for (_, stop), (start, _) in zip(ranges, ranges[1:], strict=False))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("num_latents", [1, 4, SINK + RUN])
def test_what_begins_a_film_is_one_encoding_of_it(index, num_latents):
    vae, film = small_vae(), film_at(0, index)
    follows = num_latents if index == 0 or num_latents <= SINK + BLOCK else SINK
    frames = worlds.draw(film.world, 4 * (follows - 1) + 1)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(video)[0][0]
    made = encode_film(vae, film, num_latents)
    assert made.shape[1] == num_latents and (film.start == SINK) == (index == 0)
    torch.testing.assert_close(made[:, :follows], expected)


@pytest.mark.parametrize("num_latents", [1, 6])
def test_films_encoded_together_are_those_encoded_one_by_one(monkeypatch, num_latents):
    """But for bfloat16 products."""
    monkeypatch.setattr(film_latents, "FURTHEST", 12)
    vae, films = small_vae(), [film_at(0, i) for i in range(5)]
    together = encode_films(vae, films, num_latents)
    for film, latents in zip(films, together, strict=True):
        one = encode_film(vae, film, num_latents)
        assert (one - latents).square().mean() < 1e-3 * one.square().mean()


def test_parts_of_a_batch_of_films_add_up(tmp_path):
    """But for the deviation that noise is scaled by, which is each part's own."""
    vae, config = small_vae(), VAETraining(loop=loop(tmp_path), dtype="float32")
    video = film_crops(np.random.default_rng(0), 4, 5, 32)
    losses = lambda part: vae_loss(vae, part.of(video), config, torch.Generator().manual_seed(0), part)  # noqa: E731
    whole = losses(Part())
    halves = [losses(Part(index=i, count=2)) for i in range(2)]
    for name, value in whole.items():
        assert sum(half[name] for half in halves).item() == pytest.approx(value.item(), rel=0.05)


def test_no_latents_is_an_error_that_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match=f"longvid train latents --out {tmp_path}"):
        FilmLatents(tmp_path / "latents", PICTURES)


class RandomFilms(FilmLatents):
    """A set of random latents, 4 x 4 tokens of 2 x 2 each."""

    def __init__(self, films):
        self.latents = torch.randn(6, 8, films.num_latents, 4, 4, generator=torch.Generator().manual_seed(1))
        self.films = [film_at(0, i) for i in range(6)]


SETS = {films.name: RandomFilms(films) for films in FILM_SETS}


def training(**shares) -> DiTTraining:
    return DiTTraining(loop=LoopConfig(out=".", num_steps=1, batch_size=3, learning_rate=1e-3), **shares)


def test_pictures_are_seen_at_every_level_each_by_itself():
    config = training(picture_share=(1.0, 0.0))
    batch = draw_batch(np.random.default_rng(0), config, SETS, 0.0)
    assert batch.clean.shape == (12 * COPIES, 8, 1, 4, 4) and len(batch.captions) == 12 and batch.mask is None
    levels = batch.levels.view(12, COPIES)
    assert all(torch.equal(batch.clean[0], copy) for copy in batch.clean[:COPIES])
    assert (levels.diff(dim=1) > 0).all() and levels.min() < 0.3 and levels.max() > 0.9


def test_openings_are_a_first_latent_and_the_next_block():
    config = training(picture_share=(1.0, 0.0), opening_share=1.0)
    batch = draw_batch(np.random.default_rng(0), config, SETS, 1.0)
    assert batch.clean.shape[:3] == (12, 8, OPENINGS.num_latents) == (12, 8, 4)
    assert batch.mask.tolist() == [[True, False, False, False]] + [[True] * 4] * 3
    assert (batch.levels[:, 1:] == batch.levels[:, 1:2]).all()
    assert (batch.levels[:, 0] <= CLEAN).any() and (batch.levels[:, 0] > CLEAN).any()


def test_long_batches_are_those_of_inference():
    config = training()
    joint, gaps = 0, 0
    for seed in range(200):
        batch = long_batch(np.random.default_rng(seed), config, SETS[LONG.name])
        assert batch.levels.shape == batch.counts.shape == (3, SINK + CLIP)
        blocks = batch.levels[:, SINK:].view(3, -1, BLOCK)
        assert (blocks == blocks[..., :1]).all(), "a level per block"
        after_gap = ~batch.counts[:, : SINK + BLOCK].any(1) & (batch.levels[:, :SINK] > CLEAN).all(1)
        gaps += after_gap.sum().item()
        assert not batch.counts[batch.levels <= CLEAN].any()
        assert torch.equal(batch.counts[:, SINK + BLOCK :], batch.levels[:, SINK + BLOCK :] > CLEAN)
        joint += batch.mask is None
    assert 0.07 < joint / 200 < 0.25 and gaps > 20


def test_shares_decide_what_is_drawn_and_pictures_grow_fewer():
    rng, config = np.random.default_rng(0), training()
    counts = []
    for progress in (0.0, 0.5, 1.0):
        lengths = [draw_batch(rng, config, SETS, progress).clean.shape[2] for _ in range(200)]
        counts.append([lengths.count(n) for n in (1, SINK + BLOCK, SINK + CLIP)])
        assert sum(counts[-1]) == 200
    assert counts[0] == [200, 0, 0] and 100 < counts[1][0] < 140 and 22 < counts[2][0] < 60
    assert 58 < counts[2][1] < 102


def test_the_loss_counts_noisy_latents_only_and_reaches_every_parameter():
    torch.manual_seed(0)
    dit = DiT(replace(TINY_DIT, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=2, text_dim=8))
    batch = long_batch(np.random.default_rng(3), training(), SETS[LONG.name])
    text, noise = torch.randn(3, 5, 8), torch.randn(batch.clean.shape)
    plain = lambda batch: combined_loss(  # noqa: E731
        Objective(), dit, latent_errors(dit, batch, text, noise, torch.ones(8)), (), np.random.default_rng(0)
    )
    loss = plain(batch)["loss"]
    loss.backward()
    missing = [name for name, p in dit.named_parameters() if p.grad is None]
    assert not missing
    still = replace(batch, counts=torch.zeros_like(batch.counts))
    assert plain(still)["loss"] == 0
    train_dit._start_at_zero(dit)
    with torch.no_grad():
        velocity, _ = dit(batch.clean, 1000 * batch.levels, dit.text_features(text))
    assert (velocity == 0).all()
    errors = latent_errors(dit, batch, text, noise, torch.ones(8))[0]
    everywhere_alike = (noise - batch.clean).square().mean((1, 3, 4))
    assert torch.allclose(errors, everywhere_alike), "a weight by what is shown would move what the model expects there"


def test_what_guidance_adds_is_what_there_is_to_learn():
    """At scale 3 the model begins 2 (v_cond - v_uncond) away from its own guided velocity, at scale 1 at it."""
    torch.manual_seed(0)
    dit = DiT(replace(TINY_DIT, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=2, text_dim=8))
    batch = long_batch(np.random.default_rng(3), training(), SETS[LONG.name])
    noise = torch.randn(batch.clean.shape)
    states = {"": torch.zeros(1, 5, 8), "a": torch.randn(1, 5, 8)}
    text = lambda *captions: torch.cat([states[caption] for caption in captions])  # noqa: E731
    batch = replace(batch, captions=["a"] * len(batch.clean))
    found, config = {}, training(dtype="float32")
    with torch.no_grad():
        for scale in (1.0, 3.0):
            teacher = Teacher(dit=dit, no_text=text(""), scale=scale)
            found[scale] = errors_of(dit, config, batch, noise, text, torch.ones(8), teacher)[0]
        noisy = add_noise(batch.clean, noise, batch.levels)
        with_text, without = (dit(noisy, 1000 * batch.levels, dit.text_features(text(*[caption] * len(noisy))),
                                  mask=batch.mask, keep=False)[0] for caption in ("a", ""))  # fmt: skip
    assert found[1.0].max() < 1e-10
    torch.testing.assert_close(found[3.0], 4 * (with_text - without).square().mean((1, 3, 4)), rtol=1e-4, atol=1e-8)


def test_one_forward_learns_what_the_model_says_with_guidance(tmp_path):
    """From where it begins, and a resumed run has the same teacher."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "text_dim": 8}
    texts = lambda *captions: torch.stack([(1.0 + len(c)) / 50 * torch.ones(5, 8) for c in captions])  # noqa: E731

    def records(out, **how):
        torch.manual_seed(0)
        dit = DiT(replace(TINY_DIT, **small))
        config = DiTTraining(loop=loop(out, num_steps=12, log_every=1, save_every=6, warmup_steps=0, ema_decay=0.0),
                             teacher_guidance=8.0, picture_share=(1.0, 1.0), dtype="float32")  # fmt: skip
        return train_dit.train_dit(config, SETS, texts, dit=dit, **how)

    losses = [r["loss"] for r in records(tmp_path / "whole") if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    cut = records(tmp_path / "cut")
    for _ in range(7):
        next(cut)
    cut.close()
    assert [r["loss"] for r in records(tmp_path / "cut", resume=True) if "loss" in r] == losses[6:]


def test_captions_and_labels_agree():
    captions, labels = caption_batch(np.random.default_rng(0), 8)
    assert len(captions) == 8 and set(labels) == set(worlds.ATTRIBUTES)
    for i, caption in enumerate(captions):
        assert worlds.ATTRIBUTES["colour_1"][labels["colour_1"][i]] in caption.lower()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_compiled_training_is_training(tmp_path, monkeypatch):
    """The same losses, step by step, and weights that load without compiling."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "text_dim": 8}
    monkeypatch.setattr(train_dit, "TINY_DIT", replace(TINY_DIT, **small))
    texts = lambda *captions: torch.randn(len(captions), 5, 8, generator=torch.Generator().manual_seed(2))  # noqa: E731
    losses = []
    for compiled in (False, True):
        config = DiTTraining(
            loop=loop(tmp_path / str(compiled), log_every=1), picture_share=(1.0, 1.0), compile=compiled
        )
        *records, last = train_dit.train_dit(config, SETS, texts)
        losses.append([record["loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and len(losses[0]) == 2
    DiT(train_dit.TINY_DIT).load_state_dict(last["dit"].state_dict())
