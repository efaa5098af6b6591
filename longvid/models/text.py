"""Text encoder: umT5 and the folder's own tokenizer, as Wan and SkyReels-V2 use them.

A prompt is cleaned, padded to a fixed number of tokens and encoded under its mask; states past its end are zero and
stay, so cross-attention always sees the same number of tokens.
"""

import html
import json
from pathlib import Path

import torch

from longvid.checkpoints.safetensor_files import load_into, module_tensors, open_tensors, read_json, save_tensors
from longvid.models.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from longvid.models.umt5 import UMT5Config, UMT5Encoder
from longvid.types import Text


class TextEncoder:
    """Prompts to text states. `max_length` is the number of tokens that every prompt gets, end mark included."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer):
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = tokenizer.max_length

    @classmethod
    def load(cls, folder: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> "TextEncoder":
        """Read `text_encoder/` and `tokenizer/` of a released folder.

        Raises ValueError for another model than umT5, for damaged or wrong weights, and for a tokenizer that is
        incomplete.
        """
        folder = Path(folder)
        part = folder / "text_encoder"
        raw = read_json(part / "config.json")
        try:
            config = UMT5Config.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{part / 'config.json'}: {error}") from None
        with torch.device("meta"):
            encoder = UMT5Encoder(config)
        # float16 overflows in the feed-forward's second matrix
        keep = (lambda name: ".wo." in name) if dtype is torch.float16 else (lambda name: False)
        load_into(encoder, open_tensors(part, "model"), dtype=dtype, device=device, keep_float32=keep)
        return cls(encoder, load_tokenizer(folder / "tokenizer"))

    @property
    def device(self) -> torch.device:
        """Where prompts are encoded."""
        return self.encoder.shared.weight.device

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` into `folder`."""
        part = folder / "text_encoder"
        save_tensors(part, "model", module_tensors(self.encoder))
        (part / "config.json").write_text(json.dumps(self.encoder.config.to_dict(), indent=2) + "\n")
        self.tokenizer.save(folder / "tokenizer")

    @torch.no_grad()
    def __call__(self, *prompts: str) -> Text:
        """Text states (prompts, max_length, dim), float32, zero past a prompt's end mark. A longer prompt is cut.

        Wan2.1 (arXiv 2503.20314), section 4: umT5 states, read by cross-attention in every layer.
        """
        tokens, mask = (x.to(self.device) for x in self.tokenizer([clean(prompt) for prompt in prompts]))
        return self.encoder(tokens, mask).float() * mask[..., None]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, end mark included."""
        return self.tokenizer.count(clean(prompt))

    def surplus(self, prompt: str) -> int:
        """How many tokens of the prompt are past the limit and would be cut; 0 if it fits."""
        return max(0, self.count_tokens(prompt) - self.max_length)


def clean(prompt: str) -> str:
    """The prompt with its encoding mended (if ftfy is installed), HTML entities resolved and white space collapsed."""
    try:
        from ftfy import fix_text
    except ImportError:
        fix_text = str
    return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


def make_small_text_encoder(*, seed: int = 0) -> tuple[UMT5Encoder, ByteTokenizer]:
    """The embedded model's text encoder, untrained: 3 layers, 128 wide, over the bytes of at most 159 characters."""
    config = UMT5Config(vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5Encoder(config).reset()
    return encoder, ByteTokenizer(160)
