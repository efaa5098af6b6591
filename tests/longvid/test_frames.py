"""Pixels as the VAE has them and frames as files have them: the way there and back."""

import torch

from longvid.frames import to_frames, to_video


def test_every_value_comes_back_and_axes_go_where_they_belong():
    frames = torch.arange(2 * 4 * 4 * 8 * 3).remainder(256).to(torch.uint8).view(2, 4, 4, 8, 3)
    video = to_video(frames)
    assert video.shape == (2, 3, 4, 4, 8) and video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1, 1) and len(frames.unique()) == 256
    assert video[1, 2, 3, 0, 5] == frames[1, 3, 0, 5, 2] / 127.5 - 1
    assert torch.equal(to_frames(video), frames)


def test_what_is_out_of_range_is_black_or_white():
    video = torch.tensor([-9.0, -1.0, 1.0, 9.0]).view(1, 1, 1, 1, 4)
    assert to_frames(video).flatten().tolist() == [0, 0, 255, 255]
