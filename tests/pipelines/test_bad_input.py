"""A wrong request: one line says what was given, the rule and what works; exit code 2; nothing is made or changed."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from longvid.contact_sheet import write_png
from longvid.media import VideoWriter
from tests.pipelines.conftest import TOKENS, film, save_film

QUICK = ("--num-inference-steps", 2)


@pytest.fixture
def refused(longvid, here):
    """Call the command, assert that it refuses as it should, in a line that holds all of `says`; returns the line."""

    def files():
        return {path: (path.is_dir() or path.read_bytes(), path.stat().st_mtime_ns) for path in here.rglob("*")}

    def call(command, *words, says=(), **options):
        before = files()
        answer = longvid(command, *words, **options)
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer
        assert answer.err.startswith("longvid") and "Traceback" not in answer.err
        assert not [word for word in says if word not in answer.err], answer.err
        assert files() == before
        return answer.err

    return call


@pytest.mark.parametrize(
    "words, says",
    [
        ("--method spiral", ["'spiral'", "rolling", "self-forcing"]),
        ("--num-frames 18", ["18", "4n + 1", "17 or 21"]),
        ("--num-frames 0", ["num_frames=0", "try 81"]),
        ("--num-frames -3", ["num_frames=-3", "try 81"]),
        ("--num-frames many", ["--num-frames", "'many'"]),
        ("--num-frames 17.5", ["--num-frames", "'17.5'"]),
        ("--seconds 0", ["seconds=0", "positive", "try 10"]),
        ("--seconds -1", ["seconds=-1", "positive", "try 10"]),
        ("--seconds nan", ["seconds=nan", "positive", "try 10"]),
        ("--seconds inf", ["seconds=inf", "positive", "try 10"]),
        ("--seconds 1e30", ["must be at most 400001", "extend it"]),
        ("--num-frames 400005", ["num_frames=400005", "at most 400001"]),
        ("--seconds 2 --num-frames 17", ["seconds=2", "num_frames=17", "one of them"]),
        ("--height 20", ["height=20", "multiple of 8", "16 or 24"]),
        ("--width 1", ["width=1", "multiple of 8", "8 or 16"]),
        ("--height 0", ["height=0", "at least 1", "try 16"]),
        ("--width -8", ["width=-8", "at least 1", "try 16"]),
        ("--fps 0", ["fps=0", "from 1 to 1000", "try 16"]),
        ("--fps 1001", ["fps=1001", "from 1 to 1000", "try 16"]),
        ("--num-inference-steps 0", ["num_steps=0", "from 1 to 1000", "try 16"]),
        ("--first-steps 0", ["first_steps=0", "from 1 to 1000", "try 16"]),
        ("--method dualparal --first-steps 8", ["--first-steps", "dualparal", "rolling"]),
        ("--num-inference-steps 1001", ["num_steps=1001", "from 1 to 1000", "try 16"]),
        ("--block-size 0", ["block_size=0", "at least 1"]),
        ("--method self-forcing --block-size 21", ["block_size=21", "max_keys=21", "try block_size 3"]),
        ("--lag -1", ["lag=-1", "at least 0"]),
        ("--num-inference-steps 4 --lag 5", ["lag=5", "num_steps=4", "try 4"]),
        ("--method dualparal --lag 2", ["--lag", "dualparal", "rolling"]),
        ("--method skyreels-sync --block-size 5", ["--block-size", "skyreels-sync", "rolling"]),
        ("--guidance-scale nan", ["guidance_scale=nan", "finite", "try 1.0"]),
        ("--guidance-scale=-inf", ["guidance_scale=-inf", "finite", "try 1.0"]),
        ("--flow-shift nan", ["flow_shift=nan", "between", "try 3"]),
        ("--flow-shift inf", ["flow_shift=inf", "between", "try 3"]),
        ("--flow-shift 0", ["flow_shift=0", "between", "try 3"]),
        ("--flow-shift 1e-30", ["flow_shift=1e-30", "between", "try 3"]),
        ("--seed -1", ["seed=-1", "at least 0"]),
        ("--seed 1.5", ["--seed", "'1.5'"]),
        ("--threads 0", ["threads=0", "at least 1", f"try {os.cpu_count()}"]),
        ("--device tpu", ["device='tpu'", "cpu, cuda"]),
        ("--dtype int8", ["dtype='int8'", "float32 or bfloat16"]),
        ("--vae-dtype float16", ["vae_dtype='float16'", "float32 or bfloat16"]),
        ("--device cpu --compile", ["compile is for GPUs", "leave --compile out"]),
        ("--frobnicate 1", ["--frobnicate"]),
        ("--promp words", ["--promp", "unrecognized"]),
        ("stray", ["stray", "unrecognized"]),
    ],
)
def test_numbers_and_names(refused, words, says):
    refused("generate", *words.split(), says=says)


def test_the_same_rules_hold_for_plan_and_extend(refused, here):
    save_film(here / "in.mp4", 9)
    for command in (["plan"], ["extend", "--video", "in.mp4"]):
        refused(*command, "--num-frames", 18, says=["17 or 21"])
        refused(*command, "--num-inference-steps", 0, says=["num_steps=0"])


def test_a_gpu_that_is_not_there(refused):
    index = torch.cuda.device_count()
    refused("generate", "--device", f"cuda:{index}", says=[f"cuda:{index}", f"{index} CUDA GPUs", "--device cpu"])
    if not index:
        refused("generate", "--device", "cuda", says=["0 CUDA GPUs", "--device cpu"])


def test_prompts(refused):
    refused("generate", "--prompt", "", says=["empty", '--prompt "'])
    refused("generate", "--prompt", " \n\t", says=["empty", '--prompt "'])
    long = "é" * 30
    says = ["the prompt", f"{2 * 30 + 1} tokens", f"{2 * 30 + 1 - TOKENS} more", f"{TOKENS}", "about 19 characters"]
    refused("generate", "--prompt", long, *QUICK, says=says)
    refused("generate", "--negative-prompt", long, *QUICK, says=[says[0].replace("the", "the negative"), *says[1:]])
    assert len(long[:19].encode()) + 1 <= TOKENS


# Models


def test_models_that_are_not_there(refused, tmp_path, here):
    (here / "file").write_text("words")
    (here / "folder").mkdir()
    refused("generate", model="nowhere", says=["nowhere", "not a folder", "hub id such as"])
    refused("generate", model="./no/where", says=["./no/where", "not a folder", "hub id such as"])
    refused("generate", model="", says=["not a folder", "hub id such as"])
    refused("generate", model="file", says=["file", "model_index.json"])
    refused("generate", model="folder", says=["folder", "model_index.json"])
    refused("generate", model="tiny-slow", says=["a model in the box (tiny, tiny-fast)"])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_folders_that_lack_a_part(refused, own_model, part):
    path = own_model / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused("generate", model=own_model, says=[part, str(own_model)])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_parts_without_weights_or_configuration(refused, own_model, part):
    (weights,) = (own_model / part).glob("*.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    refused("generate", model=own_model, says=[part, "no weights", weights.name])
    weights.write_bytes(whole)
    (own_model / part / "config.json").write_text("{")
    refused("generate", model=own_model, says=[part, "config.json", "JSON"])


@pytest.mark.parametrize(
    "part, tensor",
    [
        ("transformer", "blocks.1.ffn.net.2.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "shared.weight"),
    ],
)
def test_weights_that_are_cut_missing_or_of_another_shape(refused, own_model, part, tensor):
    (file,) = (own_model / part).glob("*.safetensors")
    whole = file.read_bytes()
    tensors = load(whole)
    length = int.from_bytes(whole[:8], "little")
    start, end = json.loads(whole[8 : 8 + length])[tensor]["data_offsets"]
    file.write_bytes(whole[: 8 + length + (start + end) // 2])
    refused("generate", model=own_model, says=[str(file), "cut short", repr(tensor)])
    save_file({**tensors, tensor: tensors[tensor][:-1].contiguous()}, file)
    refused("generate", *QUICK, model=own_model, says=[str(file), repr(tensor), str(tuple(tensors[tensor].shape))])
    save_file({name: value for name, value in tensors.items() if name != tensor}, file)
    refused("generate", *QUICK, model=own_model, says=[part, repr(tensor), "missing"])
    save_file({**tensors, "stray": torch.zeros(1)}, file)
    refused("generate", *QUICK, model=own_model, says=[str(file), "'stray'"])


# Outputs


def test_places_that_cannot_be_written(refused, here, tmp_path):
    (here / "folder.mp4").mkdir()
    (here / "file").write_text("words")
    refused("generate", "--output", "none/a.mp4", says=["none/a.mp4", "mkdir -p none"])
    refused("generate", "--output", "file/a.mp4", says=["file/a.mp4", "folder"])
    refused("generate", "--output", "folder.mp4", says=["folder.mp4", "is a folder", "folder.mp4/video.mp4"])
    refused("generate", "--output", ".", says=["is a folder"])
    refused("generate", "--output", "", says=["is a folder"])
    refused("generate", "--output", "a.avi", says=["a.avi", ".mp4", "try a.mp4"])
    refused("generate", "--output", "a", says=[".mp4", "try a.mp4"])
    refused("generate", "--output", "a" * 300 + ".mp4", says=["too long", "another name"])
    for flag in ("--metrics", "--save-latents", "--contact-sheet"):
        refused("generate", flag, "none/a", says=["none/a", "mkdir -p none"])
        refused("generate", flag, "folder.mp4", says=["folder.mp4", "is a folder"])
        refused("generate", "--output", "b.mp4", flag, "b.json", says=["b.json", "name of its own"])
        refused("generate", "--output", "b.mp4", flag, "../here/b.mp4", says=["b.mp4", "name of its own"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(refused, here):
    (here / "closed").mkdir(mode=0o555)
    refused("generate", "--output", "closed/a.mp4", says=["closed/a.mp4", "not writable"])
    refused("generate", "--metrics", "closed/a.json", says=["closed/a.json", "not writable"])


@pytest.mark.parametrize(
    "there, words",
    [
        ("a.mp4", ["--output", "a.mp4"]),
        ("a.json", ["--output", "a.mp4"]),
        ("b", ["--save-latents", "b"]),
        ("b", ["--metrics", "b"]),
        ("b", ["--contact-sheet", "b"]),
    ],
)
def test_files_that_exist(refused, longvid, here, there, words):
    (here / there).write_text("precious")
    refused("generate", *words, says=[there, "exists", "--overwrite"])
    refused("generate", *words, "--dry-run", says=[there, "exists", "--overwrite"])
    answer = longvid("generate", *words, "--overwrite", "--num-frames", 5, *QUICK)
    assert answer.code == 0 and (here / there).read_bytes() != b"precious"


def test_what_is_overwritten_stays_while_the_request_is_wrong(refused, own_model, here):
    (here / "a.mp4").write_text("precious")
    (file,) = (own_model / "vae").glob("*.safetensors")
    tensors = load(file.read_bytes())
    tensors.popitem()
    save_file(tensors, file)
    refused("generate", "--output", "a.mp4", "--overwrite", model=own_model, says=["missing"])


def test_a_disk_that_is_too_small(refused, longvid, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=17 * 2**20))
    refused("generate", "--seconds", 10**4, says=["17 MiB free", "80001 frames", "shorter"])
    assert longvid("generate", "--seconds", 1, "--dry-run").code == 0


# Inputs


def test_images_that_cannot_be_read(refused, here):
    (here / "empty.png").touch()
    (here / "words.png").write_text("words")
    write_png(here / "whole.png", film(1)[0])
    (here / "cut.png").write_bytes((here / "whole.png").read_bytes()[:70])
    (here / "folder.png").mkdir()
    save_film(here / "film.mp4", 2)
    for name, says in {
        "none.png": "does not exist", "empty.png": "is empty", "words.png": "PNG, JPEG or WebP", "": "not a file",
        "cut.png": "cannot be decoded", "folder.png": "not a file", "film.mp4": "PNG, JPEG or WebP",
    }.items():  # fmt: skip
        refused("generate", "--image", name, says=[name, says])
    refused("generate", "--image", "whole.png", "--num-frames", 1, says=["num_frames=1", "after the image", "try 81"])
    refused("generate", "--image", "whole.png", "--contact-sheet", "whole.png", "--overwrite", says=["is the input"])


def test_videos_that_cannot_be_read(refused, here):
    save_film(here / "film.mp4", 9)
    save_film(here / "single.mp4", 1)
    (here / "empty.mp4").touch()
    (here / "words.mp4").write_text("words")
    (here / "cut.mp4").write_bytes((here / "film.mp4").read_bytes()[:600])
    write_png(here / "picture.png", film(1)[0])
    for name, says in {
        "none.mp4": "does not exist", "empty.mp4": "is empty", "words.mp4": "not a video", "cut.mp4": "cut short",
        ".": "not a file", "single.mp4": "at least 2",
    }.items():  # fmt: skip
        refused("extend", "--video", name, says=[name, says])
    refused("extend", says=["--video"], model=None)
    refused("extend", "--video", "film.mp4", "--num-frames", 1, says=["num_frames=1", "adds nothing", "try 81"])
    refused("extend", "--video", "film.mp4", "--image", "picture.png", says=["--image"])


def test_an_output_that_is_the_input(refused, here):
    save_film(here / "in.mp4", 9)
    os.symlink("in.mp4", here / "link.mp4")
    os.link(here / "in.mp4", here / "twin.mp4")
    for name in ("in.mp4", "../here/in.mp4", "link.mp4", "twin.mp4"):
        refused("extend", "--video", "in.mp4", "--output", name, "--overwrite", says=[name, "is the input"])
    for flag in ("--metrics", "--save-latents", "--contact-sheet"):
        refused("extend", "--video", "in.mp4", flag, "in.mp4", "--overwrite", says=["in.mp4", "is the input"])


def test_a_video_damaged_in_the_middle_keeps_what_was_made(longvid, here):
    """Only reading finds it, when frames have been written: it failed while running."""
    with VideoWriter(here / "whole.mp4", height=64, width=64, fps=8) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (130, 64, 64, 3), dtype=np.uint8))
    remux = ["-i", here / "whole.mp4", "-c", "copy", "-movflags", "+faststart", here / "in.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *remux], check=True)
    whole = bytearray((here / "in.mp4").read_bytes())
    middle = len(whole) * 3 // 4
    whole[middle : middle + 20_000] = bytes(20_000)
    (here / "in.mp4").write_bytes(whole)
    answer = longvid("extend", "--video", "in.mp4", "--output", "out.mp4", "--num-frames", 5, *QUICK, "--quiet")
    assert answer.code == 1 and answer.out == "", answer
    kept, way_on, failed = answer.err.splitlines()
    assert way_on == "go on with: longvid generate --resume out.run"
    assert kept.startswith("out.mp4 holds the") and failed.startswith("longvid extend failed: in.mp4 is cut short")
    assert json.loads((here / "out.json").read_text())["ended"] == "failed"
