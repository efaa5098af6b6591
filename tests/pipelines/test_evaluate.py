"""`longvid evaluate`: folders of videos and prompts of a model, what it writes, and what it refuses."""

import csv
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longvid.media import VideoWriter
from longvid.worlds import draw
from pipelines.evaluate import borders_of, evaluate_video, find_sources
from pipelines.evaluate_prompts import HELD_OUT, held_out_prompts, prompts_of
from pipelines.evaluate_report import FILES
from pipelines.film_features import CLIP_FRAMES, clips_of, frechet
from pipelines.methods import METHODS
from tests.pipelines.conftest import save_film

QUICK = ("--num-inference-steps", 2, "--num-frames", 17, "--no-frechet")


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Two true films of three seconds, with sidecars of the method `rolling`; the first has latents."""
    folder = tmp_path_factory.mktemp("films")
    for name, prompt in zip("ab", held_out_prompts(), strict=False):
        with VideoWriter(folder / f"{name}.mp4", height=128, width=128, fps=16) as writer:
            writer.write(draw(prompt.world, 49))
        method = {key: getattr(METHODS["rolling"](), key) for key in METHODS["rolling"]().__dataclass_fields__}
        config = {"prompt": prompt.text, "image": None, "method": method}
        (folder / f"{name}.json").write_text(json.dumps({"config": config}))
    latents = torch.randn(4, 13, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents + torch.arange(13)[:, None, None]}, folder / "a.safetensors")
    return folder


def png_size(path) -> tuple[int, int]:
    """Width and height; the picture is whole."""
    data = path.read_bytes()
    width, height = struct.unpack(">2I", data[16:24])
    begin = data.index(b"IDAT") + 4
    assert len(zlib.decompress(data[begin : -12 - 4])) == height * (1 + 3 * width)
    return width, height


def test_a_folder_of_true_films(longvid, films, here):
    answer = longvid("evaluate", films, "--out", "found", "--no-frechet", model=None)
    assert answer.code == 0, answer.err
    assert "2 videos, 49 frames" in answer.out and "a.mp4: colour 1.00, shape 1.00" in answer.err
    found = json.loads((here / "found" / FILES[0]).read_text())
    assert [video["video"] for video in found["videos"]] == ["a.mp4", "b.mp4"] and found["frechet"] is None
    for part in ("share", "first_10s", "last_10s"):
        assert set(found["mean"]["adherence"][part].values()) == {1.0}
    assert 0.8 < found["mean"]["seam_ratio"] < 1.3 and found["mean"]["still_share"] == 0
    assert found["videos"][1]["latents"] is None
    assert found["videos"][0]["latents"]["worst_mean"] == pytest.approx(4 * 60 / 1.1, rel=0.3)
    with (here / "found" / FILES[1]).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["video"], row["second"]) for row in rows] == [(f"{v}.mp4", str(s)) for v in "ab" for s in range(3)]
    assert all(row["shape"] == "1" and row["read_things"] and float(row["sharpness"]) > 0 for row in rows)
    assert png_size(here / "found" / FILES[2])[0] > 1000


def test_a_prompt_for_videos_without_sidecars(longvid, films, here):
    shutil.copy(films / "b.mp4", here / "alone.mp4")
    words = ("evaluate", "alone.mp4", "--out", "found", "--no-frechet", "--quiet")
    assert longvid(*words, model=None).code == 0
    alone = json.loads((here / "found" / FILES[0]).read_text())["videos"][0]
    assert alone["adherence"] is None and alone["seam_ratio"] is None and alone["prompt"] is None
    assert longvid(*words, "--overwrite", "--prompt", "a green star spins", model=None).code == 0
    asked = json.loads((here / "found" / FILES[0]).read_text())["videos"][0]
    assert asked["adherence"]["share"]["shape"] == 0 and asked["drift"] == alone["drift"]
    assert longvid(*words, "--overwrite", "--prompt", "a cat", model=None).code == 0


def test_a_model_and_its_prompts(longvid, here):
    (here / "prompts.txt").write_text("# two\na red ball bounces\n\na cat\n")
    answer = longvid("evaluate", "--prompts", "prompts.txt", "--out", "found", "--seed", 5, *QUICK)
    assert answer.code == 0, answer.err
    found = json.loads((here / "found" / FILES[0]).read_text())
    assert [video["prompt"] for video in found["videos"]] == ["a red ball bounces", "a cat"]
    sidecars = [json.loads((here / "found" / "videos" / f"00{i}.json").read_text())["config"] for i in (0, 1)]
    assert [config["seed"] for config in sidecars] == [5, 6]
    assert found["videos"][0]["adherence"] and found["videos"][1]["adherence"] is None
    assert all(video["latents"]["worst_mean"] >= 0 and video["seam_ratio"] > 0 for video in found["videos"])
    again = longvid("evaluate", "--prompts", "prompts.txt", "--out", "found", *QUICK)
    assert again.code == 2 and "exists" in again.err and "--overwrite" in again.err


def test_held_out_prompts_are_the_same_each_time():
    found = held_out_prompts()
    assert found == prompts_of(HELD_OUT) and len({prompt.text for prompt in found}) == 32
    assert {thing.motion for prompt in found for thing in prompt.world.things} >= {"bounces", "spins", "circles"}


def test_borders_are_those_of_the_method():
    config = {"method": {key: getattr(METHODS["rolling"](), key) for key in METHODS["rolling"]().__dataclass_fields__}}
    assert borders_of(json.loads(json.dumps(config)), 49)[:3] == (1, 13, 25)
    assert borders_of(config, 44)[-1] < 44, "a video that was cut"


def test_a_seam_is_seen(films, tmp_path):
    frames = draw(held_out_prompts()[1].world, 49).astype(int)
    for border in range(1, 49, 12):
        frames[border:] += 3
    with VideoWriter(tmp_path / "a.mp4", height=128, width=128, fps=16) as writer:
        writer.write(frames.clip(0, 255).astype(np.uint8))
    shutil.copy(films / "a.json", tmp_path / "a.json")
    (source,) = find_sources(tmp_path)
    assert source.borders == (1, 13, 25, 37)
    assert evaluate_video(source).figures["seam_ratio"] > 1.5


def test_clips_and_their_distance_to_true_films():
    prompts = held_out_prompts()
    film = draw(prompts[1].world, 160)
    clips = clips_of(film, 16)
    assert clips.shape[1] == CLIP_FRAMES and len(clips) == 8 and (clips[0] == film[:CLIP_FRAMES]).all()
    assert len(clips_of(film[:10], 16)) == 0 and clips_of(film, 32).shape[1] == CLIP_FRAMES
    true = frechet(clips, [prompts[1].world])
    grey = frechet(np.full_like(clips, 128), [prompts[1].world])
    assert true["distance"] < grey["distance"] / 5 and true["true_to_true"] < grey["distance"] / 5
    assert frechet(clips[:1], [prompts[1].world]) is None


@pytest.mark.parametrize(
    "words, says",
    [
        ("missing --out found", ["missing", "not there"]),
        ("empty --out found", ["empty", "no video", ".mp4"]),
        ("text.mp4 --out found", ["text.mp4"]),
        ("--out found", ["--prompts"]),
        ("film.mp4 --prompts p.txt --out found", ["not both"]),
        ("film.mp4 --out text.mp4", ["text.mp4", "not a folder"]),
        ("film.mp4 --out no/found", ["mkdir -p no"]),
        ("film.mp4 --out full", ["evaluation.json exists", "--overwrite"]),
        ("film.mp4 --seed 3 --out found", ["--seed", "leave it out"]),
        ("film.mp4 --num-steps 3 --out found", ["--num-inference-steps"]),
        ("--prompts gone.txt --out found", ["gone.txt", "prompt in each line"]),
        ("--prompts p.txt --out found", ["p.txt", "no prompt"]),
        ("--prompts held-out --num-prompts 0 --out found", ["num_prompts=0"]),
        ("--prompts held-out --prompt x --out found", ["--prompt and --prompts"]),
        ("--prompts held-out --num-frames 18 --out found", ["18", "4n + 1"]),
        ("bad.mp4 --out found", ["bad.json", "move it away"]),
    ],
)
def test_wrong_requests(longvid, here, words, says):
    for name in ("empty", "full"):
        (here / name).mkdir()
    (here / "full" / FILES[0]).write_text("{}")
    (here / "text.mp4").write_text("no video")
    (here / "p.txt").write_text("\n# nothing\n")
    for name in ("film", "bad"):
        save_film(here / f"{name}.mp4", 9)
    (here / "bad.json").write_text('{"config": {"method": {}}}')
    before = sorted(here.rglob("*"))
    answer = longvid("evaluate", *words.split(), model=None)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer
    assert all(word in answer.err for word in says), answer.err
    assert sorted(here.rglob("*")) == before
