"""Frames survive the way to a file and back; files survive what happens to processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import decord
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from longvid import media
from longvid.contact_sheet import INK, choose, contact_sheet, label, write_png
from longvid.media import (
    VideoInfo,
    VideoWriter,
    check_disk,
    count_frames,
    cover,
    free_bytes,
    probe_video,
    read_image,
    read_video,
)


def film(num_frames=48, height=48, width=64):
    """A smooth ramp that brightens, with three saturated squares."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:] = np.stack([255 * x // width, 255 * y // height, np.full_like(x, 5 * i)], axis=-1)
    for k in range(3):
        frames[:, :16, 16 * k : 16 * k + 16] = 255 * np.eye(3, dtype=np.uint8)[k]
    return frames


def save(path, frames, fps=24, **options):
    with VideoWriter(path, height=frames.shape[1], width=frames.shape[2], fps=fps, **options) as writer:
        writer.write(frames)
    return path


def load(path):
    reader = decord.VideoReader(str(path), decord.cpu(0))
    return reader.get_batch(range(len(reader))).asnumpy(), reader.get_avg_fps()


def read_all(path, **options):
    return np.concatenate(list(read_video(path, **options)))


def wait_for_frames(path, count):
    """Until the file, still being written, plays this many frames."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            if probe_video(path).num_frames >= count:
                return
        time.sleep(0.05)
    pytest.fail(f"{path} has fewer than {count} frames")


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


# Writing


@pytest.mark.parametrize("fps", [24, 16, 30, 12.5, 1, 29.97, 24000 / 1001])
@pytest.mark.parametrize("height, width", [(48, 64), (47, 63)])
def test_what_is_written_is_read(tmp_path, height, width, fps):
    frames = film(40, height, width)
    read, rate = load(save(tmp_path / "a.mp4", frames, fps))
    assert read.shape == frames.shape
    assert rate == pytest.approx(fps, rel=1e-9)
    assert psnr(frames, read) > 36


def test_colours_stay(tmp_path):
    read, _ = load(save(tmp_path / "a.mp4", film()))
    for k in range(3):
        assert np.abs(read[:, 4:12, 16 * k + 4 : 16 * k + 12].astype(int) - 255 * np.eye(3, dtype=int)[k]).max() <= 6


@pytest.mark.parametrize("name", ["a.mov", "a.m4v", "A.MP4", "-a b:c%d.mp4"])
def test_other_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(name, film(5))
    assert os.listdir() == [name]
    assert probe_video(name).num_frames == 5


def test_frames_reach_the_file_while_writing(tmp_path):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, height=48, width=64, fps=24) as writer:
        for first in (0, 24):
            writer.write(film()[first : first + 24])
            wait_for_frames(path, first + 24 - 24 * media.FRAGMENT_SECONDS - 1)
            assert len(load(path)[0]) <= first + 24
    assert writer.num_frames == len(load(path)[0]) == 48


WRITERS = """
import sys, time
import numpy as np
from longvid.media import VideoWriter
writers = [VideoWriter(path, height=48, width=64, fps=24) for path in sys.argv[1:]]
for i in range(40):
    for writer in writers:
        writer.write(np.full((1, 48, 64, 3), 5 * i, np.uint8))
for writer in writers:
    writer.write(np.empty((0, 48, 64, 3), np.uint8))  # returns when the encoder has the frames before
print(*(writer._process.pid for writer in writers), flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_files_that_play(tmp_path):
    """kill -9 of the process: the encoder completes the file. Of both: all but the last fragment is there."""
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    with subprocess.Popen([sys.executable, "-c", WRITERS, *paths], stdout=subprocess.PIPE, text=True) as process:
        _, encoder = map(int, process.stdout.readline().split())
        wait_for_frames(paths[1], 33)
        os.kill(encoder, signal.SIGKILL)
        process.kill()
    wait_for_frames(paths[0], 40)
    assert 33 <= len(load(paths[1])[0]) <= 40


def test_the_encoder_is_out_of_reach_of_the_terminal(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", height=48, width=64, fps=24) as writer:
        writer.write(film(3))
        assert os.getsid(writer._process.pid) != os.getsid(0)


def test_an_exception_still_closes_the_file(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "a.mp4", height=48, width=64, fps=24) as writer,
    ):
        writer.write(film(7))
        raise KeyboardInterrupt
    assert probe_video(tmp_path / "a.mp4").num_frames == 7
    writer.close()
    with pytest.raises(ValueError, match="closed after 7 frames"):
        writer.write(film(1))


def test_a_dead_encoder_is_an_oserror_and_what_it_wrote_plays(tmp_path):
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, height=48, width=64, fps=24)
    writer.write(film(40))
    wait_for_frames(path, 33)
    os.kill(writer._process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"failed after \d+ frames: ffmpeg ended with status -9"):
        for _ in range(100):
            writer.write(film(40))
    assert probe_video(path).num_frames >= 33


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror(tmp_path):
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path / "a.mp4", film(), overwrite=True)


