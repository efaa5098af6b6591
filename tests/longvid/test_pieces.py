"""Pieces are what hangs together round the border, and are measured where they are."""

from collections import deque

import numpy as np

from longvid.backdrop import Backdrop
from longvid.pieces import GRID, REACH, find_pieces, label, shrink
from longvid.worlds import COLOURS

NAVY = Backdrop(background="plain", colours=("navy",), rgb=np.array([[18, 28, 78]], np.float32))


def flooded(mask: np.ndarray) -> np.ndarray:
    """The slow twin of `label`: floods from each pixel."""
    h, w = mask.shape
    labels, number = np.zeros((h, w), int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        number += 1
        labels[start], queue = number, deque([start])
        while queue:
            y, x = queue.popleft()
            for place in ((y - 1, x), (y + 1, x), (y, (x - 1) % w), (y, (x + 1) % w)):
                if 0 <= place[0] < h and mask[place] and not labels[place]:
                    labels[place] = number
                    queue.append(place)
    return labels


def test_labels_are_those_of_flooding():
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.6, 0.7):
        for _ in range(10):
            mask = rng.random((13, 17)) < share
            labels, count = label(mask)
            slow = flooded(mask)
            assert count == slow.max() and ((labels > 0) == mask).all()
            pairs = {(a, b) for a, b in zip(labels.ravel(), slow.ravel(), strict=True)}
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_a_piece_over_the_border_is_one():
    frame = np.full((1, 128, 128, 3), (18, 28, 78), np.uint8)
    frame[0, 40:60, :8] = frame[0, 40:60, -12:] = COLOURS["red"]
    ((piece,),) = find_pieces(frame, NAVY)
    assert (piece.area, piece.y, piece.touches) == (400, 50.0, False)
    assert abs(piece.x - 126) < 1e-9
    assert abs(piece.radius - np.sqrt(400 / np.pi)) < 1e-9
    side = 2 * REACH / GRID
    assert abs(piece.outline.sum() * side**2 - np.pi) < 0.15, "the outline is scaled to the area of a disc of radius 1"


def test_pieces_that_are_near_touch_and_specks_are_none():
    frame = np.full((1, 128, 128, 3), (18, 28, 78), np.uint8)
    frame[0, 40:60, 40:60], frame[0, 40:60, 62:82], frame[0, 100:120, 10:30] = (
        COLOURS["red"], COLOURS["green"], COLOURS["red"],
    )  # fmt: skip
    frame[0, 5:9, 5:9] = COLOURS["red"]
    (pieces,) = find_pieces(frame, NAVY)
    assert sorted((piece.x, piece.touches) for piece in pieces) == [(20.0, False), (50.0, True), (72.0, True)]


def test_a_rim_that_mixes_into_another_colour_is_no_piece():
    frame = np.full((1, 128, 128, 3), (10, 10, 14), np.uint8)
    frame[0, 39:81, 39:81] = (160, 150, 155)  # white over black, nearest to pink
    frame[0, 40:80, 40:80] = COLOURS["white"]
    backdrop = Backdrop(background="plain", colours=("black",), rgb=np.array([[10, 10, 14]], np.float32))
    ((piece,),) = find_pieces(frame, backdrop)
    assert list(COLOURS)[piece.colour] == "white"


def test_shrinking_keeps_means_and_leaves_small_frames():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 256, 390, 3), np.uint8)
    small = shrink(frames)
    assert small.shape == (2, 128, 195, 3)
    np.testing.assert_allclose(small[0, 3, 5], frames[0, 6:8, 10:12].mean((0, 1)), atol=0.51)
    assert shrink(small) is small
