"""The command `longvid train`: flags to a request, carried out here, or in processes that it starts, or as one."""

import argparse
import json
import os
import sys
from pathlib import Path

from pipelines.carry_out import EXIT_DONE
from pipelines.make import give_up, is_worker, use_threads

LOOP_FLAGS = {
    "steps": "num_steps", "batch_size": "batch_size", "learning_rate": "learning_rate", "optimizer": "optimizer",
    "lr_scheduler": "schedule", "lr_warmup_steps": "warmup_steps", "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "max_grad_norm", "ema_decay": "ema_decay", "save_every": "save_every", "log_every": "log_every",
    "deepspeed": "deepspeed", "tensorboard": "tensorboard",
}  # fmt: skip
DIT_FLAGS = {"dtype": "dtype", "device": "device", "gradient_checkpointing": "checkpointing", "compile": "compile"}
OPTION_FLAGS = ("levels", "loss_weighting", "multitask", "num_intervals", "interval_cost", "immiscible",
                "balance_first")  # fmt: skip


def run_training(options: argparse.Namespace) -> int:
    """Train a part; the records go to standard output, from the first process."""
    num = int(os.environ["WORLD_SIZE"]) if is_worker() else 1 if options.nproc is None else options.nproc
    if num < 1:
        raise ValueError(f"nproc={num} must be at least 1; try 2")
    is_spread = num > 1 or bool(options.deepspeed)
    use_threads(1 if is_spread and not is_worker() else options.threads)  # what starts others computes nothing
    from pipelines.train import check_request

    request = request_of(options)
    if not is_spread:
        check_request(request, num)
        return _print(request)
    _check_installed("accelerate", *(["deepspeed"] if options.deepspeed else []))
    if not is_worker() or os.environ["RANK"] == "0":
        check_request(request, num)
    if not is_worker():
        return _start(options, num)
    from parallel.launch import join
    from pipelines.engine_many import many

    device = request.dit.get("device", "cpu")
    with join(device, give_up) as device:
        return _print(request.on(device), many(request.dit.get("dtype", "bfloat16"), device))


def request_of(options: argparse.Namespace):
    """What the flags ask for. Raises ValueError for what the part does not take."""
    from pipelines.train import TrainRequest

    loop, dit = _given(options, LOOP_FLAGS), _given(options, DIT_FLAGS)
    if options.part != "dit":
        dit.pop("compile", None)  # given for all parts alike
    if options.deepspeed:
        loop = {"optimizer": "adamw", **loop}
    if options.device is not None:
        from pipelines.configure import choose_device

        choose_device(options.device, options.dtype)
    return TrainRequest(
        part=options.part, out=Path(options.out), seed=options.seed, resume=options.resume,
        model=Path(options.model) if options.model else None, loop=loop, dit=dit,
        options=_given(options, dict(zip(OPTION_FLAGS, OPTION_FLAGS, strict=True))),
        validate_every=options.validate_every, sample_every=options.sample_every,
    )  # fmt: skip


def _given(options: argparse.Namespace, names: dict[str, str]) -> dict:
    values = {name: getattr(options, flag) for flag, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _check_installed(*packages: str) -> None:
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed, and training on several processes needs it; "
                             "pip install 'longvid[train]'")  # fmt: skip


def _start(options: argparse.Namespace, num: int) -> int:
    from parallel.launch import Launch, launch, threads_each
    from pipelines import cli

    how = Launch(num_processes=num, threads=options.threads or threads_each(num))
    return launch(cli.main, cli.__name__, options.words, how, fork=not (options.device or "").startswith("cuda"))


def _print(request, *engine) -> int:
    from pipelines.train import train

    is_first = os.environ.get("RANK", "0") == "0" or not engine
    for record in train(request, *engine, is_first=is_first):
        if is_first:
            print(json.dumps(record))
            sys.stdout.flush()
    return EXIT_DONE
