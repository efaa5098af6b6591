"""Frames <-> files: H.264 in fragmented MP4 out (ffmpeg), any video that decord reads and still images in.

Knows no tensor of the model: a frame here is uint8 RGB, frames are `(n, height, width, 3)`. Sound is neither read nor
kept. A wrong request is a ValueError of one line; a write that fails while running is an OSError of one line.
"""

import math
import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from torch import from_numpy

VIDEO_SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}
"""What a written file may be called, and ffmpeg's name for the container."""

IMAGE_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe", b"RIFF": "webp_pipe"}
"""First bytes of the still images that are read, and ffmpeg's name for the format."""

FRAGMENT_SECONDS = 0.25
"""Seconds of video that reach the file at a time: the most that is lost if the encoder itself is killed."""

MAX_FPS = 1000
"""Most frames per second of a file."""

BYTES_PER_PIXEL = 0.15
"""Generous estimate of an encoded video, per pixel and frame. `check_disk` adds 16 MiB."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds: frames, pixels (as shown, after rotation), frames per second (average)."""

    num_frames: int
    height: int
    width: int
    fps: float


def check_output(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Return `path` if a video can be written there; touches nothing.

    Raises ValueError for an unknown suffix, a folder that is missing or not writable, a path that is a folder, and an
    existing file unless `overwrite`.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file, such as {path / 'video.mp4'}")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(VIDEO_SUFFIXES)}; try {path.with_suffix('.mp4')}")
    if not folder.is_dir():
        raise ValueError(f"{path} is in a folder that does not exist; create it first: mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not writable; choose another folder, such as {Path.home()}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name or overwrite it (--overwrite)")
    return path


def free_bytes(path: str | os.PathLike) -> int:
    """Bytes free on the disk where `path` is, or would be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def check_disk(path: str | os.PathLike, num_frames: int, height: int, width: int) -> None:
    """Raise ValueError if the disk of `path` has less room than a video of this size may need."""
    needed = int(BYTES_PER_PIXEL * num_frames * height * width) + 16 * 2**20
    free = free_bytes(path)
    if free < needed:
        raise ValueError(
            f"the disk of {path} has {free / 2**20:.0f} MiB free, and {num_frames} frames of {height}x{width} may need "
            f"{needed / 2**20:.0f} MiB; free some space, choose another disk or make a shorter video"
        )


class VideoWriter:
    """Appends frames to a video file that plays at every moment, even if the process or the encoder is killed.

    H.264, crf 18, a key frame each second, BT.709, in fragments of `FRAGMENT_SECONDS`; 4:2:0, or 4:4:4 where height or
    width is odd, so no pixel is cut or added. ffmpeg starts with the first frame (so a run without frames leaves
    nothing, and overwrites nothing) in a session of its own: Ctrl-C in the terminal does not end it before `close`,
    and if this process dies it completes the file by itself. Frames are handed to it by a thread, while the next ones
    are made; the first ones are there when `write` returns.

    Raises ValueError (nothing started) for a path `check_output` refuses and for sizes or rates that are not positive.
    `write` and `close` raise OSError with ffmpeg's message when it fails, such as on a full disk, of these frames or of
    those before; what reached the disk before stays and plays.
    """

    def __init__(self, path: str | os.PathLike, *, height: int, width: int, fps: float, overwrite: bool = False):
        if height < 1 or width < 1:
            raise ValueError(f"height={height}, width={width} must be positive; try 480 and 832")
        _check_fps(fps)
        self.path = check_output(path, overwrite=overwrite)
        self.num_frames = 0
        self._frame_shape = (height, width, 3)
        self._overwrite = overwrite
        self._command = _encode_command(self.path, height, width, fps)
        self._process: subprocess.Popen | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future | None = None
        self._handed = 0

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 `(n, height, width, 3)`, which must not change afterwards; `num_frames` counts them."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._frame_shape:
            raise ValueError(
                f"frames of {frames.dtype} {frames.shape} must be uint8 (n, {', '.join(map(str, self._frame_shape))})"
            )
        if self._closed:
            raise ValueError(f"{self.path} is closed after {self.num_frames} frames; open another writer")
        is_first = self._process is None
        if is_first and len(frames):
            with open(self.path, "wb" if self._overwrite else "xb"):  # nobody else has made it in the meantime
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(self._command, stdin=pipe, stderr=pipe, start_new_session=True)
        self._wait()
        self.num_frames += len(frames)
        self._under_way = self._thread.submit(self._hand_over, frames)
        if is_first:
            self._wait()

    def _hand_over(self, frames: np.ndarray) -> None:
        for frame in frames:
            self._process.stdin.write(np.ascontiguousarray(frame))
            self._process.stdin.flush()
            self._handed += 1

    def _wait(self) -> None:
        """Until the encoder has the frames before."""
        under_way, self._under_way = self._under_way, None
        try:
            if under_way is not None:
                under_way.result()
        except BrokenPipeError:
            self.close()
            raise

    def close(self) -> None:
        """Complete the file. A second call does nothing."""
        self._closed = True
        if self._process is None:
            return
        self._thread.shutdown()
        process, self._process, self.num_frames = self._process, None, self._handed
        _, messages = process.communicate()
        if process.returncode:
            _cut_torn_fragment(self.path)
            cause = _cause(messages, process.returncode)
            raise OSError(f"writing {self.path} failed after {self.num_frames} frames: {cause}")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Frames, size and rate of a video file. Decodes its first frame.

    Raises ValueError for a path that is missing, a folder, empty, cut short, or no video that decord reads.
    """
    return _open_video(path)[1]