def test_a_torn_fragment_is_cut(tmp_path):
    path = save(tmp_path / "a.mp4", film())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(ValueError, match="cut short"):
        probe_video(path)
    media._cut_torn_fragment(path)
    assert 24 <= probe_video(path).num_frames < 40
    size = path.stat().st_size
    media._cut_torn_fragment(path)
    assert path.stat().st_size == size


def test_refused_before_anything_starts(tmp_path):
    def refuse(path, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            VideoWriter(path, **{"height": 48, "width": 64, "fps": 24} | options)
        assert "\n" not in str(caught.value)

    old = save(tmp_path / "old.mp4", film(2))
    before = old.read_bytes()
    refuse(tmp_path / "none" / "a.mp4", "does not exist")
    refuse(tmp_path, "is a folder")
    refuse(tmp_path / "a.avi", "must end in .mp4, .m4v, .mov; try .*a.mp4")
    refuse(tmp_path / "a", "must end in")
    refuse(old, "exists; give another name")
    refuse(tmp_path / "a.mp4", "fps=0 ", fps=0)
    refuse(tmp_path / "a.mp4", "fps=nan ", fps=float("nan"))
    refuse(tmp_path / "a.mp4", "height=0", height=0)
    with VideoWriter(old, height=48, width=64, fps=24, overwrite=True) as writer:
        with pytest.raises(ValueError, match=r"float32 .* must be uint8 \(n, 48, 64, 3\)"):
            writer.write(film(1).astype(np.float32))
        with pytest.raises(ValueError, match="must be uint8"):
            writer.write(film(1)[:, :46])
    assert old.read_bytes() == before  # no frame, nothing overwritten
    assert os.listdir(tmp_path) == ["old.mp4"]
    assert probe_video(save(old, film(9), overwrite=True)).num_frames == 9


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", height=48, width=64, fps=24)
    (tmp_path / "a.mp4").write_text("mine")
    with pytest.raises(FileExistsError):
        writer.write(film(1))
    assert (tmp_path / "a.mp4").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not writable"):
        VideoWriter(tmp_path / "a.mp4", height=48, width=64, fps=24)


def test_disk_space(tmp_path):
    path = tmp_path / "none" / "a.mp4"
    assert free_bytes(path) > 0
    check_disk(path, 81, 48, 64)
    with pytest.raises(ValueError, match=r"MiB free, .* may need \d+ MiB"):
        check_disk(path, 10**9, 4320, 7680)


# Reading


def test_probe(tmp_path):
    assert probe_video(save(tmp_path / "a.mp4", film(10, 47, 63), 12.5)) == VideoInfo(
        num_frames=10, height=47, width=63, fps=12.5
    )


def test_same_size_and_rate_is_bit_exact(tmp_path):
    path = save(tmp_path / "a.mp4", film(), 24)
    chunks = list(read_video(path, height=48, width=64, fps=24, chunk=20))
    assert [len(c) for c in chunks] == [20, 20, 8]
    assert all(c.dtype == np.uint8 for c in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), load(path)[0])


@pytest.mark.parametrize(
    "source, fps, picks",
    [
        (24, 16, [0, 2, 3, 5, 6, 8]),
        (30, 16, [0, 2, 4, 6, 8, 9]),
        (16, 24, [0, 1, 1, 2, 3, 3]),
        (8, 24, [0, 0, 1, 1, 1, 2]),
    ],
)
def test_resampling_takes_the_nearest_frame(tmp_path, source, fps, picks):
    path = save(tmp_path / "a.mp4", film(), source)
    frames = load(path)[0]
    resampled = read_all(path, height=48, width=64, fps=fps, chunk=7)
    count = count_frames(probe_video(path), fps)
    assert len(resampled) == count == int(48 * fps / source + 0.5)
    np.testing.assert_array_equal(resampled[:6], frames[picks])
    assert (resampled == frames[:, None]).all((2, 3, 4)).any(0).all()
    assert psnr(resampled[-1], frames[-1]) > 30  # the whole duration is there


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx265"), ("a.mkv", "libx264"), ("a.webm", "libvpx")])
def test_other_codecs_and_containers(tmp_path, name, codec):
    """Open groups of pictures and frames out of order: each frame is there, and those between are not missed."""
    grey = np.arange(0, 240, 5, dtype=np.uint8)[:, None, None, None]
    save(tmp_path / "source.mp4", np.tile(grey, (1, 48, 64, 3)))
    path = tmp_path / name
    ffmpeg("-i", tmp_path / "source.mp4", "-c:v", codec, "-g", "24", "-b:v", "1M", "-pix_fmt", "yuv420p", path)
    frames = read_all(path, height=48, width=64, fps=24)
    np.testing.assert_array_equal(np.rint(frames.mean((1, 2, 3)) / 5), np.arange(48))
    np.testing.assert_array_equal(read_all(path, height=48, width=64, fps=12), frames[::2])


