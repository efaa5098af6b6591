import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder, save_folder, scheduler_config
from longvid.models.text import TextEncoder, make_small_text_encoder

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
}
KINDS = {
    "wan": (WanTransformer3DModel, WanPipeline, {}),
    "skyreels": (SkyReelsV2Transformer3DModel, SkyReelsV2DiffusionForcingPipeline, {"inject_sample_info": True}),
}


def save_reference(path, kind):
    """A tiny random checkpoint, written whole by diffusers, its transformer in shards."""
    torch.manual_seed(0)
    transformer, pipeline, extra = KINDS[kind]
    ours, _ = make_small_text_encoder()
    encoder = UMT5EncoderModel(UMT5Config.from_dict(ours.config.to_dict()))
    parts = {
        "transformer": transformer(**DIT, **extra),
        "vae": AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "text_encoder": encoder,
        "tokenizer": ByT5Tokenizer(model_max_length=160),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    pipeline(**parts).save_pretrained(path)
    shutil.rmtree(path / "transformer")
    parts["transformer"].save_pretrained(path / "transformer", max_shard_size="50KB")
    return parts


@pytest.fixture(scope="module", params=sorted(KINDS))
def reference(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    return path, save_reference(path, request.param)


@pytest.fixture
def copy(tmp_path, tmp_path_factory):
    """A Wan checkpoint that a test may damage."""
    path = tmp_path_factory.getbasetemp() / "whole"
    if not path.exists():
        save_reference(path, "wan")
    return shutil.copytree(path, tmp_path / "model")


def assert_same_tensors(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def public_config(network):
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(config))


def test_reads_what_diffusers_writes(reference):
    path, parts = reference
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    folder = open_folder(path)
    assert folder.scheduler["flow_shift"] == 3.0 and folder.longvid == {}
    assert_same_tensors(load_dit(folder, torch.float32), parts["transformer"])
    assert_same_tensors(load_vae(folder, torch.float32), parts["vae"])
    assert_same_tensors(TextEncoder.load(path, torch.float32).encoder, parts["text_encoder"])


def test_bfloat16_keeps_float32_where_diffusers_does(reference):
    path, parts = reference
    ours = load_dit(open_folder(path), torch.bfloat16).state_dict()
    theirs = type(parts["transformer"]).from_pretrained(path / "transformer", torch_dtype=torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert {torch.bfloat16, torch.float32} == {tensor.dtype for tensor in ours.values()}
    vae = load_vae(open_folder(path), torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


def test_a_stage_holds_its_layers_only(reference):
    path, parts = reference
    whole = parts["transformer"].state_dict()
    held = set()
    for layers in (range(0, 1), range(1, 2), range(2, 3)):
        stage = load_dit(open_folder(path), torch.float32, layers=layers).state_dict()
        assert {int(name.split(".")[1]) for name in stage if name.startswith("blocks.")} == set(layers)
        assert all(torch.equal(whole[name], tensor) for name, tensor in stage.items())
        held |= set(stage)
    assert held == set(whole)


def test_diffusers_reads_what_longvid_writes(reference, tmp_path):
    path, parts = reference
    folder = open_folder(path)
    dit, vae = load_dit(folder, torch.float32), load_vae(folder, torch.float32)
    text = TextEncoder.load(path, torch.float32)
    saved = tmp_path / "saved"
    save_folder(saved, dit=dit, vae=vae, text=text, scheduler=scheduler_config(5.0), longvid={"method": "rolling"})
    assert [p.name for p in tmp_path.iterdir()] == ["saved"] and open_folder(saved).longvid == {"method": "rolling"}

    pipeline = DiffusionPipeline.from_pretrained(saved, local_files_only=True)
    assert isinstance(pipeline, (WanPipeline, SkyReelsV2DiffusionForcingPipeline))
    assert type(pipeline.tokenizer) is type(parts["tokenizer"])
    assert pipeline.scheduler.config.flow_shift == 5.0 and pipeline.scheduler.config.use_flow_sigmas
    for part in ("transformer", "vae", "text_encoder"):
        assert_same_tensors(getattr(pipeline, part), parts[part])
        if part != "text_encoder":
            assert public_config(getattr(pipeline, part)) == public_config(parts[part])

    with pytest.raises(FileExistsError, match="exists already"):
        save_folder(saved, dit=dit, vae=vae, text=text, scheduler=scheduler_config(5.0), longvid={})
    with pytest.raises(ValueError, match="part of the DiT"):
        stage = load_dit(folder, torch.float32, layers=range(0, 2))
        save_folder(tmp_path / "x", dit=stage, vae=vae, text=text, scheduler=scheduler_config(5.0), longvid={})


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; give one that holds model_index.json"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model_index.json: is missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"its part {part}/ is missing"):
        open_folder(copy)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_config_is_missing_or_invalid(copy, part):
    file = next((copy / part).glob("*config.json"))
    file.write_text('{"a": ')
    with pytest.raises(ValueError, match=f"{file}: is not valid JSON"):
        open_folder(copy)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: is missing"):
        open_folder(copy)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_are_missing_or_cut(copy, part):
    file = next((copy / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file}: is damaged: cut short in tensor '"):
        open_folder(copy)
    for file in (copy / part).glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"{part}: has no weights"):
        open_folder(copy)


@pytest.mark.parametrize("part, known", [("transformer", "WanTransformer3DModel or Sky"), ("vae", "AutoencoderKLWan")])
def test_unknown_classes(copy, part, known):
    file = copy / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "UNet"}))
    with pytest.raises(ValueError, match=f"_class_name='UNet' is not known; use {known}"):
        open_folder(copy)


def test_two_transformers(copy):
    file = copy / "model_index.json"
    content = {**json.loads(file.read_text()), "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="two transformers"):
        open_folder(copy)


def test_weights_that_do_not_fit_the_config(copy):
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_layers": 4}))
    with pytest.raises(ValueError, match=r"tensor 'blocks.3.+ is missing \(and \d+ more\)"):
        load_dit(open_folder(copy), torch.float32)
    file.write_text(json.dumps({**config, "num_layers": 2}))
    with pytest.raises(ValueError, match=r"tensor 'blocks.2.+ is not the model's"):
        load_dit(open_folder(copy), torch.float32, layers=range(0, 1))
    file.write_text(json.dumps({**config, "ffn_dim": 48}))
    with pytest.raises(ValueError, match=r"has shape \(.*\); the model's config asks for \(.*48"):
        load_dit(open_folder(copy), torch.float32)
