"""What can be said of a video without any learned weights: drift, seams, freezing, flicker, return to the opening.

Frames are uint8 RGB (f, h, w, 3); levels are 0..255 where nothing else is said. Plain numpy, no file and no model.

Axes: f frame, h height, w width, b bin, s second, c channel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from longvid.pieces import shrink

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""BT.709."""

DRIFTING = ("sharpness", "saturation", "contrast", "brightness", "histogram_distance")
_BINS = 8  # of each colour
_MOVED_LEVELS, _MOVED_SHARE = 24, 0.002  # a second stands still if fewer pixels than this change by more than that
_THUMBS_PER_SECOND, _THUMB_SIDE = 4, 32


@dataclass(frozen=True, kw_only=True)
class FrameMeasures:
    """A number, or a histogram, for each frame. `change` is from the frame before (NaN for the first)."""

    sharpness: np.ndarray  # variance of the Laplacian of luma, squared levels
    saturation: np.ndarray  # (max - min) / max of the colours, mean, 0..1
    contrast: np.ndarray  # deviation of luma
    brightness: np.ndarray  # mean luma
    change: np.ndarray  # mean absolute difference
    histogram: np.ndarray  # (f, b), sums to 1
    small: np.ndarray  # (f, h, w, 3), about 128 pixels

    def __len__(self) -> int:
        return len(self.change)


def measure(chunks: Iterable[np.ndarray]) -> FrameMeasures:
    """Measure a video that comes in pieces. Raises ValueError if it has no frame."""
    found, last = [], None
    for frames in chunks:
        found.append(_measure(frames, last))
        last = frames[-1]
    if not found:
        raise ValueError("the video has no frame; give one that has at least two")
    names = [field.name for field in fields(FrameMeasures)]
    return FrameMeasures(**{name: np.concatenate([getattr(part, name) for part in found]) for name in names})


def _measure(frames: np.ndarray, before: np.ndarray | None) -> FrameMeasures:
    levels = frames.astype(np.float32)
    luma = levels @ LUMA
    laplacian = (luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
                 - 4 * luma[:, 1:-1, 1:-1])  # fmt: skip
    high, low = levels.max(-1), levels.min(-1)
    first = levels[:1] if before is None else before[None].astype(np.float32)
    change = np.abs(np.diff(np.concatenate([first, levels]), axis=0)).mean((1, 2, 3))
    if before is None:
        change[0] = np.nan
    return FrameMeasures(
        sharpness=laplacian.var((1, 2)),
        saturation=((high - low) / np.maximum(high, 1)).mean((1, 2)),
        contrast=luma.std((1, 2)),
        brightness=luma.mean((1, 2)),
        change=change,
        histogram=histograms(frames),
        small=shrink(frames),
    )