def count_frames(info: VideoInfo, fps: float) -> int:
    """How many frames `read_video` gives at `fps`: the whole duration, at least one."""
    if _same_rate(info.fps, fps):
        return info.num_frames
    return max(1, math.floor(info.num_frames * fps / info.fps + 0.5))


def read_video(
    path: str | os.PathLike, *, height: int, width: int, fps: float, chunk: int = 64
) -> Iterator[np.ndarray]:
    """All frames of a video at this size and rate: uint8 `(n, height, width, 3)`, n = `chunk` but for the last.

    Frame i is the one nearest to the time i / fps, by the file's own time stamps. Frames are scaled until they cover
    height x width and cropped around the centre. Where size and rate are already right, frames are decord's, bit for
    bit. Memory is one chunk and one frame of the source. Sound is not read.

    Raises ValueError at once as `probe_video` does, and while reading where a frame cannot be decoded: decord would
    repeat a neighbour in its place.
    """
    _check_fps(fps)
    if height < 1 or width < 1 or chunk < 1:
        raise ValueError(f"height={height}, width={width}, chunk={chunk} must be positive; try 480, 832 and 64")
    path = Path(path)
    reader, info, starts = _open_video(path)
    indices = _nearest_indices(starts, info, fps)

    def chunks() -> Iterator[np.ndarray]:
        at, shown = -1, None
        for first in range(0, len(indices), chunk):
            frames = np.empty((min(chunk, len(indices) - first), height, width, 3), np.uint8)
            for row, index in zip(frames, indices[first:], strict=False):
                if at < index:
                    for _ in range(index - at):  # decord's own skipping and seeking damage HEVC frames
                        source = _next_frame(reader, path)
                    at, shown = index, cover(source[None], height, width)[0]
                row[:] = shown
            yield frames

    return chunks()


