"""`longvid plan --nproc`: text, JSON, chart, and what cannot be."""

import json

import pytest
import torch
from PIL import Image

from pipelines import calibrate
from pipelines.configure import configure

QUICK = ("--num-frames", 49, "--num-steps", 3)


def test_text_and_json_say_the_same(longvid):
    words = ["plan", *QUICK, "--nproc", 2, "--layer-ms", 2, "--decode-ms", 1, "--link-ms", 0.1, "--link-gbps", 8]
    lanes = json.loads(longvid(*words, "--json", "--cfg-parallel").out)
    chosen = json.loads(longvid(*words, "--json").out)
    words.append("--no-cfg-parallel")
    text, found = longvid(*words), json.loads(longvid(*words, "--json").out)
    assert text.code == 0 and f"makespan {found['makespan']:.4g} s" in text.out and len(text.out.splitlines()) == 4
    assert found["stages"] == 2 and 1 < found["speed_up"] < 2 and 0 < found["idle_fraction"] < 1
    assert [p["layers"] for p in found["processes"]] == [[1, 2], [0, 1]]
    assert chosen["makespan"] == min(lanes["makespan"], found["makespan"])
    assert lanes["lanes"] == 2 and [p["lane"] for p in lanes["processes"]] == [0, 1]


def test_processes_that_share_heads_send_what_attention_needs(longvid):
    words = ["plan", *QUICK, "--nproc", 2, "--layer-ms", 2, "--link-gbps", 8, "--json"]
    found = [json.loads(longvid(*words, *more).out) for more in (["--no-cfg-parallel"], ["--sequence-parallel", 2])]
    stages, bands = (x["processes"] for x in found)
    assert found[1]["sequence"] == 2 and [p["band"] for p in bands] == [0, 1]
    assert all(p["layers"] == [0, 2] and p["features_bytes"] == stages[0]["features_bytes"] for p in bands)
    assert all(p["weights_bytes"] == 2 * stages[0]["weights_bytes"] for p in bands)
    assert min(p["bytes_sent"] for p in bands) > max(p["bytes_sent"] for p in stages)


def test_without_costs_times_are_in_units(longvid):
    found = json.loads(longvid("plan", *QUICK, "--nproc", 1, "--json").out)
    assert found["unit"] == "units" and found["speed_up"] == 1 and found["processes"][0]["idle"] == 0
    passes = json.loads(longvid("plan", *QUICK, "--json").out)["passes"]
    assert found["makespan"] == 2 * sum(c["stop"] - c["start"] for p in passes for c in p["covers"])


def test_measured_costs_are_seconds(longvid):
    threads = torch.get_num_threads()
    found = json.loads(longvid("plan", *QUICK, "--nproc", 2, "--calibrate", "--json").out)
    assert found["unit"] == "s" and 0 < found["makespan"] < 60
    assert torch.get_num_threads() == threads


def test_a_chart_has_a_band_for_each_process_and_a_colour_for_each_block(longvid, here):
    assert longvid("plan", *QUICK, "--nproc", 2, "--layer-ms", 2, "--chart", "c.png").code == 0
    image = Image.open(here / "c.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(100000)}
    assert len(colours) > 8 and (255, 255, 255) in colours
    again = longvid("plan", *QUICK, "--nproc", 2, "--chart", "c.png")
    assert again.code == 2 and "c.png exists" in again.err


@pytest.mark.parametrize("words, said", [
    (["--nproc", 3], "nproc=3 makes 3 stages"),
    (["--nproc", 2, "--layer-ms", -1], "per_latent="),
    (["--nproc", 2, "--link-gbps", 0], "bandwidth="),
    (["--nproc", 2, "--guidance-scale", 1, "--cfg-parallel"], "guidance scale of 1"),
    (["--nproc", 2, "--chart", "none/c.png"], "mkdir -p none"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(longvid, here, words, said):
    ran = longvid("plan", *QUICK, *words)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1 and not ran.out
    assert not list(here.iterdir())


def test_of_a_long_plan_the_beginning_is_rehearsed(model, monkeypatch):
    """A method may go through thousands of passes before its first block leaves."""
    run, seen = configure(model=model, method="dualparal", num_frames=401), []
    monkeypatch.setattr(calibrate, "sample", lambda plan, *_, **__: seen.append(len(plan.passes)) or iter(()))
    plan = run.plan()
    for care in (calibrate.BRIEF, calibrate.THOROUGH):
        calibrate.measured_costs(run, plan, latency=0.0, bandwidth=1e9, care=care)
    assert seen == [calibrate.BRIEF.rehearsed, calibrate.THOROUGH.rehearsed] and len(plan.passes) > 2 * seen[1]
