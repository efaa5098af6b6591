"""Links of each kind bring what was sent, in order, without a deadlock; and say so when the other end is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.memory_link import MemoryReceiver, MemorySender
from tests.parallel.connections import SIZES

ROOT = Path(__file__).parents[2]
NUM = 3


@pytest.fixture(scope="module")
def talked(tmp_path_factory):
    """What each of some processes has found, by rank."""
    out = tmp_path_factory.mktemp("talked")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM}",
             "-m", "tests.parallel.connections", str(out)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM)]


def kinds(talked, name):
    """Classes of the two ends of each link, by the rank that sends."""
    ends = [(talked[rank][name]["to"], talked[(rank + 1) % NUM][name]["from"]) for rank in range(NUM)]
    assert all((sender[1], receiver[1]) == ((rank + 1) % NUM, rank) for rank, (sender, receiver) in enumerate(ends))
    return [(sender[0].removesuffix("Sender"), receiver[0].removesuffix("Receiver")) for sender, receiver in ends]


def test_processes_of_one_machine_share_memory_and_machines_do_not(talked):
    assert kinds(talked, "near") == [("Memory", "Memory")] * NUM
    assert kinds(talked, "far") == [("Group", "Group")] * NUM


def test_where_memory_cannot_be_shared_both_ends_know(talked):
    assert kinds(talked, "refused") == [("Group", "Group"), ("Memory", "Memory"), ("Memory", "Memory")]


@pytest.mark.parametrize("name", ["near", "refused", "far"])
def test_all_messages_come_whole_and_in_order(talked, name):
    """Also one of 128 MiB that everybody sends before anybody listens."""
    assert all(found[name]["came"] == [True] * len(SIZES) for found in talked)
    assert {found[name]["bytes"] for found in talked} == {4 * sum(SIZES)}


@pytest.mark.parametrize("name", ["measured", "measured far"])
def test_a_link_is_measured_by_the_two_at_its_ends(talked, name):
    ends = [talked[0][name], talked[NUM - 1][name]]
    assert all(0 < end["latency"] < 0.5 and end["bandwidth"] > 1e7 and 0 < end["message"] < 0.5 for end in ends)
    assert talked[1][name] == {"latency": 0.0, "bandwidth": float("inf"), "message": 0.0}


def both_ends():
    """Both ends of a link in this process."""
    sender = MemorySender(1)
    receiver = MemoryReceiver(sender.address, 0)
    sender.connected()
    return sender, receiver


def test_memory_is_used_again_but_not_before_a_message_has_arrived():
    sender, receiver = both_ends()
    generator = torch.Generator().manual_seed(0)
    kinds = [((3, 5), torch.float32), ((70_000,), torch.bfloat16), ((2, 3, 4), torch.uint8), ((1,), torch.float32)]
    messages = [kinds[i % 4] for i in range(400)]
    receiver.expect(messages)
    sent = [torch.randn(shape, generator=generator).mul(50).abs().to(dtype) for shape, dtype in messages]
    sizes = []
    for i in range(403):
        if i < 400:
            sender.send(sent[i].clone(), i, i - 4)
            sizes.append(os.fstat(sender._memory.file).st_size)
        if i >= 3:
            came = receiver.receive()
            assert torch.equal(came, sent[i - 3]) and came.dtype == sent[i - 3].dtype
    assert sizes[-1] == sizes[7] < 2**20 and sender.num_held == 4


def test_what_has_not_arrived_outlasts_the_next_run():
    sender, receiver = both_ends()
    for i in range(3):
        sender.send(torch.full((8,), float(i)), i, -1)
    sender.flush()
    assert sender.num_held == 0
    for i in range(3):
        sender.send(torch.full((8,), 3.0 + i), i, -1)
    receiver.expect([((8,), torch.float32)] * 6)
    assert [receiver.receive()[0].item() for _ in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_sender_that_is_gone_is_noticed():
    sender, receiver = both_ends()
    receiver.expect([((1,), torch.float32)] * 2)
    sender.send(torch.ones(1), 0, -1)
    del sender
    assert receiver.receive() == 1
    with pytest.raises(ConnectionError, match="rank 0, which this one works with, is gone"):
        receiver.receive()


def test_a_receiver_that_is_gone_is_noticed():
    sender, receiver = both_ends()
    sender.send(torch.ones(1), 0, -1)
    del receiver
    with pytest.raises(ConnectionError, match="rank 1, which this one works with, is gone"):
        sender.send(torch.ones(1), 1, -1)
