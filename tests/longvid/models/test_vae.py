"""Our VAE is the reference VAE, and a stream of pieces is the whole video."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional as F

from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.models.vae_conv import conv3d_by_taps, conv3d_minimal, conv3d_plain, minimal_kernels, stacked_taps

TOLERANCE = 2e-5
PATCHED = dict(patch_size=2, in_channels=12, out_channels=12)
FOUR = dict(z_dim=4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 0.5, 1.0, 1.5])
SHAPES = {
    "plain": dict(base_dim=8, num_res_blocks=1),
    "patched": dict(base_dim=8, num_res_blocks=1, **FOUR, **PATCHED),
    "wan2.2": dict(base_dim=4, decoder_base_dim=8, is_residual=True, **FOUR, **PATCHED),
    "three sizes": dict(base_dim=6, decoder_base_dim=4, dim_mult=[1, 3, 2], temperal_downsample=[True, True], **FOUR),
    "early time": dict(base_dim=4, dim_mult=[1, 1, 1, 1], temperal_downsample=[True, True, False], **FOUR),
}


def make(name: str) -> VAE:
    """A VAE of random weights, none of which is 0 or 1."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(SHAPES[name]))
    with torch.no_grad():
        for key, parameter in vae.named_parameters():
            if key.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return vae


def reference(vae: VAE) -> AutoencoderKLWan:
    """The reference with the same weights; each state dict loads strictly into the other."""
    model = AutoencoderKLWan(**vae.config.to_dict()).eval()
    model.load_state_dict(vae.state_dict(), strict=True)
    vae.load_state_dict(model.state_dict(), strict=True)
    return model


