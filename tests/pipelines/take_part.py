"""What each of two processes does in test_engine_many: the same training, by one engine after the other.

Started by torchrun with a folder, into which the first process writes losses and weights.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from longvid.models.dit import DiT
from parallel.launch import join
from pipelines.distill import Distillation, distill
from pipelines.engine_many import many
from pipelines.film_latents import FILM_SETS, FilmLatents, film_at
from pipelines.methods import make_method
from pipelines.optimise import Check, LoopConfig, alone
from pipelines.optimizers import Part
from pipelines.train_dit import TINY_DIT, DiTTraining, train_dit

SMALL = replace(TINY_DIT, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=2, text_dim=8)
NUM_STEPS, CUT = 20, 10


class RandomFilms(FilmLatents):
    """A set of random latents, 2 x 2 tokens each."""

    def __init__(self, films):
        self.latents = torch.randn(6, 8, films.num_latents, 4, 4, generator=torch.Generator().manual_seed(1))
        self.films = [film_at(0, i) for i in range(6)]


SETS = {films.name: RandomFilms(films) for films in FILM_SETS}


def texts(*captions):
    """States that depend on the caption alone."""
    seeds = [sum(caption.encode()) for caption in captions]
    return torch.stack([torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def train(out: Path, engine=alone, *, resume=False, stop=None, checkpointing=False, **changes) -> dict:
    """Losses by step, a figure of the averaged weights on the way, and at the end the size of each weight."""
    values = {"num_steps": NUM_STEPS, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "log_every": 1,
              "save_every": CUT, "optimizer": "adamw", "ema_decay": 0.5}  # fmt: skip
    loop = LoopConfig(out=out, **{**values, **changes})
    config = DiTTraining(
        loop=loop, dtype="float32", picture_share=(0.3, 0.3), films_per_clip=1, checkpointing=checkpointing
    )
    torch.manual_seed(0)
    dit = DiT(SMALL)
    check = Check(every=5, look=lambda engine, step: engine.measure(partial(looked, dit), step))
    found = {"losses": [], "checked": [], "weights": {}}
    for record in train_dit(config, SETS, texts, dit=dit, resume=resume, engine=engine, checks=(check,)):
        if "loss" in record:
            found["losses"].append(record["loss"])
        elif "checked" in record:
            found["checked"].append(record["checked"])
        elif "dit" in record:
            found["weights"] = {name: p.double().norm().item() for name, p in record["dit"].state_dict().items()}
        if record.get("step") == stop:
            break
    return found


def distil(out: Path, engine=alone, **changes) -> dict:
    """Losses by step of a student, and the size of each of its weights."""
    values = {"num_steps": 4, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1,
              "optimizer": "adamw", "ema_decay": 0.5}  # fmt: skip
    config = Distillation(loop=LoopConfig(out=out, **{**values, **changes}), method=make_method("rolling-fast"),
                          latent_size=(8, 4, 4), dtype="float32")  # fmt: skip
    torch.manual_seed(0)
    prompts = lambda rng, count: [f"a {word} ball" for word in rng.choice(["red", "blue"], count)]  # noqa: E731
    *records, last = distill(config, DiT(SMALL), texts, prompts, engine=engine)
    weights = {name: p.double().norm().item() for name, p in last["distill"].state_dict().items()}
    return {"losses": [record["loss"] for record in records], "weights": weights}


def looked(dit: DiT, step: int, part: Part) -> dict:
    """Size of the velocity of some noise."""
    latents = part.of(torch.randn(4, 8, 1, 4, 4, generator=torch.Generator().manual_seed(step)))
    text = dit.text_features(texts("a ball").expand(len(latents), -1, -1))
    velocity, _ = dit(latents, torch.full((len(latents), 1), 500.0), text)
    return {"checked": velocity.square().mean() / part.count}


def forget() -> None:
    """Let accelerate start afresh in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


CASES = {
    "plain": {"accumulation": 2, "checkpointing": True},
    "muon": {"optimizer": "muon"},
    "zero2": {"deepspeed": "zero2", "accumulation": 2},
    "zero3": {"deepspeed": "zero3", "checkpointing": True},
}
RESUMED = ("plain", "zero3")
STUDENTS = {"student": {}, "student-zero3": {"deepspeed": "zero3", "accumulation": 2}}


def main(out: Path) -> None:
    """Every case uncut, and cut and resumed."""
    with join("cpu", lambda why: os._exit(1)):
        engine, found = many("float32", "cpu"), {}
        for name, changes in CASES.items():
            found[name] = train(out / name, engine, **changes)
            forget()
            if name not in RESUMED:
                continue
            train(out / f"{name}-cut", engine, stop=CUT + 3, **changes)
            forget()
            found[f"{name}-cut"] = train(out / f"{name}-cut", engine, resume=True, **changes)
            forget()
        for name, changes in STUDENTS.items():
            found[name] = distil(out / name, engine, **changes)
            forget()
        found["world_size"] = torch.distributed.get_world_size()
        if not torch.distributed.get_rank():
            (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
