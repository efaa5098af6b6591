"""Our umT5 encoder against transformers'."""

import pytest
import torch
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

from longvid.models.umt5 import UMT5Config, UMT5Encoder, bucket

SHAPES = {
    "small": dict(vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3),
    "heads wider than the model": dict(vocab_size=60, d_model=16, d_kv=12, d_ff=20, num_layers=1, num_heads=2),
    "few buckets": dict(
        vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, layer_norm_epsilon=1e-3,
    ),
}  # fmt: skip


def pair(name, dtype=torch.float32):
    """Both, of the same weights; scores are made large enough that positions and the mask matter."""
    torch.manual_seed(0)
    ours = UMT5Encoder(UMT5Config(**SHAPES[name])).reset()
    for parameter in ours.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    theirs = UMT5EncoderModel(TheirConfig.from_dict(ours.config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def inputs():
    tokens = torch.randint(0, 60, (3, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(50) < torch.tensor([[50], [33], [1]])
    return tokens, mask.long()


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_states_are_the_reference(name):
    ours, theirs = pair(name)
    tokens, mask = inputs()
    expected = theirs(tokens, mask).last_hidden_state
    assert expected.abs().max() > 1
    seen = mask[..., None] > 0  # what lies past the end is nobody's
    torch.testing.assert_close(ours(tokens, mask) * seen, expected * seen, rtol=0, atol=2e-5)


@torch.no_grad()
def test_states_in_bfloat16_are_as_near_to_float32_as_the_reference():
    (ours, theirs), (exact, _) = pair("small", torch.bfloat16), pair("small")
    tokens, mask = inputs()
    expected, seen = exact(tokens, mask), mask[..., None] > 0
    errors = [((x.float() - expected) * seen).square().mean().sqrt() for x in (
        ours(tokens, mask), theirs(tokens, mask).last_hidden_state)]  # fmt: skip
    assert 0 < errors[0] < 1.2 * errors[1]


def test_gradients_are_the_reference():
    ours, theirs = pair("small")
    tokens, mask = inputs()
    for states in (ours(tokens, mask), theirs(tokens, mask).last_hidden_state):
        (states * mask[..., None]).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.any(), name
        grad = expected[name].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())


def test_it_begins_as_the_reference_does():
    config = UMT5Config(vocab_size=384, d_model=128, d_kv=16, d_ff=256, num_layers=1, num_heads=4)
    torch.manual_seed(0)
    theirs = dict(UMT5EncoderModel(TheirConfig.from_dict(config.to_dict())).named_parameters())
    for name, parameter in UMT5Encoder(config).reset().named_parameters():
        torch.testing.assert_close(parameter.std(), theirs[name].std(), rtol=0.2, atol=0, msg=name)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20)])
def test_buckets_by_hand(num_buckets, max_distance):
    """Near distances have one each; the others grow, end where they must, and both directions are alike and apart."""
    rows = bucket(torch.arange(-300, 301), num_buckets, max_distance)
    behind, ahead = rows[:301].flip(0), rows[300:]
    exact = num_buckets // 4
    assert behind[:exact].tolist() == list(range(exact)) and (behind.diff() >= 0).all()
    assert behind[max_distance:].unique().tolist() == [num_buckets // 2 - 1]
    assert torch.equal(ahead[1:], behind[1:] + num_buckets // 2)


@pytest.mark.parametrize("change, said", [({"model_type": "t5"}, "t5"), ({"feed_forward_proj": "relu"}, "relu")])
def test_what_is_not_supported_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        UMT5Config.from_dict(UMT5Config().to_dict() | change)
