"""Commands on several processes: the same video, nothing left running, and one line for what is wrong."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.pipelines.conftest import FPS, HEIGHT, WIDTH, film, load, read_json, save_film

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command(model, *words) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, words), "--model", str(model), "--seed", "5"]


def run(model, *words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(model, *words), env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
                          check=False, **options)  # fmt: skip


def picture(path) -> Path:
    from longvid.contact_sheet import write_png

    write_png(path, film(1)[0])
    return path


@pytest.mark.parametrize("kind", ["generate", "image", "extend", "lanes"])
def test_several_processes_make_the_video_of_one(model, longvid, here, kind):
    """Whether they cut the decoder or not."""
    words = {
        "generate": lambda: ["generate"],
        "image": lambda: ["generate", "--image", picture(here / "first.png")],
        "lanes": lambda: ["generate"],
        "extend": lambda: ["extend", "--video", save_film(here / "given.mp4", 9)],
    }[kind]()
    words += ["--num-frames", 29, "--num-steps", 3]
    found, lanes = {}, ["--cfg-parallel"] * (kind == "lanes")
    spread = {"one": (1, []), "two": (2, ["--no-parallel-vae", *lanes]), "cut": (2, ["--parallel-vae", *lanes]),
              "four": (4, ["--parallel-vae"])}  # fmt: skip
    for name, (num, more) in spread.items():
        out = [*words, "--output", here / f"{name}.mp4", "--metrics", here / f"{name}-m.json", "--threads", 1]
        ran = run(model, *out, "--nproc", num, *more)
        assert ran.returncode == 0 and ran.stdout == f"{here / f'{name}.mp4'}\n", ran.stderr
        found[name] = read_json(here / f"{name}-m.json")
        assert all(len(found[name][each]) == num for each in ("idle_fraction", "peak_memory_mb", "bytes_sent"))
        assert all(found[name][each] == found["one"][each] for each in ("latent_sha256", "frames", "passes"))
        assert (load(here / f"{name}.mp4") == load(here / "one.mp4")).all()
    assert found["one"]["bytes_sent"] == [0] and all(found["two"]["bytes_sent"])
    assert [found[name]["layout"]["decoder_back"] for name in spread] == [0, 0, 1, 3]
    assert all(more > less for more, less in zip(found["cut"]["bytes_sent"], found["two"]["bytes_sent"], strict=True))


def test_two_processes_share_heads(model, here):
    """The same video but for rounding, half of the features each, and the exchanges are in the metrics."""
    words = ["generate", "--num-frames", 29, "--num-steps", 3, "--threads", 1]
    for num, more in ((1, []), (2, ["--sequence-parallel", 2, "--trace", here / "t.json"])):
        out = ["--output", here / f"{num}.mp4", "--metrics", here / f"m{num}.json", "--save-latents", here / f"l{num}"]
        ran = run(model, *words, *out, "--nproc", num, *more)
        assert ran.returncode == 0, ran.stderr
    one, two = (load_file(here / f"l{num}")["latents"] for num in (1, 2))
    assert (one - two).abs().max() <= 1e-5 * one.abs().max()
    found = [read_json(here / f"m{num}.json") for num in (1, 2)]
    assert [x["layout"]["sequence"] for x in found] == [1, 2] and found[1]["layout"]["stages"] == 1
    assert found[0]["bytes_exchanged"] == [0] and 0 < found[1]["bytes_exchanged"][1] < found[1]["bytes_sent"][1]
    assert all(0 < x < found[1]["wall_s"] for x in found[1]["exchange_s"])
    events = [event for event in read_json(here / "t.json")["traceEvents"] if event["name"] == "pass"]
    assert len(events) == 4 * found[0]["passes"], "two processes, measured and planned"


def test_torchrun_is_a_launcher_too(model, here):
    """One seed for all, though none was given."""

    def seed():
        return str(read_json(here / "t.json")["config"]["seed"])

    words = ["generate", "--num-frames", "13", "--num-steps", "2", "--model", str(model)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launched, name, more in ((launcher, "t.mp4", lambda: []), ([], "a.mp4", lambda: ["--seed", seed()])):
        child = [sys.executable, *launched, "-m", "pipelines.cli", *words, *more(), "--output", str(here / name)]
        ran = subprocess.run(child, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
        assert ran.returncode == 0, ran.stderr
    hashes = [read_json(here / name)["metrics"]["latent_sha256"] for name in ("t.json", "a.json")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("num", [3, 0])
def test_a_process_needs_a_layer(longvid, here, num):
    ran = longvid("generate", "--nproc", num)
    assert ran.code == 2 and f"nproc={num} makes {num} stages" in ran.err, ran.err
    assert len(ran.err.splitlines()) == 1
    assert not list(here.iterdir())


def test_a_prompt_that_is_too_long_is_said_once(model, here):
    ran = run(model, "generate", "--nproc", 2, "--prompt", "a ball " * 40, "--output", here / "x.mp4")
    assert ran.returncode == 2 and ran.stderr.count("tokens") == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert not list(here.iterdir())


@pytest.mark.parametrize("rank, kind, code", [
    (0, signal.SIGKILL, 1), (1, signal.SIGKILL, 1), (None, signal.SIGINT, 130),
], ids=["with-the-file", "without", "launcher"])  # fmt: skip
def test_when_one_ends_all_end_and_the_video_plays(model, here, rank, kind, code):
    words = command(model, "generate", "--nproc", 2, "--threads", 1, "--num-frames", 40001, "--output", here / "k.mp4")
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(here / "k.json")
        workers = workers_of(child.pid)
        assert len(workers) == 2
        os.kill(child.pid if rank is None else workers[rank], kind)
        start = time.monotonic()
        err = child.communicate(timeout=30)[1]
        assert time.monotonic() - start < 30
    finally:
        child.kill()
    assert child.returncode == code and "Traceback" not in err, err
    assert rank == 0 or "frames made so far and plays" in err
    assert f"go on with: longvid generate --resume {here / 'k.run'}" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "nothing is left running"
    frames = load(here / "k.mp4")
    assert len(frames) >= 1 and frames.shape[1:] == (HEIGHT, WIDTH, 3) and FPS


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_machines_make_the_video_of_one(model, here):
    """Two launchers that meet at a port, as on two machines; the files are on the first."""
    words = ["generate", "--num-frames", 29, "--num-steps", 3, "--threads", 1]
    ran = run(model, *words, "--output", here / "alone.mp4")
    assert ran.returncode == 0, ran.stderr
    endpoint = f"127.0.0.1:{free_port()}"
    machines = []
    for rank in (0, 1):
        more = ["--nnodes", 2, "--node-rank", rank, "--rdzv-endpoint", endpoint, "--output", here / "both.mp4"]
        machines.append(subprocess.Popen(command(model, *words, *more), env=ENVIRONMENT, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True))  # fmt: skip
    said = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert said[0][0].strip() == str(here / "both.mp4") and said[1][0] == ""
    hashes = [read_json(here / name)["metrics"]["latent_sha256"] for name in ("alone.json", "both.json")]
    assert hashes[0] == hashes[1]


def wait_for(path, seconds=150):
    """Until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def test_a_process_that_hangs_ends_all(model, here):
    """No connection is closed: only the beats stop."""
    words = command(model, "generate", "--nproc", 2, "--threads", 1, "--num-frames", 40001, "--output", here / "k.mp4")
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(here / "k.json")
        workers = workers_of(child.pid)
        os.kill(workers[1], signal.SIGSTOP)
        err = child.communicate(timeout=30)[1]
    finally:
        child.kill()
    assert child.returncode == 1 and "nothing was heard of the process of rank 1" in err and "Traceback" not in err, err
    assert "go on with: longvid generate --resume" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "nothing is left running"
    assert len(load(here / "k.mp4")) >= 1


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them: commands to run in each, and one to cut the cable."""
    name = f"lv{secrets.token_hex(2)}"
    hosts = [f"{name}a", f"{name}b"]
    steps = [["netns", "add", host] for host in hosts]
    steps.append(["link", "add", f"{name}x", "netns", hosts[0], "type", "veth", "peer", f"{name}x", "netns", hosts[1]])
    for place, host in enumerate(hosts, 1):
        inside = ["netns", "exec", host, "ip"]
        steps += [[*inside, "addr", "add", f"10.77.0.{place}/24", "dev", f"{name}x"],
                  [*inside, "link", "set", f"{name}x", "up"], [*inside, "link", "set", "lo", "up"]]  # fmt: skip
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
        yield SimpleNamespace(
            inside=[["ip", "netns", "exec", host] for host in hosts], address="10.77.0.1", interface=f"{name}x",
            cut=["ip", "netns", "exec", hosts[1], "ip", "link", "set", f"{name}x", "down"],
        )  # fmt: skip
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def test_machines_whose_link_is_cut_both_end(model, here, two_hosts):
    words = ["generate", "--num-frames", 40001, "--threads", 1, "--nnodes", 2, "--output", here / "v.mp4",
             "--rdzv-endpoint", f"{two_hosts.address}:29477"]  # fmt: skip
    environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": two_hosts.interface, "TP_SOCKET_IFNAME": two_hosts.interface}
    machines = [
        subprocess.Popen([*two_hosts.inside[rank], *command(model, *words, "--node-rank", rank)], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        wait_for(here / "v.json")
        subprocess.run(two_hosts.cut, check=True)
        start = time.monotonic()
        said = [machine.communicate(timeout=60)[1] for machine in machines]
        assert time.monotonic() - start < 30
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [1, 1], said
    assert all("nothing was heard of the process of rank" in err for err in said), said
    assert f"go on with: longvid generate --resume {here / 'v.run'}" in said[0]
    assert len(load(here / "v.mp4")) >= 1


@pytest.mark.parametrize("taken", [False, True], ids=["nobody-comes", "port-in-use"])
def test_machines_that_do_not_meet(model, here, taken):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if taken:
            other.listen()
        endpoint = f"127.0.0.1:{other.getsockname()[1] if taken else free_port()}"
        ran = run(model, "generate", "--nnodes", 2, "--node-rank", 0, "--rdzv-endpoint", endpoint, "--rdzv-timeout", 3,
                  "--output", here / "x.mp4")  # fmt: skip
    assert ran.returncode == 2 and f"the 2 machines did not meet at {endpoint} within 3 s" in ran.stderr, ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and not list(here.iterdir())


@pytest.mark.parametrize("words, said", [
    (["--nnodes", 2, "--node-rank", 2, "--rdzv-endpoint", "a:1"], "node_rank=2 of nnodes=2"),
    (["--nnodes", 2, "--node-rank", 0], "must be HOST:PORT"),
    (["--nproc", 3, "--sequence-parallel", 3], "sequence_parallel=3 must divide the model's 2 heads; use 1 or 2"),
    (["--nproc", 3, "--stages", 2], "stages x sequence x lanes = 2 x 1 x 1 is 2, not nproc=3"),
    (["--nproc", 2, "--max-restarts", -1], "max_restarts=-1 must be at least 0"),
    (["--nproc", 2, "--rdzv-timeout", 0], "rdzv_timeout=0 must be at least 1"),
])  # fmt: skip
def test_wrong_ways_to_launch(longvid, here, words, said):
    ran = longvid("generate", *words)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1
    assert not list(here.iterdir())
