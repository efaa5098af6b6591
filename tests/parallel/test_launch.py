"""Processes that are done do not keep the others' launcher waiting."""

import multiprocessing
import os
import signal
import time

from parallel.launch import _be_forked


def done(ready):
    """A process whose work has its own way of ending, and is over."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    _be_forked(lambda words: 0, [], 1)
    ready.set()
    time.sleep(60)


def test_a_process_that_is_done_ends_when_it_is_told_to():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=done, args=(ready,))
    child.start()
    try:
        assert ready.wait(20)
        os.kill(child.pid, signal.SIGTERM)
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
    finally:
        child.kill()
