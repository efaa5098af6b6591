"""A guard against getting worse that cannot be noisy: counts of fixed small runs, against a baseline in the tree.

Plans are counted as such, and what torch does is counted while they are carried out: by one process, and by two as
stages, as lanes of guidance and as sharers of heads.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from longvid.plan import Plan
from parallel.agree import from_all
from parallel.cost import ModelShape, peak_features
from parallel.execute import Stage, make_stage
from parallel.grid import Grid
from parallel.launch import Launch, join, launch
from parallel.split import split_layers
from pipelines.calibrate import shape_of
from pipelines.configure import Run, configure
from pipelines.counting import counted
from pipelines.generate import Observer, generate
from pipelines.record import versions, write_json
from pipelines.shapes import save_shape

BASELINE = Path(__file__).resolve().parent.parent / "bench" / "guard.json"
SHAPE = "micro"
REQUEST = {"num_frames": 17, "num_steps": 3, "block_size": 2, "guidance_scale": 3.0, "seed": 0}
METHODS = ("rolling", "dualparal", "rolling-forcing")
"""One for each kind of pass: causal, two-sided, joint."""

GRIDS = {"stages": Grid(num_stages=2), "lanes": Grid(num_stages=1, num_lanes=2),
         "lanes that cut the decoder": Grid(num_stages=1, num_lanes=2, cuts_decoder=True),
         "sequence": Grid(num_stages=1, num_bands=2)}  # fmt: skip


def count_all() -> dict:
    """All counts: what the plans ask for, and what each process does and sends, for each method and layout.

    Uses one thread of this process, and forks.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = save_shape(SHAPE, Path(folder) / "model")
        alone = {f"{method} on one process": _counts(_run(model, method), None) for method in METHODS}
        code = launch(_count_together, "", [str(model), folder], Launch(num_processes=2, threads=1), fork=True)
        assert code == 0, f"counting on two processes ended with {code}"
        together = json.loads((Path(folder) / "counts.json").read_text())
        plans = {method: _asked(_run(model, method)) for method in METHODS}
    return {"plans": plans, "runs": alone | together}


def _run(model: Path, method: str) -> Run:
    return configure(model=model, method=method, device="cpu", dtype="float32", vae_dtype="float32", **REQUEST)


def _asked(run: Run) -> dict[str, int]:
    """What a run's plan asks for, whoever carries it out."""
    plan, shape = run.plan(), shape_of(run)
    return {"passes": len(plan.passes), "tokens": _tokens(plan, shape), "pairs_of_tokens": _pairs(plan, shape),
            "latents_whose_features_are_kept": peak_features(plan)}  # fmt: skip


def _tokens(plan: Plan, shape: ModelShape) -> int:
    """Tokens through the model."""
    return shape.tokens_per_latent * sum(p.num_latents for p in plan.passes)


def _pairs(plan: Plan, shape: ModelShape) -> int:
    """Queries times keys, in one layer."""
    return shape.tokens_per_latent**2 * sum(p.num_pairs for p in plan.passes)


def _counts(run: Run, stage: Stage | None) -> dict[str, int]:
    """What this process does for a run, after it has loaded its part."""
    frames = generate(run, Observer(), stage)
    with counted() as found:
        for _ in frames:
            pass
    if stage is None:
        return found
    if stage.grid.num_bands > 1:  # what an exchange holds is let go by a thread of its own, sooner or later
        del found["peak_tensor_bytes"]
    sent = {f"bytes_to_process_{rank}": size for rank, size in stage.bytes_to.items()}
    return found | sent | {"bytes_exchanged": stage.exchange.num_bytes}


def _count_together(words: list[str]) -> int:
    """Be one of two processes, for each layout and method; the first writes what all counted."""
    model, folder = map(Path, words)
    found = {}
    with join("cpu", print):
        for name, grid in GRIDS.items():
            for method in METHODS:
                run = _run(model, method)
                shape = shape_of(run)
                layers = split_layers([1.0] * shape.num_layers, grid.num_stages)
                stage = make_stage(grid, layers, shape.num_rows, torch.device("cpu"))
                counts = from_all(_counts(run, stage))
                found |= {f"{method} on two as {name}, process {rank}": each for rank, each in enumerate(counts)}
        if dist.get_rank() == 0:
            (folder / "counts.json").write_text(json.dumps(found))
    return 0


def guard(baseline: Path, *, update: bool) -> tuple[bool, list[str]]:
    """Whether the counts are those of the baseline, and lines that say so; `update` writes them to it instead.

    Raises ValueError if there is no baseline.
    """
    if not update and not baseline.is_file():
        raise ValueError(f"{baseline} is not there; write it: longvid bench guard --update")
    before = json.loads(baseline.read_text()) if baseline.is_file() else {"counts": {}}
    now = {"command": "longvid bench guard --update", "shape": SHAPE, "request": REQUEST,
           "torch": versions()["torch"].partition("+")[0], "counts": count_all()}  # fmt: skip
    lines = list(differences(before, now))
    if update:
        write_json(baseline, now)
        return True, [*lines, f"{baseline} holds these counts now"]
    return not lines, lines or [f"all {len(_leaves(now['counts']))} counts are those of {baseline.name}"]


def differences(before: dict, now: dict) -> Iterator[str]:
    """A line for each count that is another; what torch does is compared if the version of torch is the same."""
    old, new = _leaves(before["counts"]), _leaves(now["counts"])
    if before.get("torch") != now["torch"]:
        old, new = ({name: count for name, count in side.items() if "bytes_to" in name or name.startswith("plans")}
                    for side in (old, new))  # fmt: skip
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name, 'not counted')} before, {new.get(name, 'not counted')} now"


def _leaves(tree: dict, path: str = "") -> dict[str, int]:
    """Counts by their names, from the root."""
    found = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{path}{name}: ") if isinstance(value, dict) else {f"{path}{name}": value}
    return found
