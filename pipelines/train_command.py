"""The command `longvid train`: flags to a request, carried out here, or in processes that it starts, or as one."""

import argparse
import json
import os
import sys
from pathlib import Path

from pipelines.carry_out import EXIT_DONE
from pipelines.make import is_worker, say_lost, use_threads

LOOP_FLAGS = {
    "steps": "num_steps", "batch_size": "batch_size", "learning_rate": "learning_rate", "optimizer": "optimizer",
    "lr_scheduler": "schedule", "lr_warmup_steps": "warmup_steps", "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "max_grad_norm", "ema_decay": "ema_decay", "save_every": "save_every", "log_every": "log_every",
    "deepspeed": "deepspeed", "tensorboard": "tensorboard",
}  # fmt: skip
DIT_FLAGS = {"dtype": "dtype", "device": "device", "gradient_checkpointing": "checkpointing", "compile": "compile",
             "picture_share": "picture_share", "opening_share": "opening_share"}  # fmt: skip
DATA_FLAGS = {"data": "folder", "height": "height", "width": "width", "fps": "fps", "num_frames": "num_frames",
              "clips_per_video": "clips_per_video", "max_broken": "max_broken"}  # fmt: skip
DISTIL_FLAGS = {"method": "method", "student": "student", "student_speed": "student_speed",
                "critic_draws": "critic_draws", "prompts_file": "prompts"}  # fmt: skip
OPTION_FLAGS = ("levels", "loss_weighting", "multitask", "num_intervals", "interval_cost", "immiscible",
                "balance_first")  # fmt: skip


def run_training(options: argparse.Namespace) -> int:
    """Train a part; the records go to standard output, from the first process."""
    num = int(os.environ["WORLD_SIZE"]) if is_worker() else 1 if options.nproc is None else options.nproc
    if num < 1:
        raise ValueError(f"nproc={num} must be at least 1; try 2")
    is_spread = num > 1 or bool(options.deepspeed)
    use_threads(1 if is_spread and not is_worker() else options.threads)  # what starts others computes nothing
    request = request_of(options)
    if is_spread:
        _check_installed("accelerate", *(["deepspeed"] if options.deepspeed else []))
    if not is_worker() or os.environ["RANK"] == "0":
        _check(request, num)
    if not is_spread:
        return _print(request, num)
    if not is_worker():
        return _start(options, num)
    from parallel.launch import join
    from pipelines.engine_many import many

    device = request.dit.get("device", "cpu")
    with join(device, say_lost) as device:
        return _print(request.on(device), num, many(request.dit.get("dtype", "bfloat16"), device))


def request_of(options: argparse.Namespace):
    """What the flags ask for. Raises ValueError for what the part does not take."""
    from pipelines.train import TrainRequest

    loop, dit = _given(options, LOOP_FLAGS), _given(options, DIT_FLAGS)
    if options.part not in ("dit", "distill"):
        dit.pop("compile", None)  # given for all parts alike
    if "picture_share" in dit:
        dit["picture_share"] = (options.picture_share, options.picture_share)
    distil = _given(options, DISTIL_FLAGS)
    if options.teacher_guidance is not None:
        whose = (distil, "guidance_scale") if options.part == "distill" else (dit, "teacher_guidance")
        whose[0][whose[1]] = options.teacher_guidance
    if options.deepspeed:
        loop = {"optimizer": "adamw", **loop}
    if options.device is not None:
        from pipelines.configure import choose_device

        choose_device(options.device, options.dtype)
    return TrainRequest(
        part=options.part, out=Path(options.out), seed=options.seed, resume=options.resume,
        model=Path(options.model) if options.model else None, loop=loop, dit=dit,
        options=_given(options, dict(zip(OPTION_FLAGS, OPTION_FLAGS, strict=True))),
        validate_every=options.validate_every, sample_every=options.sample_every, data=_given(options, DATA_FLAGS),
        lora=0 if options.lora is None else options.lora, distil=distil,
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


def _check(request, num: int) -> None:
    if request.data:
        from pipelines.finetune import configure_finetuning

        configure_finetuning(request, num)
    elif request.part == "distill":
        from pipelines.make_student import configure_student

        configure_student(request, num)
    else:
        from pipelines.train import check_request

        check_request(request, num)


def _print(request, num: int, *engine) -> int:
    is_first = not engine or os.environ["RANK"] == "0"
    if request.data:
        from pipelines.finetune import configure_finetuning, finetune

        records = finetune(configure_finetuning(request, num), *engine, is_first=is_first)
    elif request.part == "distill":
        from pipelines.make_student import configure_student, make_student

        records = make_student(configure_student(request, num), *engine, is_first=is_first)
    else:
        from pipelines.train import train

        records = train(request, *engine, is_first=is_first)
    for record in records:
        if "skipped" in record:
            print(f"longvid train: {record['skipped']} is left out: {record['reason']}", file=sys.stderr, flush=True)
        if is_first:
            print(json.dumps(record), flush=True)
    return EXIT_DONE


def make_data(options: argparse.Namespace) -> int:
    """`longvid data make`."""
    from longvid.plan import num_latents_of
    from pipelines.make_data import make_films

    num_latents_of(options.num_frames)
    for record in make_films(Path(options.out), num_films=options.films, num_frames=options.num_frames,
                             fps=options.fps, height=options.height, width=options.width,
                             seed=options.seed):  # fmt: skip
        print(json.dumps(record), flush=True)
    return EXIT_DONE


def merge(options: argparse.Namespace) -> int:
    """`longvid lora merge`."""
    use_threads(options.threads)
    import torch

    from longvid.checkpoints.diffusers_folder import copy_folder, load_dit, open_folder
    from longvid.models.lora import merge_lora
    from pipelines.configure import BASE, resolve_model

    opened, out = open_folder(resolve_model(options.model or BASE)), Path(options.out)
    if out.exists():
        raise ValueError(f"{out} is there already; give another --out")
    dit = load_dit(opened, torch.float32)
    count = merge_lora(dit, Path(options.lora), options.scale)
    copy_folder(opened, out, dit)
    print(json.dumps({"model": str(out), "layers": count}))
    return EXIT_DONE
