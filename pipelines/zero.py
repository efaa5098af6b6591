"""DeepSpeed's configuration for ZeRO 1 to 3: a preset or a file, held against the flags."""

import json
from pathlib import Path

from pipelines.optimizers import ADAMW, LoopConfig

PRESETS = {"zero1": 1, "zero2": 2, "zero3": 3}
AUTO = "auto"


def zero_config(config: LoopConfig, num_processes: int, *, dtype: str) -> dict:
    """What DeepSpeed is told. A file may leave values out or say "auto"; what it says must be what the flags say.

    Raises ValueError for an optimizer that ZeRO cannot cut, a file that is no JSON object, and one that contradicts
    the flags.
    """
    if config.optimizer != ADAMW:
        raise ValueError(f"deepspeed={config.deepspeed} with optimizer={config.optimizer}: ZeRO cuts parameters into "
                         "flat pieces and Muon needs whole matrices; use --optimizer adamw")  # fmt: skip
    parts = num_processes * config.accumulation
    wanted = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // parts,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.max_grad_norm,
    }
    if config.deepspeed in PRESETS:
        return {**wanted, "zero_optimization": {"stage": PRESETS[config.deepspeed]}}
    given = _read(Path(config.deepspeed))
    _check_file(config.deepspeed, given, wanted, dtype)
    return {**given, **wanted}


def _read(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"deepspeed={file} is neither a preset nor a file; use {', '.join(PRESETS)}, or a JSON file")
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); mend it, or use --deepspeed zero2") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds a JSON {type(given).__name__}, which must be an object; or --deepspeed zero2")
    return given


def _check_file(name: str, given: dict, wanted: dict, dtype: str) -> None:
    flags = {"train_batch_size": "--batch-size", "gradient_accumulation_steps": "--gradient-accumulation-steps",
             "gradient_clipping": "--max-grad-norm", "train_micro_batch_size_per_gpu": "--batch-size"}  # fmt: skip
    for key, value in wanted.items():
        if given.get(key, AUTO) not in (AUTO, value):
            raise ValueError(f"{name} has {key}={given[key]}, the flags make it {value}; change {flags[key]}, or write "
                             f'"auto" in the file')  # fmt: skip
    for key, flag in (("optimizer", "--optimizer and --learning-rate"), ("scheduler", "--lr-scheduler")):
        if key in given:
            raise ValueError(f"{name} has {key}, which is for {flag} to say; leave it out of the file")
    stage = given.get("zero_optimization", {}).get("stage")
    if stage not in PRESETS.values():
        raise ValueError(f"{name} has zero_optimization.stage={stage}, which must be 1, 2 or 3; or --deepspeed zero2")
    if given.get("fp16", {}).get("enabled"):
        raise ValueError(f"{name} has fp16 enabled, which training does not do; leave it out and use --dtype bfloat16")
    if given.get("bf16", {}).get("enabled") is True and dtype != "bfloat16":
        raise ValueError(f"{name} has bf16 enabled, and dtype={dtype}; use --dtype bfloat16, or leave bf16 out")
