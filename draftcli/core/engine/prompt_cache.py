"""Every prompt is encoded once: kept in memory, and on disk where a folder is given.

Prompts are encoded one at a time, so that an embedding depends on nothing but its prompt: not on what stood beside it
in the batch, nor on whether it was encoded now or in an earlier session.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.family import Embedding, Parts, tokenize
from draftcli.runs import disk_errors
from draftcli.umask import follow_umask

KEPT = 2048  # prompts in memory: 0.6 GB of SDXL's embeddings in bfloat16


class PromptCache:
    """(L, D) sequence and (D2,) pooled embeddings by prompt.

    Args:
        parts: whose text encoders to ask.
        device: where the encoders run.
        offload: keep them on the CPU while they have nothing to do; a prompt that is known never moves them.
        folder: also keep embeddings there, for other runs. A file is named after the encoders' weights and the
            prompt's tokens, so that another model, dtype or tokenizer can't be given a wrong one. None: memory alone.
    """

    def __init__(self, parts: Parts, device: torch.device, offload: bool = False, folder: Path | None = None) -> None:
        self.parts, self.device, self.offload, self.folder = parts, device, offload, folder
        self._kept: OrderedDict[str, Embedding] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, D) and (B, D2) on the device, in the encoders' dtype."""
        if any(lora_layers(encoder) for encoder in self.parts.text_encoders):  # on, off or scaled: nothing can be kept
            self._kept.clear()
            self.folder = None
        known = {prompt: self._kept.get(prompt) or self._read(prompt) for prompt in prompts}
        wanted: dict[str, Embedding] = {prompt: found for prompt, found in known.items() if found is not None}
        missing = [prompt for prompt in known if prompt not in wanted]
        if missing:
            self._move_encoders(self.device)
            for prompt in missing:
                sequence, pooled = self.parts.family.encode_prompts(self.parts, [prompt])
                wanted[prompt] = sequence[0].cpu(), pooled[0].cpu()
                self._write(prompt, wanted[prompt])
            if self.offload:
                self._move_encoders(torch.device("cpu"))
        for prompt, embedding in wanted.items():
            self._kept[prompt] = embedding
            self._kept.move_to_end(prompt)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        sequence, pooled = zip(*(wanted[prompt] for prompt in prompts), strict=True)
        return torch.stack(sequence).to(self.device), torch.stack(pooled).to(self.device)

    def _move_encoders(self, device: torch.device) -> None:
        for encoder in self.parts.text_encoders:
            encoder.to(device)

    def _file(self, prompt: str) -> Path | None:
        if self.folder is None:
            return None
        tokens = [ids.tolist() for ids in tokenize(self.parts, [prompt])]
        name = hashlib.sha256(f"{self._encoders} {tokens}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def _read(self, prompt: str) -> Embedding | None:
        file = self._file(prompt)
        if file is None or not file.is_file():
            return None
        try:
            stored = load_file(file)
            return stored["sequence"], stored["pooled"]
        except (SafetensorError, KeyError):  # damaged: encode it again
            return None

    def _write(self, prompt: str, embedding: Embedding) -> None:
        file = self._file(prompt)
        if file is None:
            return
        with disk_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.stem}.{os.getpid()}")  # other ranks and runs may write the same one
            save_file(dict(zip(("sequence", "pooled"), embedding, strict=True)), aside)
            follow_umask(aside)
            aside.replace(file)

    @cached_property
    def _encoders(self) -> str:
        """What tells these encoders from others: a hash of every weight."""
        digest = hashlib.sha256()
        for encoder in self.parts.text_encoders:
            for name, weight in encoder.state_dict().items():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
