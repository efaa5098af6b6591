"""Tensors in a folder: one `stem.safetensors`, or shards and a `stem.safetensors.index.json`, as Hugging Face has them.

Opening reads headers only; a tensor's bytes are read when it is asked for, so a process that holds some layers reads
only those. Knows no model and no configuration. Nothing but safetensors is ever read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = {".bin", ".pth", ".pt", ".ckpt"}
HASHED_WHOLE = 64 * 2**20  # bytes; of a larger file, its header, size and some samples are hashed
SAMPLES, SAMPLE_BYTES = 16, 2**16


class Entry(NamedTuple):
    """What a header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The named tensors of some files, in the order of the names. `bytes_read` counts what `read` has read."""

    def __init__(self, files: Iterable[Path]):
        """Reads the headers. Raises ValueError for a damaged file and for a name that two files hold."""
        self.bytes_read = 0
        self._handles, self._entries = {}, {}
        for file in files:
            self._handles[file], entries = _open_file(file)
            for name in entries:
                if name in self._entries:
                    raise ValueError(f"tensor {name!r} is present twice: in {self._entries[name].file} and in {file}")
            self._entries |= entries
        self.names = tuple(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype in the file, from the header."""
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the file's dtype. Raises ValueError if it cannot be read."""
        file = self._entry(name).file
        try:
            tensor = self._handles[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: tensor {name!r} cannot be read ({error}); fetch the file again") from error
        self.bytes_read += tensor.nbytes
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            where = ", ".join(map(str, self._handles))
            raise ValueError(f"tensor {name!r} is not in {where}")
        return self._entries[name]


def open_tensors(folder: Path, stem: str) -> TensorFiles:
    """Open `stem.safetensors`, or the shards that `stem.safetensors.index.json` names, in `folder`.

    Raises ValueError, naming file and tensor, for files that are missing or damaged, an index that disagrees with its
    shards, a tensor that is present twice, and a folder that holds pickled weights only.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise ValueError(f"{folder}: its tensors are present twice, as {single.name} and as {index.name}; keep one")
    if single.exists():
        return TensorFiles([single])
    if index.exists():
        return _open_shards(index)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise ValueError(f"{folder}: holds {pickles[0]}, but only .safetensors is read; convert it to {single.name}")
    raise ValueError(f"{folder}: has no weights; give it {single.name}, or shards and {index.name}")


def load_into(
    module: nn.Module,
    tensors: TensorFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    keep_float32: Callable[[str], bool] = lambda name: False,
    allow_surplus: Callable[[str], bool] = lambda name: False,
) -> None:
    """Read into `module` what its state dict names, in place of what stands there (so it may be on "meta").

    Floating-point tensors become `dtype`, or float32 where `keep_float32(name)`. Names that share one tensor in the
    module may share one in the file. Raises ValueError for a tensor that is missing, misshapen, or surplus (unless
    `allow_surplus(name)`: another stage's); then the module is as before.
    """
    groups = _shared_names(module)
    _check_names(groups, tensors, allow_surplus)
    state = {}
    for names, old in groups:
        source = next(name for name in names if name in tensors)
        new = tensors.read(source)
        if new.is_floating_point():
            new = new.to(torch.float32 if keep_float32(source) else dtype)
        new = new.to(device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        state |= dict.fromkeys(names, new)
    module.load_state_dict(state, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that no checkpoint holds were built on meta: {left}"


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module` with each shared tensor once, under its first name: what `save_tensors` takes."""
    return {names[0]: tensor.detach() for names, tensor in _shared_names(module)}


def save_tensors(folder: Path, stem: str, tensors: dict[str, Tensor], max_shard_bytes: int = 5 * 10**9) -> None:
    """Write `stem.safetensors` or shards of at most `max_shard_bytes` (if no tensor is larger) and their index.

    Files are written aside and renamed when all are complete; those of `stem` that stood there before are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = {*folder.glob(f"{stem}.safetensors*"), *folder.glob(f"{stem}-*-of-*.safetensors")}
    shards = _shards(tensors, max_shard_bytes)
    files = {}
    for i, names in enumerate(shards, start=1):
        file = folder / (
            f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        )
        files[file] = names
        save_file({name: tensors[name].contiguous() for name in names}, _aside(file), metadata={"format": "pt"})
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file.name for file, names in files.items() for name in names}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _aside(index).write_text(json.dumps(content, indent=2) + "\n")
        files[index] = []
    for file in files:
        os.replace(_aside(file), file)
    for file in old - set(files):
        file.unlink()


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that name the checkpoint: sha256 over its configurations, tokenizer and weights.

    Of a file over 64 MiB the header, the size and 16 samples of 64 KiB are taken, so it is quick at any size.
    Hidden files and folders, and files of other kinds, do not count.
    """
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or file.suffix not in {".json", ".txt", ".model", ".safetensors"} or not file.is_file():
            continue
        total.update(f"{inside.as_posix()}\n{file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            total.update(piece)
    return total.hexdigest()[:16]


def read_json(file: Path) -> dict:
    """The JSON object in `file`. Raises ValueError if it is missing or is no JSON object."""
    if not file.is_file():
        raise ValueError(f"{file}: is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a JSON {type(content).__name__}; it must be an object")
    return content


def _open_shards(index: Path) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map from tensors to shards")
    shards = sorted({index.parent / shard for shard in weight_map.values()})
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{index}: names the shard {shard.name}, which is missing; fetch it again")
    tensors = TensorFiles(shards)
    for name, shard in weight_map.items():
        if name not in tensors or tensors.file(name) != index.parent / shard:
            raise ValueError(f"{index}: tensor {name!r} is not in the shard {shard}; fetch both again")
    for name in tensors.names:
        if name not in weight_map:
            raise ValueError(f"{index}: does not name tensor {name!r}, which is in {tensors.file(name).name}")
    return tensors


def _open_file(file: Path) -> tuple[safe_open, dict[str, Entry]]:
    try:
        handle = safe_open(file, framework="pt")
        header = json.loads(_header(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: is damaged{_cut_at(file)} ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} has dtype {about['dtype']}; read are {', '.join(DTYPES)}")
    return handle, {name: Entry(file, DTYPES[a["dtype"]], tuple(a["shape"])) for name, a in header.items()}


def _header(file: Path) -> bytes:
    """The JSON header of a safetensors file: 8 bytes of length, little-endian, then the header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(min(length, file.stat().st_size))


def _cut_at(file: Path) -> str:
    """Which tensor is the first that lies past the end of a damaged file, if its header can tell."""
    try:
        raw = _header(file)
        header = json.loads(raw)
        ends = sorted((about["data_offsets"][1], name) for name, about in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return " in its header"
    room = file.stat().st_size - 8 - len(raw)
    return next((f": cut short in tensor {name!r}" for end, name in ends if end > room), "")


def _shared_names(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The tensors of a module's state dict, each with all its names."""
    groups = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _check_names(
    groups: list[tuple[list[str], Tensor]], tensors: TensorFiles, allow_surplus: Callable[[str], bool]
) -> None:
    where = tensors.file(tensors.names[0]).parent if tensors.names else "the checkpoint"
    present, own = set(tensors.names), {name for names, _ in groups for name in names}
    missing = [(names[0], tensor) for names, tensor in groups if not present.intersection(names)]
    if missing:
        name, tensor = missing[0]
        raise ValueError(f"{where}: tensor {name!r} of shape {tuple(tensor.shape)} is missing{_more(missing)}")
    surplus = [name for name in tensors.names if name not in own and not allow_surplus(name)]
    if surplus:
        file, shape = tensors.file(surplus[0]), tensors.shape(surplus[0])
        raise ValueError(f"{file}: tensor {surplus[0]!r} of shape {shape} is not the model's{_more(surplus)}")
    for names, tensor in groups:
        for name in present.intersection(names):
            if tensors.shape(name) != tuple(tensor.shape):
                shapes = f"shape {tensors.shape(name)}; the model's config asks for {tuple(tensor.shape)}"
                raise ValueError(f"{tensors.file(name)}: tensor {name!r} has {shapes}")


def _more(found: list) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards, room = [[]], max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.part")


def _pieces(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    if size <= HASHED_WHOLE:
        yield file.read_bytes()
        return
    if file.suffix == ".safetensors":
        yield _header(file)
    with file.open("rb") as stream:
        for i in range(SAMPLES):
            stream.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            yield stream.read(SAMPLE_BYTES)
