"""From what a user asked to a complete, checked configuration. Nothing is loaded and nothing is written here."""

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from longvid.method import Method
from longvid.passes import Pass
from longvid.plan import Plan, make_plan, num_latents_of
from pipelines.methods import make_method

EMBEDDED = Path(__file__).resolve().parent.parent / "longvid" / "assets" / "tiny"
"""The model in the box."""

MODEL_DEFAULTS = {
    "WanTransformer3DModel": {"method": "dualparal", "height": 480, "width": 832, "fps": 16, "num_frames": 81},
    "SkyReelsV2Transformer3DModel": {
        "method": "skyreels-sync", "height": 544, "width": 960, "fps": 24, "num_frames": 97,
    },
}  # fmt: skip
"""Defaults for released folders, by transformer class; the embedded model brings its own in `longvid.json`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a video depends on, with no default left open."""

    model: Path
    prompt: str
    negative_prompt: str
    image: Path | None
    num_frames: int
    fps: int
    height: int
    width: int
    method: Method
    seed: int
    device: str
    dtype: str

    @property
    def num_latents(self) -> int:
        """Latents of the whole video."""
        return num_latents_of(self.num_frames)

    def plan(self) -> Plan:
        """The plan; an image is a clean first latent."""
        return make_plan(self.method, self.num_latents, ready=(1,) if self.image else ())

    def record(self) -> dict:
        """The configuration as JSON holds it."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def configure(
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    image: str | Path | None = None,
    seconds: float | None = None,
    num_frames: int | None = None,
    fps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    method: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **method_changes: int | float,
) -> Run:
    """Complete and check a request; what is left out takes the model's defaults, and one seed is chosen.

    `method_changes` are those of `pipelines.methods` (num_steps, lag, block_size, guidance_scale, flow_shift). Raises
    ValueError for a request that cannot be met, with a value that works.
    """
    folder = resolve_model(model)
    defaults = model_defaults(folder)
    fps = _whole("fps", defaults["fps"] if fps is None else fps, 1)
    frames = _num_frames(seconds, num_frames, fps, defaults)
    height = _whole("height", defaults["height"] if height is None else height, 1)
    width = _whole("width", defaults["width"] if width is None else width, 1)
    check_size(folder, height, width)
    name = method or defaults["method"]
    changes = {**(defaults.get("changes", {}) if name == defaults["method"] else {}), **method_changes}
    chosen = make_method(name, has_image=image is not None, **changes)
    if prompt is None:
        prompt = defaults.get("prompt", "")
    if not prompt.strip():
        raise ValueError('the prompt is empty; say what to show, such as --prompt "a red ball bounces"')
    if image is not None and not Path(image).is_file():
        raise ValueError(f"image {image} is not a file; give a PNG, JPEG or WebP file")
    if image is not None and frames < 5:
        raise ValueError(f"num_frames={frames} leaves nothing to make after the image; try 81")
    device, dtype = choose_device(device, dtype)
    return Run(
        model=folder, prompt=prompt, negative_prompt=negative_prompt or "", image=Path(image) if image else None,
        num_frames=frames, fps=fps, height=height, width=width, method=chosen,
        seed=secrets.randbelow(2**31) if seed is None else _whole("seed", seed, 0), device=device, dtype=dtype,
    )  # fmt: skip


def resolve_model(model: str | Path | None) -> Path:
    """A folder for a path, a hub id (fetched), or nothing (the embedded model)."""
    if model is None:
        return EMBEDDED
    path = Path(model)
    if path.exists():
        return path
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"model {model} is not a folder here, nor a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model} is not a folder here and cannot be fetched from the hub: {reason}") from error


def model_defaults(folder: Path) -> Mapping:
    """Method, size, rate and length for a model that its user did not choose."""
    from longvid.checkpoints.diffusers_folder import open_folder

    opened = open_folder(folder)
    return opened.longvid or MODEL_DEFAULTS[opened.transformer["_class_name"]]


def check_size(folder: Path, height: int, width: int) -> None:
    """Raise ValueError unless the VAE's factor times the patch divides the picture."""
    from longvid.checkpoints.diffusers_folder import open_folder

    opened = open_folder(folder)
    vae, patch = opened.vae, opened.transformer.get("patch_size", [1, 2, 2])
    factor = 2 ** (len(vae.get("dim_mult", [1, 2, 4, 4])) - 1) * (vae.get("patch_size") or 1)
    for name, size, unit in (("height", height, factor * patch[1]), ("width", width, factor * patch[2])):
        if size % unit:
            low = max(unit, size - size % unit)
            raise ValueError(f"{name}={size} must be a multiple of {unit} for this model; try {low} or {low + unit}")


def choose_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The GPU if there is one, in bfloat16; else the CPU, in float32."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device={device!r} is unknown; use cpu, cuda or cuda:0")
    if device != "cpu":
        import torch

        num_gpus = torch.cuda.device_count()
        device = device or ("cuda" if num_gpus else "cpu")
        index = int(device.partition(":")[2] or 0)
        if device != "cpu" and index >= num_gpus:
            raise ValueError(f"device={device} was asked for, but there are {num_gpus} CUDA GPUs; use --device cpu")
    kind = device.split(":")[0]
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is unknown; use float32 or bfloat16")
    return device, dtype


def _num_frames(seconds: float | None, num_frames: int | None, fps: int, defaults: Mapping) -> int:
    if seconds is not None and num_frames is not None:
        raise ValueError(f"seconds={seconds} and num_frames={num_frames} both say how long; give one of them")
    if num_frames is not None:
        num_latents_of(num_frames)
        return num_frames
    if seconds is None:
        return defaults["num_frames"]
    return frames_of_seconds(seconds, fps)


def frames_of_seconds(seconds: float, fps: int) -> int:
    """The fewest frames of the form 4n + 1 that last `seconds`, the first frame being at time 0."""
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"seconds={seconds} must be a positive number; try 10")
    return 4 * math.ceil(round(seconds * fps, 6) / 4) + 1


def _whole(name: str, value: int, least: int) -> int:
    if int(value) != value or value < least:
        raise ValueError(f"{name}={value} must be a whole number of at least {least}; try {max(least, 16)}")
    return int(value)


def cost_of(plan: Plan) -> dict:
    """What a plan asks of the model: passes, latents through it and the longest context."""
    passes: tuple[Pass, ...] = plan.passes
    return {
        "passes": len(passes),
        "latents_through_the_model": sum(p.num_latents for p in passes),
        "longest_context_in_latents": max(p.num_context for p in passes),
    }
