"""Our DiT is the reference DiT: same weights, same numbers, and a part of it is a part of the same."""

import diffusers
import pytest
import torch

from longvid.levels import block_causal_mask
from longvid.models.attention import attend, block_mask, rotate, rotation, visible_in
from longvid.models.cache import Context
from longvid.models.dit import SKYREELS, WAN, DiT, DiTConfig, RMSNorm, TanhGELU

TOLERANCE = 2e-5
SHAPE = dict(
    num_attention_heads=3, attention_head_dim=14, in_channels=4, out_channels=4, text_dim=10, freq_dim=32,
    ffn_dim=50, num_layers=3,
)  # fmt: skip


def pair(class_name: str, **shape) -> tuple[torch.nn.Module, DiT]:
    """The reference with random weights, and ours with the same."""
    torch.manual_seed(0)
    reference = getattr(diffusers, class_name)(**{**SHAPE, "rope_max_seq_len": 64, **shape}).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = DiT(DiTConfig.from_dict({**dict(reference.config), "_class_name": class_name})).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def inputs(frames=5, height=6, width=10, channels=4):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, channels, frames, height, width, generator=generator)
    return latents, torch.randn(1, 7, 10, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("class_name", [WAN, SKYREELS])
def test_scalar_timestep_is_the_reference(class_name, heads):
    reference, ours = pair(class_name, num_attention_heads=heads)
    latents, text = inputs()
    for t in (0, 221, 999):
        expected = reference(latents, torch.tensor([t]), text, return_dict=False)[0]
        for told in (5, 1):  # each latent, or all at once
            velocity, _ = ours(latents, torch.full((1, told), float(t)), ours.text_features(text))
            assert (velocity - expected).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fps", [None, 16, 24])
def test_diffusion_forcing_is_the_reference(fps):
    reference, ours = pair(SKYREELS, inject_sample_info=fps is not None)
    latents, text = inputs(height=8, width=4)
    timesteps = torch.tensor([[0, 100, 487, 731, 999]])
    kwargs = {} if fps is None else {"fps": [0 if fps == 16 else 1]}
    expected = reference(latents, timesteps, text, enable_diffusion_forcing=True, return_dict=False, **kwargs)[0]
    velocity, _ = ours(latents, timesteps.float(), ours.text_features(text), fps=fps or 24)
    assert (velocity - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_stages_one_behind_the_other_are_the_whole():
    _, whole = pair(SKYREELS)
    latents, text = inputs()
    timesteps = torch.tensor([[0.0, 10, 20, 30, 999]])
    expected, features = whole(latents, timesteps, whole.text_features(text))
    hidden, found = latents, {}
    for layers in (range(0, 1), range(1, 3)):
        part = DiT(whole.config, layers)
        part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()}, strict=True)
        hidden, new = part(hidden, timesteps, part.text_features(text))
        found.update(new)
    assert torch.equal(hidden, expected)
    assert found.keys() == features.keys()


@torch.no_grad()
def test_context_as_features_is_context_as_latents_in_a_block_causal_mask():
    """Features kept before rotation, read at their place, are the same as one masked forward over everything."""
    _, model = pair(SKYREELS)
    latents, text = inputs(frames=5)
    timesteps = torch.tensor([[0.0, 0, 500, 500, 500]])
    words = model.text_features(text)
    late = torch.arange(5) >= 2
    mask = ~(late[None, :] & ~late[:, None])
    expected, _ = model(latents, timesteps, words, mask=mask)
    _, kept = model(latents[:, :, :2], timesteps[:, :2], words)
    velocity, _ = model(latents[:, :, 2:], timesteps[:, 2:], words,
                        [Context(before={i: [kv] for i, kv in kept.items()})])  # fmt: skip
    assert (velocity - expected[:, :, 2:]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_features_after_are_the_same_as_a_longer_window():
    _, model = pair(WAN)
    latents, text = inputs(frames=3)
    words, timesteps = model.text_features(text), torch.full((1, 3), 300.0)
    _, whole = model(latents, timesteps, words)
    late = {i: [kv.narrow(2, 3)] for i, kv in whole.items()}
    first, _ = model(latents[:, :, :2], timesteps[:, :2], words, [Context(after=late)])
    expected, _ = model(latents, timesteps, words)
    assert (first - expected[:, :, :2]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("change, said", [
    ({"_class_name": "Other"}, "Other"), ({"image_dim": 1280}, "image_dim"), ({"surprise": 1}, "surprise"),
    ({"attention_head_dim": 5}, "attention_head_dim"), ({"patch_size": [2, 2, 2]}, "patch_size"),
])  # fmt: skip
def test_a_config_that_is_not_honoured_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        DiTConfig.from_dict({**SHAPE, "_class_name": WAN, **change})


def test_attention_in_training_is_that_of_inference():
    """Both ways to turn and to attend, and their gradients, with and without a mask."""
    torch.manual_seed(0)
    turn = rotation(3, 2, 2, 16, torch.device("cpu"), True)
    query, keys, values = (torch.randn(2, 12, 3, 16, dtype=torch.float64).float() for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    for given in (None, visible_in(mask, 4, query.device)):
        outs, grads = [], []
        for trained in (False, True):
            inputs = [x.clone().requires_grad_(trained) for x in (query, keys, values)]
            out = attend(rotate(inputs[0], turn), rotate(inputs[1], turn), inputs[2], given)
            outs.append(out.detach())
            if trained:
                grads = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
        step, ways = 1e-2, [torch.randn_like(x) for x in (query, keys, values)]
        sums = []
        for sign in (1, -1):
            moved = [x + sign * step * way for x, way in zip((query, keys, values), ways, strict=True)]
            out = attend(rotate(moved[0], turn), rotate(moved[1], turn), moved[2], given)
            sums.append(out.double().square().sum())
        slope = sum((grad * way).sum() for grad, way in zip(grads, ways, strict=True))
        assert abs((sums[0] - sums[1]) / (2 * step) - slope) < 2e-2 * abs(slope)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sizes", [(1, 3, 2), (70, 30, 40)])
def test_flex_attention_on_a_gpu_is_the_dense_mask_of_a_cpu(sizes):
    """Here without its compiled kernel and its gradient, which are for GPUs; blocks of 128 tokens are cut, too."""
    torch.manual_seed(0)
    mask, tokens = block_causal_mask(sizes), 3
    query, keys, values = (torch.randn(2, tokens * sum(sizes), 3, 16) for _ in range(3))
    dense = attend(query, keys, values, visible_in(mask, tokens, query.device))
    torch.testing.assert_close(attend(query, keys, values, block_mask(mask, tokens)), dense, rtol=1e-5, atol=1e-6)


def test_the_norm_of_inference_is_that_of_training():
    norm, x = RMSNorm(24, eps=1e-6), 3 * torch.randn(2, 5, 24)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        found = norm(x)
    torch.testing.assert_close(found, norm(x).detach(), atol=1e-6, rtol=1e-6)
    assert (norm(torch.zeros(1, 24)) == 0).all()


def test_gelu_in_training_is_the_one_of_inference():
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(TanhGELU()(x.clone().requires_grad_()).detach(), TanhGELU()(x), atol=2e-6, rtol=0)