def read_image(path: str | os.PathLike, height: int, width: int) -> np.ndarray:
    """A PNG, JPEG or WebP file as uint8 `(height, width, 3)`, scaled to cover and cropped around the centre.

    Transparency is dropped; the camera's rotation is applied. Raises ValueError for a path that is missing, a folder,
    empty, damaged or not such an image.
    """
    path = _check_input(path)
    with path.open("rb") as file:
        start = file.read(16)
    form = next((form for signature, form in IMAGE_SIGNATURES.items() if start.startswith(signature)), None)
    if form is None or (form == "webp_pipe" and start[8:12] != b"WEBP"):
        raise ValueError(f"{path} is not an image of a known kind; give a PNG, JPEG or WebP file")
    command = [_ffmpeg(), "-nostdin", "-v", "error", "-xerror", "-err_detect", "explode", "-f", form]
    command += ["-i", f"file:{path}", "-frames:v", "1", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", done.stdout)
    if done.returncode or header is None:
        cause = _cause(done.stderr, done.returncode)
        raise ValueError(f"{path} cannot be decoded ({cause}); give a PNG, JPEG or WebP file that opens elsewhere")
    pixels = np.frombuffer(done.stdout[header.end() :], np.uint8)
    return cover(pixels.reshape(1, int(header[2]), int(header[1]), 3).copy(), height, width)[0]


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 `(n, h, w, 3)` until it covers height x width (bilinear, antialiased), then crop the centre."""
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    scaled = F.interpolate(rearrange(from_numpy(frames), "t H W c -> t c H W"), size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    scaled = rearrange(scaled, "t c H W -> t H W c").numpy()
    return np.ascontiguousarray(scaled[:, top : top + height, left : left + width])


def _check_fps(fps: float) -> None:
    if not 0.1 <= fps <= MAX_FPS:
        raise ValueError(f"fps={fps} must be between 0.1 and {MAX_FPS}; try 16")


def _check_input(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the path of a file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} is not readable; allow it first: chmod u+r {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; give a file that opens elsewhere")
    return path


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _encode_command(path: Path, height: int, width: int, fps: float) -> list[str]:
    """ffmpeg's command line: raw frames from standard input to the file.

    `zerolatency` keeps no frames back for look-ahead and `-flush_packets` none in a buffer, so a fragment is in the
    file as soon as its frames are written.
    """
    rate = Fraction(fps).limit_denominator(1001)
    pixels = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    source = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate {rate} -i pipe:0"
    codec = f"-c:v libx264 -preset veryfast -tune zerolatency -crf 18 -g {max(1, round(rate))} -pix_fmt {pixels}"
    colour = "-vf scale=out_color_matrix=bt709:out_range=tv -color_range tv"
    colour += " -colorspace bt709 -color_primaries bt709 -color_trc bt709"
    container = f"-movflags +frag_keyframe+empty_moov+default_base_moof -f {VIDEO_SUFFIXES[path.suffix.lower()]}"
    container += f" -frag_duration {round(FRAGMENT_SECONDS * 1e6)} -flush_packets 1"
    options = f"-v error -y {source} {colour} {codec} {container}"
    return [_ffmpeg(), *options.split(), f"file:{path}"]


def _cause(messages: bytes, code: int) -> str:
    """ffmpeg's first message, without the addresses of its parts: the later ones are consequences."""
    lines = re.sub(rb"^(\[[^]]*\] )+", b"", messages, flags=re.MULTILINE).decode(errors="replace").split("\n")
    return lines[0].strip() or f"ffmpeg ended with status {code}"


def _cut_torn_fragment(path: Path) -> None:
    """Cut an MP4 file after its last complete fragment, `moof` and `mdat`: decord reads no file with a torn one."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size, at, complete = file.seek(0, os.SEEK_END), 0, 0
        while at + 8 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length < 8:
                break
            at += length
            if kind != b"moof" and at <= size:
                complete = at
        file.truncate(complete)


def _same_rate(fps: float, other: float) -> bool:
    return math.isclose(fps, other, rel_tol=1e-4)


def _open_video(path: str | os.PathLike):
    """Return decord's reader, before the first frame, the video's `VideoInfo` and `_start_times`."""
    path = _check_input(path)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    with _decoding(path), _quiet_stderr():
        # The smallest tolerance there is: a frame that decord cannot decode is an error, not a copy of its neighbour.
        reader = decord.VideoReader(str(path.absolute()), decord.cpu(0), fault_tol=1e-6)
        fps = float(reader.get_avg_fps())
    height, width, _ = _next_frame(reader, path).shape
    reader.seek(0)
    if not 0 < fps < math.inf:
        raise ValueError(f"{path} states no frame rate; {_convert(path)}")
    starts = _start_times(reader, fps)
    gaps = len(starts) - 1
    if abs(starts[-1] - gaps / fps) > 0.01 * gaps / fps + 0.002:  # the stated rate is not the average one
        fps = gaps / starts[-1]
    return reader, VideoInfo(num_frames=len(reader), height=height, width=width, fps=fps), starts


def _start_times(reader, fps: float) -> np.ndarray:
    """Seconds at which each frame begins: the file's time stamps, or even ones at `fps` where those do not ascend."""
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    starts -= starts[0]
    return starts if (np.diff(starts) > 0).all() else np.arange(len(reader)) / fps


def _next_frame(reader, path: Path) -> np.ndarray:
    with _decoding(path):
        frame = reader.next().asnumpy()
    height, width, _ = frame.shape  # decord leaves the padding of a row in where it is a multiple of the width
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _nearest_indices(starts: np.ndarray, info: VideoInfo, fps: float) -> np.ndarray:
    """The source frame of each output frame. Of two equally near (to a thousandth of a frame), the later."""
    if _same_rate(info.fps, fps):
        return np.arange(info.num_frames)
    times = np.arange(count_frames(info, fps)) / fps
    return np.searchsorted((starts[1:] + starts[:-1]) / 2, times + 1e-3 / info.fps, side="right")


def _convert(path: Path) -> str:
    command = ["ffmpeg", "-i", str(path), "-c:v", "libx264", str(path.with_name(path.stem + "-converted.mp4"))]
    return f"convert it first: {shlex.join(command)}"


@contextmanager
def _decoding(path: Path):
    """Turn everything that decord raises into one line for people."""
    from decord import DECORDError
    from decord._ffi.base import DECORDLimitReachedError

    try:
        yield
    except (DECORDError, DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration) as error:
        raise ValueError(f"{path} is cut short, damaged or not a video that decord reads; {_convert(path)}") from error


@contextmanager
def _quiet_stderr():
    """Send file descriptor 2 nowhere for a moment: decord's C++ log has no level for a file that does not open."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