def test_uneven_time_stamps_keep_their_pace(tmp_path):
    """Frames at 0, 1/8 ... then at half that rate: at 8 fps each of the later ones shows twice."""
    save(tmp_path / "a.mp4", film(12), 8)
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setpts=if(lt(N\\,6)\\,N\\,6+2*(N-6))/8/TB", "-fps_mode", "passthrough",
           "-enc_time_base", "1/8", "-bf", "0", tmp_path / "b.mkv")  # fmt: skip
    frames = load(tmp_path / "b.mkv")[0]
    assert probe_video(tmp_path / "b.mkv").fps == pytest.approx(5.5)
    resampled = read_all(tmp_path / "b.mkv", height=48, width=64, fps=8)
    np.testing.assert_array_equal(resampled[:16], frames[[0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11]])


@pytest.mark.parametrize("height, width", [(48, 64), (64, 64), (32, 96), (24, 20), (96, 128), (47, 63)])
def test_cover_and_centre_crop(height, width):
    """A disc in the middle stays a disc in the middle, and the frame is full."""
    y, x = np.mgrid[:90, :120] + 0.5
    disc = 20 + 200 * ((y - 45) ** 2 + (x - 60) ** 2 < 20**2).astype(np.uint8)
    disc = np.repeat(disc[None, ..., None], 3, axis=-1)
    out = cover(disc, height, width)
    assert out.shape == (1, height, width, 3) and out.min() >= 20 and out.max() <= 220
    ys, xs = np.nonzero(out[0, ..., 0] > 120)
    assert abs(ys.mean() + 0.5 - height / 2) <= 0.6 and abs(xs.mean() + 0.5 - width / 2) <= 0.6
    assert len(ys) == pytest.approx(np.pi * (20 * max(height / 90, width / 120)) ** 2, rel=0.1)


def test_another_size_is_cover_of_the_frames(tmp_path):
    path = save(tmp_path / "a.mp4", film(6, 47, 63))
    expected = cover(load(path)[0], 64, 32)
    np.testing.assert_array_equal(read_all(path, height=64, width=32, fps=24, chunk=4), expected)


def test_one_frame(tmp_path):
    path = save(tmp_path / "a.mp4", film(1), 16)
    assert probe_video(path).num_frames == 1
    assert len(read_all(path, height=48, width=64, fps=16)) == 1


def test_sideways_video_is_turned_or_refused(tmp_path):
    save(tmp_path / "a.mp4", film(4, 64, 128))
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    assert probe_video(tmp_path / "b.mp4").height == 128
    assert psnr(np.rot90(film(4, 64, 128)[0]), read_all(tmp_path / "b.mp4", height=128, width=64, fps=24)[0]) > 30
    save(tmp_path / "c.mp4", film(4, 48, 64))
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "c.mp4", "-c", "copy", tmp_path / "d.mp4")
    assert psnr(np.rot90(film(4, 48, 64)[0]), read_all(tmp_path / "d.mp4", height=64, width=48, fps=24)[0]) > 30


@pytest.mark.parametrize("width", [2, 8, 16, 24, 30])
def test_narrow_videos_are_read(tmp_path, width):
    path = save(tmp_path / "a.mp4", film(4, 16, width))
    assert probe_video(path).width == width
    assert psnr(film(4, 16, width), read_all(path, height=16, width=width, fps=24)) > 20


