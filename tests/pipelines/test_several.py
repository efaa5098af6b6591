"""A file of prompts gives the videos that each prompt gives alone, on one process and on several."""

import json

import pytest

from pipelines.configure import configure
from pipelines.generate import generate
from pipelines.record import Meter
from tests.pipelines.conftest import load, read_json
from tests.pipelines.test_resume import FRAMES, cut, resume
from tests.pipelines.test_spread import run

PROMPTS = ["a red ball", "a green star", "a blue square on black"]
FEW = ["--num-frames", 29, "--num-steps", 3, "--threads", 1]


@pytest.fixture
def prompts(here):
    """A file of three prompts."""
    (here / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return here / "p.txt"


@pytest.fixture(scope="module")
def alone(model):
    """Hashes of the videos that the prompts make alone, by frames and steps."""
    found = {}

    def make(num_frames, num_steps):
        if (num_frames, num_steps) not in found:
            meters = [Meter() for _ in PROMPTS]
            for prompt, meter in zip(PROMPTS, meters, strict=True):
                given = configure(model=model, prompt=prompt, num_frames=num_frames, num_steps=num_steps, seed=5)
                assert sum(map(len, generate(given, meter))) == num_frames
            found[num_frames, num_steps] = [meter.latent_sha256 for meter in meters]
        return found[num_frames, num_steps]

    return make


def hold(here, expected, num_frames):
    """The videos of `here` are those expected, whole, and have their sidecars."""
    for number, (prompt, sha) in enumerate(zip(PROMPTS, expected, strict=True), 1):
        sidecar = read_json(here / f"v-{number}.json")
        assert sidecar["metrics"]["latent_sha256"] == sha and sidecar["ended"] == "complete"
        assert sidecar["config"]["prompt"] == prompt and len(load(here / f"v-{number}.mp4")) == num_frames
    assert len(set(expected)) == len(PROMPTS)


@pytest.mark.parametrize("num", [1, 2])
def test_each_is_the_video_that_its_prompt_makes_alone(model, here, prompts, alone, num):
    files = ["--output", here / "v.mp4", "--metrics", here / "m.json", "--save-latents", here / "l.safetensors"]
    ran = run(model, "generate", "--prompts-file", prompts, *FEW, "--nproc", num, *files)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(here / f"v-{number}.mp4") for number in (1, 2, 3)]
    hold(here, alone(29, 3), 29)
    found = [read_json(here / f"m-{number}.json") for number in (1, 2, 3)]
    assert len({x["passes"] for x in found}) == 1 and all(x["frames"] == 29 for x in found)
    kept = {path.name for path in here.iterdir()}
    assert kept == {"p.txt", *(f"{stem}-{n}{end}" for n in (1, 2, 3) for stem, end in
                               (("v", ".mp4"), ("v", ".json"), ("m", ".json"), ("l", ".safetensors")))}  # fmt: skip


def test_a_run_of_several_goes_on_on_another_number_of_processes(model, here, prompts, alone):
    """With the passes in hand that it began with, whatever the number now; not with other prompts."""
    said = cut(model, here, "generate", "--prompts-file", prompts, num=2, blocks=14)
    assert "go on with: longvid generate --resume" in said
    prompts.write_text("\n".join([*PROMPTS[:2], "something else"]))
    other = resume(here)
    assert other.returncode == 2 and "was made with prompt=" in other.stderr and len(other.stderr.splitlines()) == 1
    prompts.write_text("\n".join(PROMPTS))
    ran = resume(here, "--nproc", 1)
    assert ran.returncode == 0, ran.stderr
    hold(here, alone(FRAMES, 4), FRAMES)
    assert not (here / "v.run").exists()


def test_a_plan_of_several_fills_the_pipe(longvid, prompts):
    words = ["plan", "--num-frames", 13, "--num-steps", 3, "--nproc", 2, "--no-cfg-parallel", "--json"]
    one, three = (json.loads(longvid(*words, *more).out) for more in ([], ["--prompts-file", prompts]))
    assert three["idle_fraction"] < one["idle_fraction"] and one["makespan"] < three["makespan"] < 3 * one["makespan"]
    listed = longvid("plan", "--num-frames", 13, "--num-steps", 3, "--prompts-file", prompts)
    assert listed.code == 0 and "3 videos; block b of video v" in listed.out and "39 frames = 12 latents" in listed.out


@pytest.mark.parametrize("content, more, said", [
    (None, [], "none.txt is not a file; give a text file with a prompt in each line"),
    ("", [], "holds no prompt; write one a line"),
    ("# a ball\n\n", [], "none.txt holds no prompt"),
    (b"\xff\xfe", [], "is not text in UTF-8"),
    ("a ball\na star\n", ["--prompt", "a ball"], "both say what to show; give one of them"),
    ("a ball\na star\n", ["--output", "v.mp4"], "v-2.mp4 exists; give another name"),
    ("a ball\n" + "a star " * 40, [], "the prompt number 2 has"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(longvid, here, content, more, said):
    (here / "v-2.mp4").write_bytes(b"")
    if content is not None:
        (here / "none.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(here.iterdir())
    ran = longvid("generate", "--prompts-file", "none.txt", *FEW, *more)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1, ran.err
    assert sorted(here.iterdir()) == before


def test_names_left_out_are_free_ones(longvid, here, prompts):
    (here / "longvid-2.mp4").write_bytes(b"mine")
    ran = longvid("generate", "--prompts-file", prompts, "--num-frames", 5, "--num-steps", 1)
    assert ran.out.splitlines() == [f"longvid-2-{number}.mp4" for number in (1, 2, 3)], ran.err
    assert (here / "longvid-2.mp4").read_bytes() == b"mine"
