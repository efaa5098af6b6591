import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, WanPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from longvid.models.text import TextEncoder, clean, make_small_text_encoder

PROMPTS = ["", "A red kite.", "  two\n spaces &amp;amp; more ", "\u732b sits " * 60]


@pytest.fixture(scope="module")
def text():
    return TextEncoder(*make_small_text_encoder(seed=1))


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    text.save(path)
    return path


@pytest.mark.parametrize("pipeline", [WanPipeline, SkyReelsV2DiffusionForcingPipeline])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_states_are_those_of_diffusers(text, folder, pipeline, prompt, monkeypatch):
    ftfy = SimpleNamespace(fix_text=str)
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    monkeypatch.setattr(sys.modules[pipeline.__module__], "ftfy", ftfy, raising=False)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
    tokenizer = ByT5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    parts = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, _execution_device=torch.device("cpu"))
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(parts, prompt, max_sequence_length=text.max_length)
    ours = text(prompt)
    assert ours.shape == (1, 160, 128) and ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)
    end = min(text.count_tokens(prompt), 160)
    assert ours[0, end:].eq(0).all() and ours[0, :end].ne(0).any(-1).all()


def test_round_trip_of_a_folder(text, folder):
    loaded = TextEncoder.load(folder, torch.float32)
    assert loaded.max_length == 160
    assert loaded.encoder.shared.weight is loaded.encoder.encoder.embed_tokens.weight
    assert torch.equal(loaded("A red kite."), text("A red kite."))


def test_half_precision_keeps_the_matrix_that_overflows(text, folder):
    half = TextEncoder.load(folder, torch.float16)
    assert half.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert half.encoder.shared.weight.dtype == torch.float16
    assert half("kite").dtype == torch.float32
    torch.testing.assert_close(half("kite"), text("kite"), rtol=0.02, atol=0.02)


def test_surplus_counts_what_is_cut(text):
    assert text.count_tokens("abc") == 4 and text.surplus("abc") == 0
    assert text.surplus("a" * 159) == 0 and text.surplus("a" * 160) == 1 and text.surplus("\u732b" * 60) == 21
    assert torch.equal(text("a" * 300), text("a" * 159))


@pytest.mark.parametrize("prompts", [PROMPTS, ["a", ""], ["\U0001f3b5"]])
@pytest.mark.parametrize("length", [None, 7, 300])
def test_tokens_are_those_of_byt5(text, folder, prompts, length):
    theirs = ByT5Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    expected = theirs(prompts, padding="max_length", max_length=length or 160, truncation=True, return_tensors="pt")
    tokens, mask = text.tokenizer(prompts, length)
    assert torch.equal(tokens, expected.input_ids) and torch.equal(mask, expected.attention_mask)
    assert [text.tokenizer.count(prompt) for prompt in prompts] == [len(theirs(prompt).input_ids) for prompt in prompts]


def test_clean():
    assert clean(" a &amp;lt;b&amp;gt;\t\n c\u3000d ") == "a <b> c d"


def test_the_small_encoder_is_a_function_of_its_seed():
    state = torch.get_rng_state()
    one, two, other = (make_small_text_encoder(seed=s)[0].shared.weight for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.equal(state, torch.get_rng_state())


def unigram_folder(folder, model_max_length):
    """A tokenizer as released Wan folders have it: tokenizer.json with its own normalizer, T5Tokenizer by name."""
    vocabulary = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581kite", "\u2581red", "k", "i", "t", "e"]
    core = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(vocabulary)], unk_id=2))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=model_max_length
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "T5Tokenizer"}))


@pytest.mark.parametrize("model_max_length, expected", [(512, 512), (10**30, 512), (32, 32)])
def test_released_tokenizer_is_taken_as_it_is(text, tmp_path, model_max_length, expected):
    text.save(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    unigram_folder(tmp_path, model_max_length)
    loaded = TextEncoder.load(tmp_path, torch.float32)
    assert loaded.max_length == expected and loaded.tokenizer.class_name == "PreTrainedTokenizerFast"
    tokens, mask = loaded.tokenizer([clean("Red KITE")], 5)
    assert (tokens.tolist(), mask.tolist()) == ([[5, 4, 1, 0, 0]], [[1, 1, 1, 0, 0]])
    assert loaded.count_tokens("Red KITE") == 3
    assert loaded("red kite")[0, 3:].eq(0).all()


@pytest.mark.parametrize(
    "part, name, content, message",
    [
        ("text_encoder", "config.json", "{", "not valid JSON"),
        ("text_encoder", "config.json", '{"model_type": "t5"}', "model_type='t5' must be 'umt5'"),
        ("text_encoder", "model.safetensors", "", "is damaged in its header"),
        ("tokenizer", "tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "needs tokenizer.json or spiece"),
    ],
)
def test_errors(text, tmp_path, part, name, content, message):
    text.save(tmp_path)
    (tmp_path / part / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        TextEncoder.load(tmp_path, torch.float32)


def test_bytes_need_no_library_and_loading_is_silent(folder):
    script = (
        "import sys, torch; from longvid.models.text import TextEncoder;"
        f"text = TextEncoder.load({str(folder)!r}, torch.float32); text('x' * 400);"
        "assert text.surplus('x' * 400) == 241;"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
