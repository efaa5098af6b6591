"""Peak memory is that of the program that asks, not of the one which started it."""

import subprocess
import sys

import numpy as np

from pipelines.usage import peak_memory_mb


def test_peak_memory_is_of_this_program_alone():
    before = peak_memory_mb("cpu")
    big = np.ones(60 * 2**20 // 8)
    with_big = peak_memory_mb("cpu")
    assert with_big >= 60 and with_big >= before
    del big
    assert peak_memory_mb("cpu") >= with_big - 1, "a peak does not go down"
    again = "import pipelines.usage as u; print(u.peak_memory_mb('cpu'))"
    parent = "import numpy as np, subprocess, sys; x = np.ones(900 * 2**17)"
    code = f"{parent}; subprocess.run([sys.executable, '-c', {again!r}])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(child.stdout) < 800