def histograms(frames: np.ndarray) -> np.ndarray:
    """Share of the pixels in each bin of colour: (f, b)."""
    bins = (frames // (256 // _BINS)).astype(np.int64) @ np.array([_BINS**2, _BINS, 1])
    counts = [np.bincount(frame.ravel(), minlength=_BINS**3) for frame in bins]
    return (np.array(counts) / bins[0].size).astype(np.float32)


def over_seconds(measures: FrameMeasures, seconds: Sequence[slice]) -> dict[str, np.ndarray]:
    """Curves (s,): means of each second, and what only a second has.

    `histogram_distance` is the share of pixels whose colour the opening second does not have, `moved` the share of
    pixels that change at all, `flicker` the mean second difference of brightness, `opening_similarity` that of the
    pictures to the opening second's, less the video's mean picture, -1..1.
    """
    histogram = np.stack([measures.histogram[part].mean(0) for part in seconds])
    curves = {name: np.array([getattr(measures, name)[part].mean() for part in seconds]) for name in DRIFTING[:4]}
    curves["histogram_distance"] = np.abs(histogram - histogram[0]).sum(1) / 2
    curves["moved"] = np.array([_moved(measures.small[part]) for part in seconds])
    curves["flicker"] = np.array([_flicker(measures.brightness[part]) for part in seconds])
    curves["opening_similarity"] = similarity(measures.small, seconds)[:, 0]
    return curves


def _moved(frames: np.ndarray) -> float:
    span = (frames.max(0).astype(int) - frames.min(0)).max(-1)
    return float((span > _MOVED_LEVELS).mean())


def _flicker(brightness: np.ndarray) -> float:
    return float(np.abs(np.diff(brightness, 2)).mean()) if len(brightness) > 2 else 0.0


def similarity(frames: np.ndarray, seconds: Sequence[slice]) -> np.ndarray:
    """How like the pictures of a second (row) are to the likest of another (column): cosines, (s, s).

    The mean picture of the video is taken off first, so a background that stays does not count.
    """
    picked = [np.unique(np.linspace(part.start, part.stop - 1, _THUMBS_PER_SECOND).astype(int)) for part in seconds]
    thumbs = np.concatenate([_thumbs(frames[index]) for index in picked])
    thumbs -= thumbs.mean(0)
    thumbs /= np.maximum(np.linalg.norm(thumbs, axis=1, keepdims=True), 1e-6)
    cosines = thumbs @ thumbs.T
    starts = np.cumsum([0, *(len(index) for index in picked[:-1])])
    nearest = np.maximum.reduceat(cosines, starts, axis=1)
    return np.add.reduceat(nearest, starts, axis=0) / np.array([len(index) for index in picked])[:, None]


def _thumbs(frames: np.ndarray) -> np.ndarray:
    """Small pictures, flat: (f, n)."""
    f, h, w, _ = frames.shape
    step = max(1, min(h, w) // _THUMB_SIDE)
    cut = frames[:, : h // step * step, : w // step * step].astype(np.float32)
    return cut.reshape(f, h // step, step, w // step, step, 3).mean((2, 4)).reshape(f, -1)


def collapse(likeness: np.ndarray, opening: int = 1) -> float | None:
    """How much more later seconds are like the opening ones than like each other; None for videos under 4 seconds.

    About 0 where the video goes on as it began, below where it goes away, above where it falls back to its opening
    (the sink) again and again. `likeness` (s, s) is `similarity`; seconds next to each other are not compared.
    """
    later = np.arange(opening + 1, len(likeness))
    apart = np.abs(later[:, None] - later) > 1
    if not apart.any():
        return None
    return float(likeness[later, :opening].mean() - likeness[np.ix_(later, later)][apart].mean())


def slope_per_minute(values: np.ndarray, step: float = 1.0) -> float:
    """Slope of the straight line that fits best through values `step` seconds apart; 0 for a single one."""
    minutes = np.arange(len(values)) * step / 60
    return float(np.polyfit(minutes, values, 1)[0]) if len(values) > 1 else 0.0


def seam_ratio(change: np.ndarray, borders: Sequence[int]) -> float | None:
    """Mean change into the first frames of blocks (`borders`) over that inside; None where there is none of either."""
    at_border = np.zeros(len(change), bool)
    at_border[[b for b in borders if 0 < b < len(change)]] = True
    inside = ~at_border
    inside[0] = False
    if not at_border.any() or not inside.any() or change[inside].mean() == 0:
        return None
    return float(change[at_border].mean() / change[inside].mean())


def standing_still(moved: np.ndarray) -> tuple[float, int]:
    """Share of seconds that stand still, and the longest run of them."""
    still = moved < _MOVED_SHARE
    run = longest = 0
    for one in still:
        run = run + 1 if one else 0
        longest = max(longest, run)
    return float(still.mean()), longest


def latent_drift(latents: np.ndarray, seconds_each: float) -> dict[str, list[float]]:
    """Slopes per minute of each channel's mean and deviation, in deviations of the opening second: (c, f, h, w)."""
    means, deviations = latents.mean((2, 3)), latents.std((2, 3))
    opening = max(1, round(1 / seconds_each))
    scale = np.maximum(latents[:, :opening].std((1, 2, 3)), 1e-6)
    return {name: [slope_per_minute(row / of, seconds_each) for row, of in zip(rows, scale, strict=True)]
            for name, rows in (("mean", means), ("deviation", deviations))}  # fmt: skip


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features (n, d): Heusel et al. 2017, eq. 6.

    Raises ValueError for sets of fewer than two.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"sets of {len(first)} and {len(second)} features: a Frechet distance needs at least 2 of each"
        )
    gap = first.mean(0) - second.mean(0)
    one, two = (np.atleast_2d(np.cov(rows.astype(np.float64), rowvar=False)) for rows in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * common)
