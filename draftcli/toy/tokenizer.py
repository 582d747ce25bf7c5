"""CLIP tokenizers for the toy world: a byte-level BPE learned from its captions, which still spells out any text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from draftcli.toy.world import all_scenes, caption

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77


def save_tokenizer(folder: Path, pad_token: str = EOS) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the rest of a CLIPTokenizer to `folder`; SDXL's second pads with "!"."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _learn_merges()
    letters = _byte_letters()
    words = letters + [f"{letter}</w>" for letter in letters] + [a + b for a, b in merges] + [BOS, EOS]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order: "!" is token 0, as in SDXL's vocabulary."""
    return sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, ord(letter)))


def _learn_merges() -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=_byte_letters(), show_progress=False
    )
    tokenizer.train_from_iterator([caption(scene) for scene in all_scenes()], trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
