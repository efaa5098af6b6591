"""Each part of the embedded model's recipe, a few steps of it, on shapes as small as they go."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from longvid import worlds
from longvid.models.dit import DiT
from longvid.models.vae import VAE, VAEConfig
from pipelines import film_latents, train_dit, train_vae
from pipelines.film_latents import RUN, SINK, FilmLatents, encode_film, film_at, make_latents
from pipelines.optimise import LoopConfig
from pipelines.train_dit import TINY_DIT, DiTTraining, dit_loss, draw_layout, first_block_layout
from pipelines.train_text import caption_batch
from pipelines.train_vae import TINY_VAE, VAETraining, film_crops, vae_loss


def loop(tmp_path, **changes) -> LoopConfig:
    return LoopConfig(out=tmp_path, **{"num_steps": 2, "batch_size": 2, "learning_rate": 1e-3, **changes})


def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig.from_dict({**TINY_VAE, "base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1]})).eval()


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


def test_films_are_stored_once_and_sampled_as_sink_and_run(tmp_path, monkeypatch):
    monkeypatch.setattr(film_latents, "FURTHEST", 12)
    vae = small_vae()
    counts = list(make_latents(tmp_path, vae, 0, 4, shard=2))
    assert counts == [2, 4]
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    list(make_latents(tmp_path, vae, 0, 4, shard=2))
    assert stamps == [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())], "shards that are there are kept"
    films = FilmLatents(tmp_path, 0)
    assert films.latents.shape == (4, 16, SINK + RUN, 8, 8)
    clips, captions = films.sample(np.random.default_rng(0), 3, 6)
    assert clips.shape == (3, 16, SINK + 6, 8, 8) and len(captions) == 3
    assert any(torch.equal(clips[0, :, :SINK], film[:, :SINK].float()) for film in films.latents)


def test_a_run_that_follows_directly_is_one_encoding_of_the_film():
    vae = small_vae()
    film = film_at(0, 0)
    frames = worlds.draw(film.world, 4 * (SINK + RUN - 1) + 1)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(video)[0][0]
    assert film.start == SINK
    torch.testing.assert_close(encode_film(vae, film), expected)


def test_no_latents_is_an_error_that_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match="longvid train latents"):
        FilmLatents(tmp_path, 0)


def test_layouts_are_those_of_inference():
    config = DiTTraining(loop=LoopConfig(out=".", num_steps=1, batch_size=3, learning_rate=1e-3))
    joint, images = 0, 0
    for seed in range(300):
        layout = draw_layout(np.random.default_rng(seed), config, 4)
        assert sum(layout.sizes) == SINK + config.run and layout.sizes[0] in (1, SINK)
        assert layout.levels.shape == (3, SINK + config.run)
        borders = np.cumsum((0, *layout.sizes))
        for start, stop in zip(borders, borders[1:], strict=False):
            assert (layout.levels[:, start:stop] == layout.levels[:, start : start + 1]).all(), "a level per block"
        joint += layout.mask is None
        images += layout.sizes[0] == 1
    assert 0.1 < joint / 300 < 0.3 and 0.08 < images / 300 < 0.25


def test_first_blocks_alone_have_a_level_each(tmp_path):
    config = DiTTraining(loop=loop(tmp_path))
    layout = first_block_layout(np.random.default_rng(0), config, 7)
    assert layout.sizes == (SINK,) and layout.mask is None and layout.levels.shape == (7, SINK)
    assert (layout.levels == layout.levels[:, :1]).all() and len(layout.levels[:, 0].unique()) == 7


def test_dit_loss_counts_noisy_latents_only_and_reaches_every_parameter():
    torch.manual_seed(0)
    dit = DiT(replace(TINY_DIT, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=2, text_dim=8))
    config = DiTTraining(loop=LoopConfig(out=".", num_steps=1, batch_size=2, learning_rate=1e-3))
    layout = draw_layout(np.random.default_rng(3), config, 4)
    clean, text = torch.randn(2, 16, SINK + config.run, 4, 4), torch.randn(2, 5, 8)
    loss = dit_loss(dit, clean, text, layout, torch.randn_like(clean))["loss"]
    loss.backward()
    missing = [name for name, p in dit.named_parameters() if p.grad is None]
    assert not missing
    still = replace(layout, levels=torch.zeros_like(layout.levels))
    assert dit_loss(dit, clean, text, still, torch.randn_like(clean))["loss"] == 0
    train_dit._start_at_zero(dit)
    with torch.no_grad():
        velocity, _ = dit(clean, 1000 * layout.levels, dit.text_features(text))
    assert (velocity == 0).all()


def test_captions_and_labels_agree():
    captions, labels = caption_batch(np.random.default_rng(0), 8)
    assert len(captions) == 8 and set(labels) == set(worlds.ATTRIBUTES)
    for i, caption in enumerate(captions):
        assert worlds.ATTRIBUTES["colour_1"][labels["colour_1"][i]] in caption.lower()
