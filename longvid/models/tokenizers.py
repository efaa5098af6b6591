"""Prompts to tokens: bytes, as ByT5 takes them, or by transformers what else a released folder holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longvid.checkpoints.safetensor_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 512
"""What the models of the Wan family are trained with."""


class ByteTokenizer:
    """ByT5's (arXiv 2105.13626, section 3): a token is a byte of UTF-8 and 3 more; 0 pads and 1 ends a prompt.

    `max_length` is the most tokens of a prompt, end mark included. transformers' own reads its marks ("</s>") within
    prompts too; here they are bytes like others.
    """

    class_name = "ByT5Tokenizer"

    def __init__(self, max_length: int):
        self.max_length = min(max_length, MAX_TOKENS)

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and mask, each (prompts, length), int64; a prompt that is longer is cut."""
        ids = np.zeros((len(prompts), length or self.max_length), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            known = np.frombuffer(prompt.encode(), np.uint8)[: len(row) - 1]
            row[: len(known)] = known + np.int64(3)
            row[len(known)] = 1
        return torch.from_numpy(ids), torch.from_numpy((ids > 0).astype(np.int64))

    def count(self, prompt: str) -> int:
        """Tokens of the whole prompt, end mark included."""
        return len(prompt.encode()) + 1

    def save(self, folder: Path) -> None:
        """Write what transformers reads."""
        from transformers import ByT5Tokenizer

        ByT5Tokenizer(model_max_length=self.max_length).save_pretrained(folder)


class LibraryTokenizer:
    """One of transformers', with the same four things to ask of it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.max_length = min(tokenizer.model_max_length, MAX_TOKENS)

    @property
    def class_name(self) -> str:
        """The name under which any version of transformers loads the tokenizer as it is."""
        name = type(self.tokenizer).__name__
        return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and mask, each (prompts, length), int64; a prompt that is longer is cut."""
        found = self.tokenizer(list(prompts), padding="max_length", max_length=length or self.max_length,
                               truncation=True, return_tensors="pt")  # fmt: skip
        return found.input_ids, found.attention_mask

    def count(self, prompt: str) -> int:
        """Tokens of the whole prompt, end mark included."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    def save(self, folder: Path) -> None:
        """Write what it was read from."""
        self.tokenizer.save_pretrained(folder)


Tokenizer = ByteTokenizer | LibraryTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """ByT5's, or whatever `tokenizer.json` holds, taken as it is (T5's own class would rebuild its normalizer).

    Raises ValueError for a folder that lacks the file that its kind needs.
    """
    config = read_json(folder / "tokenizer_config.json")
    kind = config.get("tokenizer_class")
    if kind == "ByT5Tokenizer":
        return ByteTokenizer(config.get("model_max_length", MAX_TOKENS))
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    if (folder / "tokenizer.json").exists():
        cls = PreTrainedTokenizerFast
    elif (folder / "spiece.model").exists():
        cls = T5TokenizerFast
    else:
        raise ValueError(f"{folder}: {kind} needs tokenizer.json or spiece.model, and neither is there")
    return LibraryTokenizer(cls.from_pretrained(folder, local_files_only=True))
