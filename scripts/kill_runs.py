"""Kill runs at random moments and resume them: python scripts/kill_runs.py [HOW_MANY]. Prints how many came right.

Each run of the embedded model, on 2 or 3 processes, loses one of them by SIGKILL at a random moment, and is resumed on
1 to 4 processes. What counts is the hash of all latents against that of a run that nobody cut.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ["--model", "tiny", "--seconds", "8", "--seed", "3", "--threads", "1", "--quiet", "--snapshot-every", "2"]
COMMAND = [sys.executable, "-m", "pipelines.cli", "generate"]


def workers_of(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for file in found for child in file.read_text().split())


def sha(folder: Path) -> str:
    """The hash in a video's sidecar."""
    return json.loads((folder / "v.json").read_text())["metrics"]["latent_sha256"]


def killed_and_resumed(folder: Path, chance: random.Random, longest: float) -> str:
    """The hash after all; says what happened."""
    num, then = chance.choice([2, 3]), chance.randint(1, 4)
    child = subprocess.Popen([*COMMAND, *WORDS, "--nproc", str(num), "--output", str(folder / "v.mp4")],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not (folder / "v.run" / "run.json").exists():
        time.sleep(0.02)
    moment = chance.uniform(0, longest)
    time.sleep(moment)
    workers = workers_of(child.pid)
    if workers:
        subprocess.run(["kill", "-9", str(chance.choice(workers))], check=False)
    start = time.monotonic()
    child.wait(timeout=60)
    took, blocks = time.monotonic() - start, len(list((folder / "v.run" / "clean").glob("*.safetensors")))
    again = ["--resume", str(folder / "v.run"), "--quiet"]
    if not (folder / "v.run").exists():  # no block was out, and nothing is left to go on with
        again = [*WORDS, "--output", str(folder / "v.mp4"), "--overwrite"]
    subprocess.run([*COMMAND, *again, "--nproc", str(then)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"{num} processes, one killed after {moment:.1f} s with {blocks} blocks out; all ended {took:.1f} s later; "
          f"resumed on {then}", end=": ", flush=True)  # fmt: skip
    return sha(folder)


def main() -> None:
    """Print each case and the sum."""
    how_many, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 20, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        uncut = Path(name)
        subprocess.run([*COMMAND, *WORDS, "--output", str(uncut / "v.mp4")], check=True, stdout=subprocess.DEVNULL)
        expected = sha(uncut)
    same = 0
    for _ in range(how_many):
        with tempfile.TemporaryDirectory() as name:
            is_same = killed_and_resumed(Path(name), chance, longest=6.0) == expected
        same += is_same
        print("the same" if is_same else "ANOTHER VIDEO", flush=True)
    print(f"{same} of {how_many} the same latent_sha256")
    sys.exit(same != how_many)


if __name__ == "__main__":
    main()
