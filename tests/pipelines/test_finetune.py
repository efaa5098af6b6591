"""Real files to a fine-tuned model: films as a folder, what is wrong with one, the cache, a LoRA, and its merging."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longvid.checkpoints.diffusers_folder import load_dit, open_folder
from longvid.models.lora import FILE, add_lora, merge_lora, save_lora
from longvid.video_folder import nearest_shape, read_captions, read_clips
from pipelines.film_latents import LONG, OPENINGS, PICTURES
from pipelines.video_latents import ClipConfig, VideoLatents
from tests.pipelines.conftest import FPS, HEIGHT, WIDTH, load, save_film
from tests.pipelines.test_spread import ENVIRONMENT, command

STEPS = ("--steps", 4, "--batch-size", 2, "--log-every", 1, "--save-every", 2, "--num-frames", 37,
         "--clips-per-video", 2)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos: two of 49 frames, one upright, one short, and one that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    save_film(folder / "a.mp4", 49)
    save_film(folder / "b.mp4", 49, shade=90)
    save_film(folder / "upright.mp4", 41, height=64, width=32)
    save_film(folder / "short.mp4", 17)
    (folder / "torn.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    lines = [{"file": f"{name}.mp4", "caption": f"the film {name}"} for name in ("a", "b", "upright", "short", "torn")]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def records(ran) -> list[dict]:
    return [json.loads(line) for line in ran.out.splitlines()]


def test_films_are_written_as_a_folder(longvid, here):
    ran = longvid("data", "make", "--out", "films", "--films", 2, "--num-frames", 9, "--height", 32, "--width", 64,
                  model=None)  # fmt: skip
    assert ran.code == 0, ran.err
    found = read_captions(here / "films")
    assert [video.path.name for video in found] == ["film-000000.mp4", "film-000001.mp4"]
    assert all(video.caption for video in found) and load(found[0].path).shape == (9, 32, 64, 3)
    again = longvid("data", "make", "--out", "films", "--films", 2, model=None)
    assert again.code == 2 and "give another --out" in again.err


def test_clips_are_those_frames(tmp_path):
    path = save_film(tmp_path / "a.mp4", 80)
    clips = read_clips(path, [3, 70, 60], 10, height=HEIGHT, width=WIDTH, fps=FPS)
    whole = load(path)
    assert all((clip == whole[start : start + 10]).all() for clip, start in zip(clips, (3, 70, 60), strict=True))
    with pytest.raises(ValueError, match="ends after 80 frames, 81 were to be read"):
        read_clips(path, [71], 10, height=HEIGHT, width=WIDTH, fps=FPS)
    assert nearest_shape(1080, 1920, (480, 832), 16) == (480, 832)
    assert nearest_shape(1280, 720, (480, 832), 16) == (832, 480)
    assert nearest_shape(500, 520, (480, 832), 16) == (624, 624)


def test_a_model_is_fine_tuned_on_videos_resumed_and_loads(longvid, videos, model, here):
    words = ("dit", "--data", videos, "--out", "tuned", "--max-broken", 0.3, "--validate-every", 2, "--sample-every", 4,
             "--tensorboard", *STEPS)  # fmt: skip
    ran = longvid("train", *words)
    assert ran.code == 0, ran.err
    found = records(ran)
    assert "torn.mp4 is left out" in ran.err and found[0]["skipped"] == "torn.mp4"
    assert [r["step"] for r in found if "loss" in r] == [1, 2, 3, 4]
    assert len([r for r in found if "validation" in r]) == 2
    assert (here / "tuned/dit/samples/step-000004.png").is_file() and list((here / "tuned/dit/tensorboard").iterdir())
    old, new = (load_dit(open_folder(path), torch.float32) for path in (model, here / "tuned/model"))
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    stamps = {path: path.stat().st_mtime_ns for path in (here / "tuned/cache").iterdir()}
    shutil.move(here / "tuned/model", here / "first")
    again = longvid("train", *words, "--resume")
    assert again.code == 0 and stamps == {path: path.stat().st_mtime_ns for path in stamps}, "encoded once"
    shutil.rmtree(here / "tuned/model")
    other = longvid("train", *words, "--resume", "--lora", 2)
    assert other.code == 2 and "lora was 0, now 2" in other.err


@pytest.fixture
def films(longvid, here):
    ran = longvid("train", "latents", "--out", here, "--steps", 2)
    assert ran.code == 0, ran.err
    return here / "latents"


def test_a_model_learns_its_own_guidance_from_encoded_films(longvid, films, model, here):
    words = ("dit", "--data", films, "--batch-size", 2, "--log-every", 1, "--teacher-guidance", 3, "--steps", 2)
    ran = longvid("train", *words, "--out", "guided", "--validate-every", 2, "--picture-share", 0.5)
    assert ran.code == 0, ran.err
    found = records(ran)
    assert [r["step"] for r in found if "loss" in r] == [1, 2] and [r for r in found if "validation" in r]
    old, new = (load_dit(open_folder(path), torch.float32) for path in (model, here / "guided/model"))
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert json.loads((here / "guided/model/longvid.json").read_text())["method"] == "rolling"
    fast = longvid("train", *words, "--out", "fast", "--method", "rolling-fast")
    assert fast.code == 0, fast.err
    method = json.loads(longvid("generate", "--dry-run", model="fast/model").out)["method"]
    assert (method["name"], method["guidance_scale"]) == ("rolling-fast", 1.0)
    shutil.rmtree(here / "guided/model")
    other = longvid("train", *words, "--out", "guided", "--resume", "--teacher-guidance", 4)
    assert other.code == 2 and "teacher_guidance was 3.0, now 4.0" in other.err
    clips = longvid("train", *words, "--out", "other", "--fps", 8)
    assert clips.code == 2 and "fps is about clips of videos" in clips.err and not (here / "other").exists()


def test_batches_are_of_one_shape_and_length(tmp_path):
    shapes = {"wide": (4, 16, 2, 4), "upright": (4, 10, 4, 2), "short": (4, 4, 2, 4)}
    for name, shape in shapes.items():
        save_file({"latents": torch.randn(3, *shape).bfloat16()}, tmp_path / name)
    sets = VideoLatents([(tmp_path / name, name) for name in shapes]).sets()
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        clips, captions, gaps = sets[LONG.name].sample_runs(rng, 3)
        assert clips.shape[2] == 10 and len(set(captions)) == 1 and (captions[0] == "wide" or not gaps.any())
        seen |= set(captions)
        assert (
            sets[PICTURES.name].sample(rng, 3)[0].shape[2] == 1 and sets[OPENINGS.name].sample(rng, 3)[0].shape[2] == 4
        )
    assert seen == {"wide", "upright"}
    shown, hidden = VideoLatents([(tmp_path / name, name) for name in shapes]).split(rng, 0.3)
    assert sum(len(bucket) for part in (shown, hidden) for bucket in part.buckets.values()) == 9
    assert len(hidden.buckets) == 1 and not set(hidden.buckets) & set(shown.buckets)


def test_two_processes_fine_tune_a_lora_that_merges(model, videos, here, longvid):
    words = ["train", "dit", "--data", videos, "--lora", 2, "--max-broken", 0.3, "--dtype", "float32", *STEPS]
    one = longvid(*words, "--out", here / "1")
    assert one.code == 0, one.err
    given = command(model, *words, "--out", here / "2", "--nproc", 2)[:-2]
    two = subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert two.returncode == 0, two.stderr
    losses = [[r["loss"] for r in map(json.loads, out.splitlines()) if "loss" in r] for out in (one.out, two.stdout)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 4
    tensors = load_file(here / "2" / FILE)
    assert set(tensors) >= {f"transformer.blocks.{i}.attn{k}.{to}.lora_{ab}.weight" for i in (0, 1) for k in (1, 2)
                            for to in ("to_q", "to_out.0") for ab in "AB"}  # fmt: skip
    merged = longvid("lora", "merge", "--lora", here / "2" / FILE, "--out", "merged")
    assert merged.code == 0 and records(merged)[0]["layers"] == 16
    old, new = (load_dit(open_folder(path), torch.float32) for path in (model, here / "merged"))
    up, down = (tensors[f"transformer.blocks.1.attn2.to_v.lora_{ab}.weight"] for ab in "BA")
    torch.testing.assert_close(new.blocks["1"].attn2.to_v.weight - old.blocks["1"].attn2.to_v.weight, up @ down)


def lora_of(model, path):
    dit = load_dit(open_folder(model), torch.float32)
    add_lora(dit, 4)
    for name, p in dit.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    save_lora(path, dit)
    return dit


def test_merged_weights_do_what_the_adapters_do_and_diffusers_reads_them(model, tmp_path):
    adapted, merged = lora_of(model, tmp_path / FILE), load_dit(open_folder(model), torch.float32)
    assert merge_lora(merged, tmp_path / FILE) == 16
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 16)
    with torch.no_grad():
        one, two = (dit(x, torch.full((1, 3), 500.0), dit.text_features(text))[0] for dit in (adapted, merged))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    pytest.importorskip("peft", reason="diffusers loads LoRA with peft: pip install peft")
    from diffusers import SkyReelsV2Transformer3DModel
    from diffusers.loaders import SkyReelsV2LoraLoaderMixin

    theirs = SkyReelsV2Transformer3DModel.from_pretrained(model / "transformer")
    state = SkyReelsV2LoraLoaderMixin.lora_state_dict(tmp_path, weight_name=FILE)
    SkyReelsV2LoraLoaderMixin.load_lora_into_transformer(state, theirs)
    with torch.no_grad():
        three = theirs(x, torch.tensor([500]), text, return_dict=False)[0]
    torch.testing.assert_close(one, three, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("words, says", [
    (("--data", "nowhere"), "nowhere is not a folder"),
    (("--data", "empty"), "holds no captions.jsonl; write a line"),
    (("--data", "missing"), "names 1 files that are not there, first gone.mp4"),
    (("--data", "odd"), "line 1 is not as it must be"),
    (("--lora", 4), "lora is for training a model on, and no folder of videos or encoded films is given"),
    (("--teacher-guidance", 3), "teacher_guidance is for training a model on, and no folder"),
    (("--data", "good", "--teacher-guidance", -1), "teacher_guidance=-1.0 must be positive; try 3"),
    (("--data", "good", "--method", "rolling-fast"), "method is an option of the part distill, not of dit"),
    (("--data", "good", "--teacher-guidance", 3, "--method", "rolling"), "needs none; try rolling-fast"),
    (("--picture-share", 2), "picture_share=2.0 must be between 0 and 1"),
    (("--data", "good", "--num-frames", 40), "num_frames=40 of a clip must be 12n + 1"),
    (("--data", "good", "--height", 20), "height=20 must be a multiple of 8"),
    (("--data", "good", "--batch-size", 3, "--nproc", 2), "batch_size=3 cannot be split evenly over 2 processes"),
    (("--data", "good", "--nproc", 2, "--deepspeed", "zero9"), "neither a preset nor a file"),
    (("--data", "good", "--deepspeed", "zero2", "--optimizer", "muon"), "Muon needs whole matrices"),
    (("--data", "good", "--nproc", 2, "--multitask", "uw"), "multitask=uw weighs gradients of a whole batch"),
    (("--data", "good", "--max-broken", 2), "max_broken=2.0 must be at least 0"),
    (("--data", "good", "--nproc", 0), "nproc=0 must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(longvid, here, videos, words, says):
    for name, line in (("empty", None), ("missing", '{"file": "gone.mp4", "caption": ""}'), ("odd", "[1]")):
        (here / name).mkdir()
        if line:
            (here / name / "captions.jsonl").write_text(line + "\n")
    words = [videos if word == "good" else word for word in words]
    before = set(here.rglob("*"))
    model = {} if "--data" in words else {"model": None}
    ran = longvid("train", "dit", "--out", "out", *words, **model)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1, ran.err
    assert set(here.rglob("*")) == before


def test_too_many_broken_videos_are_an_error_that_names_the_first(longvid, here, videos):
    ran = longvid("train", "dit", "--data", videos, "--out", "out", *STEPS)
    assert ran.code == 2 and "1 of 5 videos cannot be used" in ran.err and "first torn.mp4" in ran.err


def test_a_lora_of_another_model_or_damaged_is_refused(model, tmp_path):
    lora_of(model, tmp_path / FILE)
    tensors, dit = load_file(tmp_path / FILE), load_dit(open_folder(model), torch.float32)
    cases = {
        "fit no layer": {name: torch.cat([t, t], 1) for name, t in tensors.items()},
        "not as diffusers names": {name.removeprefix("transformer."): t for name, t in tensors.items()},
    }
    for says, content in cases.items():
        save_file({name: t.contiguous() for name, t in content.items()}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=says):
            merge_lora(dit, tmp_path / "odd.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        merge_lora(dit, tmp_path / "torn.safetensors")
    assert ClipConfig(height=16, width=16, fps=8).num_frames == 61
