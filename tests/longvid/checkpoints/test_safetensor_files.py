import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from longvid.checkpoints.safetensor_files import (
    fingerprint,
    load_into,
    module_tensors,
    open_tensors,
    save_tensors,
)

STEM = "diffusion_pytorch_model"
load = partial(load_into, dtype=torch.float32)


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 6))
    module.register_buffer("count", torch.arange(3))
    return module


def on_meta():
    with torch.device("meta"):
        return network()


def shard(folder):
    """Three or more shards of `network`, written by diffusers' own format rules, and their index."""
    save_tensors(folder, STEM, module_tensors(network()), max_shard_bytes=100)
    index = folder / f"{STEM}.safetensors.index.json"
    return index, json.loads(index.read_text())


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_bytes", [10**6, 100])
def test_round_trip_through_meta(tmp_path, max_shard_bytes):
    module = network()
    save_tensors(tmp_path, STEM, module_tensors(module), max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 100)
    loaded = on_meta()
    load(loaded, open_tensors(tmp_path, STEM))
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not any(p.is_meta for p in loaded.parameters()) and all(p.requires_grad for p in loaded.parameters())


def test_saving_again_leaves_no_stale_files(tmp_path):
    shard(tmp_path)
    save_tensors(tmp_path, STEM, module_tensors(network()))
    assert [p.name for p in tmp_path.iterdir()] == [f"{STEM}.safetensors"]


def test_dtypes(tmp_path):
    save_tensors(tmp_path, STEM, module_tensors(network()))
    module = on_meta()
    load_into(module, open_tensors(tmp_path, STEM), dtype=torch.bfloat16, keep_float32=lambda n: n.startswith("1."))
    assert module[0].weight.dtype == torch.bfloat16 and module[1].weight.dtype == torch.float32
    assert module.count.dtype == torch.int64


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    def tied():
        module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        module["b"].weight = module["a"].weight
        return module

    module = tied()
    assert list(module_tensors(module)) == ["a.weight"]
    save_tensors(tmp_path, STEM, {"b.weight": module["b"].weight.detach()})
    with torch.device("meta"):
        loaded = tied()
    load(loaded, open_tensors(tmp_path, STEM))
    assert loaded["a"].weight is loaded["b"].weight and torch.equal(loaded["a"].weight, module["a"].weight)


@pytest.mark.parametrize("max_shard_bytes", [10**6, 100])
def test_reading_is_lazy(tmp_path, max_shard_bytes):
    save_tensors(tmp_path, STEM, module_tensors(network()), max_shard_bytes)
    tensors = open_tensors(tmp_path, STEM)
    assert tensors.shape("0.weight") == (4, 8) and tensors.dtype("count") == torch.int64 and tensors.bytes_read == 0
    tensors.read("1.bias")
    assert tensors.bytes_read == 4 * 4
    with torch.device("meta"):
        stage = nn.ModuleDict({"2": nn.Linear(4, 6)})
    load(stage, tensors, allow_surplus=lambda name: True)
    assert tensors.bytes_read == 4 * 4 + 4 * (24 + 6)


def test_no_weights_and_pickles(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: has no weights; give it {STEM}.safetensors"):
        open_tensors(tmp_path, STEM)
    (tmp_path / f"{STEM}.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="only .safetensors is read"):
        open_tensors(tmp_path, STEM)


def test_missing_shard(tmp_path):
    shard(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=f"index.json: names the shard {file.name}, which is missing"):
        open_tensors(tmp_path, STEM)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    index, content = shard(tmp_path)
    content["weight_map"]["0.bias"] = content["weight_map"]["2.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tensor '0.bias' is not in the shard {STEM}-0000"):
        open_tensors(tmp_path, STEM)


def test_index_leaves_a_tensor_out(tmp_path):
    index, content = shard(tmp_path)
    del content["weight_map"]["1.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not name tensor '1.bias', which is in"):
        open_tensors(tmp_path, STEM)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_damaged_index(tmp_path, text):
    index, _ = shard(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match="index.json: "):
        open_tensors(tmp_path, STEM)


def test_tensor_present_twice(tmp_path):
    shard(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    rewrite(second, lambda tensors: tensors.update(load_file(first)))
    with pytest.raises(ValueError, match=f"is present twice: in {first} and in {second}"):
        open_tensors(tmp_path, STEM)


def test_whole_checkpoint_present_twice(tmp_path):
    shard(tmp_path)
    save_file(module_tensors(network()), tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match="present twice"):
        open_tensors(tmp_path, STEM)


@pytest.mark.parametrize("kept, names", [(-4, "cut short in tensor '"), (100, "header"), (5, "header"), (0, "header")])
def test_truncated_file(tmp_path, kept, names):
    save_tensors(tmp_path, STEM, module_tensors(network()))
    file = tmp_path / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file}: is damaged.*{names}.*fetch it again"):
        open_tensors(tmp_path, STEM)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("2.weight"), r"tensor '2.weight' of shape \(6, 4\) is missing$"),
        (lambda t: (t.pop("2.weight"), t.pop("0.bias")), r"tensor '0.bias' of shape \(4,\) is missing \(and 1 more\)"),
        (lambda t: t.update(x=torch.zeros(2)), r"tensor 'x' of shape \(2,\) is not the model's"),
        (lambda t: t.update({"0.bias": torch.zeros(5)}), r"'0.bias' has shape \(5,\); the model's .* asks for \(4,\)"),
    ],
)
def test_loading_is_strict(tmp_path, change, message):
    save_tensors(tmp_path, STEM, module_tensors(network()))
    rewrite(tmp_path / f"{STEM}.safetensors", change)
    tensors, module = open_tensors(tmp_path, STEM), on_meta()
    with pytest.raises(ValueError, match=message) as error:
        load(module, tensors)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert tensors.bytes_read == 0 and all(p.is_meta for p in module.parameters())


def test_fingerprint_changes_with_content(tmp_path, monkeypatch):
    save_tensors(tmp_path / "vae", STEM, module_tensors(network()))
    (tmp_path / "config.json").write_text("{}")
    seen = {fingerprint(tmp_path)}
    assert seen == {fingerprint(tmp_path)} and len(seen.pop()) == 16

    def changes(act):
        before = fingerprint(tmp_path)
        act()
        return fingerprint(tmp_path) != before

    assert not changes(lambda: (tmp_path / "README.md").write_text("x"))
    assert changes(lambda: (tmp_path / "config.json").write_text("{ }"))
    file = tmp_path / "vae" / f"{STEM}.safetensors"
    nudge = partial(rewrite, file, lambda tensors: tensors["0.weight"].add_(1e-3))
    assert changes(nudge)
    monkeypatch.setattr("longvid.checkpoints.safetensor_files.HASHED_WHOLE", 64)
    monkeypatch.setattr("longvid.checkpoints.safetensor_files.SAMPLE_BYTES", 32)
    assert changes(nudge)