def clip(vae: VAE, frames: int = 9, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    size = (rows * vae.config.spatial_factor, columns * vae.config.spatial_factor)
    return torch.rand(batch, 3, frames, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(vae: VAE, num: int, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    shape = (batch, vae.config.z_dim, num, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def statistics(vae: VAE) -> torch.Tensor:
    return torch.tensor([vae.config.latents_mean, vae.config.latents_std])[:, :, None, None, None]


def streamed(function, pieces) -> torch.Tensor:
    state, results = None, []
    for piece in pieces:
        result, state = function(piece, state)
        results.append(result)
    return torch.cat(results, 2)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_is_the_reference(name, batch):
    vae = make(name)
    x = latents(vae, 4, batch=batch)
    mean, std = statistics(vae)
    expected = reference(vae).decode(x * std + mean).sample
    video, _ = vae.decode(x)
    assert video.shape == expected.shape and video.shape[2] == 13
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(video, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(vae.reconstruct(x * std + mean).clamp(-1, 1), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_encode_is_the_reference(name):
    vae = make(name)
    video = clip(vae)
    expected = reference(vae).encode(video).latent_dist
    mean, std = statistics(vae)
    torch.testing.assert_close(vae.encode(video)[0] * std + mean, expected.mode(), rtol=0, atol=TOLERANCE)
    mu, log_variance = vae.moments(video)
    torch.testing.assert_close(mu, expected.mean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_decode_in_blocks_keeps_the_bits(name):
    vae = make(name)
    x = latents(vae, 11)
    whole, _ = vae.decode(x)
    for size in (1, 3, 5):
        assert torch.equal(streamed(vae.decode, x.split(size, 2)), whole), size


@pytest.mark.parametrize("name", SHAPES)
def test_encode_in_blocks_keeps_the_bits(name):
    vae = make(name)
    video = clip(vae, frames=17)
    whole, _ = vae.encode(video)
    assert torch.equal(streamed(vae.encode, video.split([5, 4, 8], 2)), whole)


def test_decoding_in_bfloat16_is_that_in_float32_but_for_rounding():
    """However it is cut, in pieces or latent by latent, and what it encodes keeps its bits."""
    vae, video = make("wan2.2"), clip(make("wan2.2"))
    x, encoded = latents(vae, 7), vae.encode(video)[0]
    exact, _ = vae.decode(x)
    vae.decoding_in(torch.bfloat16)
    rounded, state = vae.decode(x)
    assert rounded.dtype == torch.float32 and all(part.dtype == torch.bfloat16 for part in state.past)
    error = (rounded - exact).square().mean().sqrt()
    assert 1e-5 < error < 2e-2 * exact.std()
    for size in (1, 3):
        assert (streamed(vae.decode, x.split(size, 2)) - rounded).square().mean().sqrt() < error
    assert torch.equal(vae.encode(video)[0], encoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_front_and_a_back_are_the_whole_to_the_bit(name, dtype):
    """Also a back that holds nothing else, and what comes between has the shapes that are told beforehand."""
    vae, back = make(name).decoding_in(dtype), make(name).back_alone().decoding_in(dtype)
    assert set(back.state_dict()) < set(vae.state_dict())
    whole = start = end = None
    for latent in latents(vae, 11).split([1, 3, 7], 2):
        expected, whole = vae.decode(latent, whole)
        shapes, told = vae.features_of(tuple(latent.shape), is_start=start is None)
        features, states = zip(*vae.decode_front(latent, start), strict=True)
        start = states[-1]
        assert [tuple(piece.shape) for piece in features] == shapes and {piece.dtype for piece in features} == {told}
        assert back.features_of(tuple(latent.shape), is_start=end is None) == (shapes, told)
        video, end = back.decode_back(features, end)
        assert torch.equal(video, expected)
    assert len(whole.past) == len(start.past) + len(end.past)


def test_a_state_is_a_value():
    """The same state gives the same continuation twice, so a call has not changed it."""
    vae = make("plain")
    x = latents(vae, 3)
    _, state = vae.decode(x[:, :, :2])
    before = [part.clone() for part in state.past]
    first, second = vae.decode(x[:, :, 2:], state)[0], vae.decode(x[:, :, 2:], state)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, state.past, strict=True))
    assert max(part.shape[1] for part in state.past) == 2 and not any(part.requires_grad for part in state.past)


def test_new_weights_are_seen():
    vae = make("plain")
    x = latents(vae, 2)
    vae.decode(x)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.9)
    torch.testing.assert_close(vae.decode(x)[0], reference(vae).decode(x * statistics(vae)[1] + statistics(vae)[0])[0])


@pytest.mark.parametrize("frames", [3, 4, 6, 9])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_fast_convolutions_are_the_plain_one(frames, kernel):
    torch.manual_seed(0)
    x, bias = torch.randn(2, frames, 6, 5, 7), torch.randn(9)
    weight = torch.randn(9, 7, *kernel)
    for stride in (1, 2) if frames % 2 else (1,):
        expected = conv3d_plain(x, weight, bias, stride)
        fast = conv3d_by_taps(x, stacked_taps(weight), bias, 3, stride)
        torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    if frames == 6:
        fast = conv3d_minimal(x, minimal_kernels(weight), bias)
        expected = conv3d_plain(x.double(), weight.double(), bias.double())
        assert (fast - expected).abs().max() < 3e-6 * expected.abs().max()


def test_a_gradient_reaches_every_parameter():
    vae = make("wan2.2")
    video = clip(vae)
    mu, log_variance = vae.moments(video)
    rebuilt = vae.reconstruct(mu + torch.randn_like(mu) * (log_variance / 2).exp())
    assert rebuilt.shape == video.shape
    F.mse_loss(rebuilt, video).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_are_the_plain_convolutions():
    """The gradient of the fast path is that of the reference's 3-D convolutions."""
    vae = make("plain")
    model = reference(vae)
    z = latents(vae, 3)
    vae.reconstruct(z).clamp(-1, 1).square().mean().backward()
    model.decode(z).sample.square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in vae.decoder.named_parameters():
        grad = expected[f"decoder.{name}"].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_configuration_goes_to_a_folder_and_back():
    config = VAEConfig.from_dict(SHAPES["wan2.2"] | {"_class_name": "AutoencoderKLWan"})
    assert VAEConfig.from_dict(config.to_dict()) == config
    assert (config.spatial_factor, config.temporal_factor) == (16, 4)
    assert config.to_dict()["scale_factor_spatial"] == 16
    assert (
        dict(AutoencoderKLWan(**VAEConfig(base_dim=4).to_dict()).config).items()
        >= VAEConfig(base_dim=4).to_dict().items()
    )
    assert VAEConfig.from_dict({"base_dim": 4, "clip_output": False}).to_dict()["clip_output"] is False


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(colour="red"), "colour"),
        (dict(dropout=0.1), "dropout"),
        (dict(base_dim=0), "base_dim"),
        (dict(dim_mult=[1, 2, 2]), "temperal_downsample"),
        (dict(temperal_downsample=[True, True, True]), "temperal_downsample"),
        (dict(z_dim=4), "latents_mean"),
        (dict(latents_std=[0.0] * 16), "latents_std"),
        (dict(patch_size=2), "in_channels"),
        (dict(scale_factor_spatial=16), "scale_factor_spatial"),
        (dict(scale_factor_temporal=8), "scale_factor_temporal"),
        (dict(is_residual=True, dim_mult=[1, 3, 5, 7]), "dim_mult"),
    ],
)
def test_configuration_is_strict(wrong, word):
    with pytest.raises(ValueError, match=word):
        VAEConfig.from_dict(wrong)


def test_attention_in_the_encoder_has_the_references_names():
    config = VAEConfig(base_dim=4, attn_scales=(0.5, 0.25))  # the reference builds this and cannot run it
    ours, theirs = VAE(config), AutoencoderKLWan(**config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.encode(clip(ours, frames=5))[0].shape[2] == 2


def test_wrong_sizes_are_refused():
    vae = make("plain")
    video = clip(vae, frames=10)
    with pytest.raises(ValueError, match="try 9"):
        vae.encode(video)
    with pytest.raises(ValueError, match="try 8"):
        vae.encode(video, vae.encode(video[:, :, :5])[1])
    with pytest.raises(ValueError, match="try 16x16"):
        vae.moments(video[:, :, :9, :, :20])
    with pytest.raises(ValueError, match="16"):
        vae.decode(torch.zeros(1, 12, 1, 2, 2))
