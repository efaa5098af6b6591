"""From what a user asked to a complete, checked configuration. Nothing is loaded and nothing is written here."""

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from longvid.checkpoints.diffusers_folder import Folder, open_folder
from longvid.media import MAX_FPS, read_image
from longvid.method import Method
from longvid.passes import Pass
from longvid.plan import Plan, make_plan, num_latents_of
from longvid.schedule import NUM_TRAIN_TIMESTEPS
from pipelines.methods import make_method

ASSETS = Path(__file__).resolve().parent.parent / "longvid" / "assets"
EMBEDDED, BASE = ASSETS / "tiny-fast", ASSETS / "tiny"
"""The models in the box: the one that is taken where none is named, of few steps, and the one that it is distilled
from. They go by the names of their folders."""

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
    vae_dtype: str
    compile: bool = False

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
    vae_dtype: str | None = None,
    compile: bool = False,
    **method_changes: int | float | bool,
) -> Run:
    """Complete and check a request; what is left out takes the model's defaults, and one seed is chosen.

    `method_changes` are those of `pipelines.methods` (num_steps, first_steps, lag, block_size, blocks_per_pass,
    retire, guidance_scale, flow_shift). Raises ValueError for a request that cannot be met, with a value that works.
    """
    opened = open_folder(resolve_model(model))
    defaults = model_defaults(opened)
    fps = _whole("fps", defaults["fps"] if fps is None else fps, 1, MAX_FPS)
    frames = _num_frames(seconds, num_frames, fps, defaults)
    height = _whole("height", defaults["height"] if height is None else height, 1)
    width = _whole("width", defaults["width"] if width is None else width, 1)
    check_size(opened, height, width)
    name = method or defaults["method"]
    changes = {**(defaults.get("changes", {}) if name == defaults["method"] else {}), **method_changes}
    chosen = _method(name, image is not None, changes)
    if prompt is None:
        prompt = defaults.get("prompt", "")
    if not prompt.strip():
        raise ValueError('the prompt is empty; say what to show, such as --prompt "a red ball bounces"')
    if image is not None:
        if frames < 5:
            raise ValueError(f"num_frames={frames} leaves nothing to make after the image; try 81")
        read_image(image, height, width)
    device, dtype = choose_device(device, dtype)
    vae_dtype = choose_vae_dtype(device, vae_dtype)
    if compile and device == "cpu":
        raise ValueError("compile is for GPUs, on a CPU it gains nothing; leave --compile out")
    return Run(
        model=opened.path, prompt=prompt, negative_prompt=negative_prompt or "", image=Path(image) if image else None,
        num_frames=frames, fps=fps, height=height, width=width, method=chosen,
        seed=secrets.randbelow(2**31) if seed is None else _whole("seed", seed, 0), device=device, dtype=dtype,
        vae_dtype=vae_dtype, compile=compile,
    )  # fmt: skip


def resolve_model(model: str | Path | None) -> Path:
    """A folder for a path, a hub id (fetched), the name of a model in the box, or nothing."""
    if model is None:
        return EMBEDDED
    path = Path(model)
    if str(model) and path.exists():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model {model} holds no model_index.json; give a folder that does, or a hub id")
        return path
    if str(model) in (names := [folder.name for folder in sorted(ASSETS.iterdir()) if folder.is_dir()]):
        return ASSETS / str(model)
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"model {model} is not a folder here, nor a model in the box ({', '.join(names)}), nor a hub "
                         "id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model} is not a folder here and cannot be fetched from the hub: {reason}") from error


def model_defaults(opened: Folder) -> Mapping:
    """Method, size, rate and length for what a user did not choose."""
    return {**MODEL_DEFAULTS[opened.transformer["_class_name"]], **opened.longvid}


def check_size(opened: Folder, height: int, width: int) -> None:
    """Raise ValueError unless the VAE's factor times the patch divides the picture."""
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
    return device, _dtype("dtype", dtype or ("bfloat16" if kind == "cuda" else "float32"))


def choose_vae_dtype(device: str, vae_dtype: str | None) -> str:
    """float32, as Wan's VAE is released, but on a CPU that multiplies bfloat16, where that takes half the time or less
    (AVX-512 BF16)."""
    if vae_dtype is None and device == "cpu":
        import torch

        takes_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        vae_dtype = "bfloat16" if takes_bfloat16 else None
    return _dtype("vae_dtype", vae_dtype or "float32")


def _dtype(name: str, given: str) -> str:
    if given not in ("float32", "bfloat16"):
        raise ValueError(f"{name}={given!r} is unknown; use float32 or bfloat16")
    return given


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
    frames = 4 * math.ceil(round(seconds * fps, 6) / 4) + 1
    num_latents_of(frames)
    return frames


def _method(name: str, has_image: bool, changes: Mapping[str, int | float | bool]) -> Method:
    """The method with its changes, those that schedules cannot take refused under the name that the user gave."""
    for steps in ("num_steps", "first_steps"):
        _whole(steps, changes.get(steps, 1), 1, NUM_TRAIN_TIMESTEPS)
    shift = changes.get("flow_shift", 1)
    if not 0.01 <= shift <= 1000:
        raise ValueError(f"flow_shift={shift} must be between 0.01 and 1000; try 3")
    return make_method(name, has_image=has_image, **changes)


def _whole(name: str, value: int, least: int, most: float = math.inf) -> int:
    if int(value) != value or not least <= value <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={value} must be a whole number {limits}; try {max(least, 16)}")
    return int(value)


def cost_of(plan: Plan) -> dict:
    """What a plan asks of the model: passes, latents through it and the longest context."""
    passes: tuple[Pass, ...] = plan.passes
    return {
        "passes": len(passes),
        "latents_through_the_model": sum(p.num_latents for p in passes),
        "longest_context_in_latents": max(p.num_context for p in passes),
    }