def test_videos_that_cannot_be_read(tmp_path, capfd):
    def refuse(name, match, data=None):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        for read in (probe_video, lambda path: read_all(path, height=48, width=64, fps=24)):
            with pytest.raises(ValueError, match=match) as caught:
                read(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    whole = save(tmp_path / "a.mp4", film()).read_bytes()
    refuse("none.mp4", "does not exist")
    refuse("", "is not a file")
    refuse("empty.mp4", "is empty", b"")
    refuse("text.mp4", "not a video", b"words\n" * 1000)
    refuse("noise.mp4", "not a video", np.random.default_rng(0).bytes(20_000))
    refuse("cut.mp4", "cut short", whole[: len(whole) // 2])
    save_image(tmp_path / "a.png")
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", "-c:a", "aac", tmp_path / "sound.mp4")
    refuse("sound.mp4", "not a video")
    assert capfd.readouterr().err == ""


def test_a_video_damaged_inside_is_not_read_in_silence(tmp_path):
    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.mp4", rng.integers(0, 256, (48, 48, 64, 3), dtype=np.uint8))
    ffmpeg("-i", path, "-c", "copy", "-movflags", "+faststart", tmp_path / "b.mp4")
    data = bytearray((tmp_path / "b.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    (tmp_path / "b.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_all(tmp_path / "b.mp4", height=48, width=64, fps=24)


def test_wrong_requests_are_refused_at_once(tmp_path):
    path = save(tmp_path / "a.mp4", film(2))
    for options in ({"fps": 0}, {"height": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match=re.escape(f"{next(iter(options))}=0")):
            read_video(path, **{"height": 48, "width": 64, "fps": 24} | options)


# Images


def save_image(path, **options):
    Image.fromarray(film(1)[0]).save(path, **options)
    return path


def test_images(tmp_path):
    expected = film(1)[0]
    np.testing.assert_array_equal(read_image(save_image(tmp_path / "a.png"), 48, 64), expected)
    lossless = read_image(save_image(tmp_path / "a.webp", lossless=True), 48, 64)
    assert psnr(lossless, expected) > 36
    assert psnr(read_image(save_image(tmp_path / "a.jpg", quality=95, subsampling=0), 48, 64), expected) > 33
    assert read_image(save_image(tmp_path / "name.txt", format="PNG"), 32, 32).shape == (32, 32, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 64, 40), cover(expected[None], 64, 40)[0])


def test_camera_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(save_image(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif), 64, 48)
    assert psnr(turned, np.rot90(film(1)[0], -1)) > 33


def test_images_that_cannot_be_read(tmp_path):
    whole = save_image(tmp_path / "a.png").read_bytes()
    cases = {"text.png": (b"words", "not an image"), "empty.png": (b"", "empty"), "cut.png": (whole[:150], "decoded")}
    cases["sound.webp"] = (b"RIFF1234WAVEfmt ", "not an image")
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    for name, (_, match) in (cases | {"none.png": (0, "does not exist"), "": (0, "is not a file")}).items():
        with pytest.raises(ValueError, match=match) as caught:
            read_image(tmp_path / name, 48, 64)
        assert "\n" not in str(caught.value)


# Contact sheets


def test_choose():
    assert choose(81, 5) == [0, 20, 40, 60, 80]
    assert choose(3, 8) == [0, 1, 2]
    assert choose(100, 1) == [0]
    for num_frames in (10, 77, 4801):
        picks = choose(num_frames, 9)
        assert picks[0] == 0 and picks[-1] == num_frames - 1 and np.ptp(np.diff(picks)) <= 1
    with pytest.raises(ValueError, match="count=0"):
        choose(81, 0)


def test_labels():
    assert [label(t) for t in (0, 12.5, 59.94, 59.96, 65.04, 612.4)] == [
        "0.0 s", "12.5 s", "59.9 s", "1:00.0", "1:05.0", "10:12.4"
    ]  # fmt: skip


@pytest.mark.parametrize("n, columns, rows", [(1, 1, 1), (8, 8, 1), (11, 8, 2), (4, 2, 2)])
def test_contact_sheet(n, columns, rows):
    frames = film(n)
    sheet = contact_sheet(frames, [0.5 * i for i in range(n)], columns=columns if n > 1 else 8)
    height, width = 48 + 7 + 12, 64 + 4  # frame, label and gaps
    assert sheet.dtype == np.uint8 and sheet.shape == (4 + rows * height, 4 + columns * width, 3)
    for i, frame in enumerate(frames):
        top, left = 4 + i // columns * height, 4 + i % columns * width
        np.testing.assert_array_equal(sheet[top : top + 48, left : left + 64], frame)
        ink = (sheet[top + 52 : top + 59, left : left + 64] == INK).all(-1)
        assert ink.any(1).all() and 15 < ink.sum() < 80
        assert not (sheet[top + 48 : top + 52] == INK).any()


def test_labels_differ_and_fit_under_narrow_frames():
    narrow = np.zeros((2, 8, 8, 3), np.uint8)
    one, two = (contact_sheet(narrow, [0.0, t], columns=2) for t in (1.0, 4.0))
    assert one.shape == two.shape and one.shape[1] >= 2 * 25 and (one != two).any()


def test_contact_sheet_refusals():
    with pytest.raises(ValueError, match="2 times"):
        contact_sheet(film(3), [0.0, 1.0])
    with pytest.raises(ValueError, match="must be uint8"):
        contact_sheet(film(3)[0], [0.0])
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet(film(1), [0.0], columns=0)


def test_png_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.array(opened), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 13, 7), image)
    with pytest.raises(ValueError, match="must be uint8"):
        write_png(tmp_path / "b.png", image[..., 0])
