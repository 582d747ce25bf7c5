"""Pictures as files: every prompt with every seed in every column, each drawn once, and an index of them.

What a picture was made of is hashed and stored in its file. One that is there, whole, and has the right hash is not
drawn again; so an interrupted job goes on where it was, and several commands share a folder. A picture of something
else keeps its name, and the new one has its hash behind the name.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcli import __version__
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks
from draftcli.errors import DraftpError
from draftcli.lines import json_line, text_lines
from draftcli.runs import disk_errors, write_aside
from draftcli.sampling.draw import Column, Picture, batches, draw_batch
from draftcli.sampling.embedded import KEY, parameters, read_key, save
from draftcli.sampling.identity import Provenance
from draftcli.sampling.loras import NamedLora, hashes_setting, with_tags
from draftcli.sampling.names import INDEX, free_path
from draftcli.sampling.sheet import to_pil

SAMPLER_NAMES = {  # as viewers know them
    "euler": "Euler",
    "heun": "Heun",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "euler_ancestral": "Euler a",
    "lcm": "LCM",
}
PIXELS_TOGETHER = 1024**2  # of one batch: a picture of SDXL's size on a 24 GB card
PICTURES_TOGETHER = 16
LONGEST_NAME = 256  # bytes that no file's name has
_LONGEST_COLUMN = 150  # bytes of a column's name in a file's


@dataclass(frozen=True)
class File:
    """A picture and its file.

    Attributes:
        path: in the folder that was asked for.
        number: of its prompt, from 0.
        picture: what is on it.
        column: how it was drawn.
        key: hash of everything that it was made of.
        is_beside_another: whether its plain name is another picture's, so that its hash is in its name.
    """

    path: Path
    number: int
    picture: Picture
    column: Column
    key: str
    is_beside_another: bool = False


@dataclass
class Written:
    """What `write_pictures` did.

    Attributes:
        files: those of all processes: prompt by prompt, seed by seed, column by column.
        index: index.jsonl.
        drawn: how many of them were not there already.
        evaluations: UNet evaluations of a picture, by column, guidance's two counted.
    """

    files: list[File]
    index: Path
    drawn: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)

    def rows(self) -> list[list[File]]:
        """The files of one prompt and seed together, a file for each column."""
        return [list(row) for _, row in groupby(self.files, key=lambda f: (f.number, f.picture.seed))]


def write_pictures(
    model: DRaFTPModel,
    columns: Sequence[Column],
    pictures: Sequence[Picture],
    folder: Path,
    *,
    batch_size: int | None = None,
    suffix: str = "png",
    ranks: Ranks | None = None,
    loras: Sequence[NamedLora] = (),
    progress: Callable[[int], None] = lambda count: None,
    told: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
) -> Written:
    """Draw every picture in every column into `folder`, and write index.jsonl there.

    Args:
        model: tuned and base in one.
        columns: ways to draw, of different names.
        pictures: from `draw.plan`; a prompt's pictures are neighbours.
        folder: made where it is not there.
        batch_size: pictures drawn together; None: as many as a card that holds the model surely has room for.
        suffix: png, jpg or webp.
        ranks: processes that share the work; each draws a part, and afterwards all files are there.
        loras: those of the base and of the tuned network, to be named in the files and in the index.
        progress: called with the number of files that this process has newly dealt with.
        told: called before it with the lines that index.jsonl will have of these files, which are there by then. What
            it raises ends the drawing.

    Raises:
        InputError: a weight outside [0, 1], or a scale without a LoRA.
        DraftpError: the disk refuses.
    """
    ranks = ranks or Ranks()
    columns = [column.on(model) for column in columns]
    provenance = Provenance(model)
    files = _files(provenance, columns, pictures, folder, suffix)
    written = Written(files, folder / INDEX, evaluations={c.name: c.evaluations(model) for c in columns})
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    together = batch_size or max(
        1, min(PICTURES_TOGETHER, PIXELS_TOGETHER // max(p.size[0] * p.size[1] for p in pictures))
    )
    together = min(together, -(-len(pictures) // ranks.size))  # a share for every process
    groups = list(_positions(pictures, together))
    done: list[File] = []
    drawn = torch.zeros(1, dtype=torch.int64)
    try:
        with ranks.all_or_none():
            for group in groups[ranks.rank :: ranks.size]:
                for c, column in enumerate(columns):
                    wanted = [files[i * len(columns) + c] for i in group]
                    missing = [file for file in wanted if read_key(file.path) != file.key]
                    if missing:
                        images = draw_batch(model, [file.picture for file in missing], column)
                        _ensure_finite(images, missing, model)
                        for file, image in zip(missing, images, strict=True):
                            _save(file, image, suffix, provenance, _used(file, loras, provenance))
                    done += wanted
                    drawn += len(missing)
                    told([_index_line(file, written, provenance, loras) for file in wanted])
                    progress(len(wanted))
    except BaseException:
        if ranks.is_main and done:  # what there is can be found, also when the rest is never drawn
            _write_index(done, written, provenance, loras)
        raise
    ranks.sum_([drawn])
    written.drawn = int(drawn)
    if ranks.is_main:
        _write_index(files, written, provenance, loras)
    return written


def _ensure_finite(images: Tensor, files: Sequence[File], model: DRaFTPModel) -> None:
    """Stop at a picture that would be saved black, as NaN is.

    Raises:
        DraftpError: it is not finite.
    """
    black = [file for file, image in zip(files, images, strict=True) if not torch.isfinite(image).all()]
    if not black:
        return
    narrow = torch.float16
    if next(model.parts.vae.parameters()).dtype is narrow:
        advice = "SDXL's own VAE does so in fp16: leave model.vae_precision=fp16 out"
    elif model.cfg.model.precision == "fp16":
        advice = "set model.precision to bf16 or fp32"
    else:
        advice = "weights of the model or a LoRA are damaged or came from a training that diverged"
    raise DraftpError(
        f"{black[0].path}: the image is not finite (NaN) and would be black; {advice}; draftp doctor says where it "
        "begins"
    )


def _used(file: File, loras: Sequence[NamedLora], provenance: Provenance) -> list[NamedLora]:
    """The LoRAs that a picture was drawn with, at its scales: for the base, its own alone."""
    tuned = any(file.column.weights(provenance.model))
    own = [lora.scaled(file.column.lora_scale) for lora in loras if tuned and not lora.in_base]
    return [*(lora for lora in loras if lora.in_base), *own]


def _settings(file: File, provenance: Provenance, loras: Sequence[NamedLora]) -> dict[str, object]:
    """A picture's settings in the words of AUTOMATIC1111's web UI; sizes are width x height there."""
    model, (height, width) = provenance.model, file.picture.size
    sampling = model.cfg.sampling
    return {
        "Steps": sampling.steps,
        "Sampler": SAMPLER_NAMES[sampling.sampler],
        "Schedule type": sampling.grid.removesuffix(" grid").capitalize(),
        "CFG scale": f"{sampling.guidance:g}",
        "Seed": file.picture.seed,
        "Size": f"{width}x{height}",
        "Model": Path(model.parts.name).stem,
        "Model hash": provenance.base_hash[:10],
        "AIG": file.column.name,
        **hashes_setting(loras),
        "Version": f"draftp {__version__}",
        KEY: file.key,
    }


def _files(
    provenance: Provenance, columns: Sequence[Column], pictures: Sequence[Picture], folder: Path, suffix: str
) -> list[File]:
    files, number, before = [], -1, None
    taken: set[str] = set()
    digits = max(4, len(str(max(picture.seed for picture in pictures))))
    for picture in pictures:
        # A new prompt, or the same once more: its seeds begin again.
        if before is None or picture.prompt is not before.prompt or picture.seed != before.seed + 1:
            number += 1
        before = picture
        stem = "-".join(filter(None, [f"{number:04d}", _slug(picture.prompt.text), f"s{picture.seed:0{digits}d}"]))
        for column in columns:
            key = provenance.key(picture, column)
            plain = f"{stem}-{_without_sheet(_cut(column.name))}"
            path = free_path(folder, plain, f".{suffix}", key, partial(read_key, whole=False), taken)
            taken.add(path.name.lower())
            files.append(File(path, number, picture, column, key, path.name != f"{plain}.{suffix}"))
    return files


def _positions(pictures: Sequence[Picture], together: int) -> Iterator[list[int]]:
    at = 0
    for group in batches(pictures, together):
        yield list(range(at, at + len(group)))
        at += len(group)


def _slug(text: str) -> str:
    """A few plain letters of a prompt for a file's name. "sheet" is kept for contact sheets."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return _without_sheet("-".join(re.findall(r"[a-z0-9]+", plain))[:40].strip("-"))


def _cut(name: str) -> str:
    """At most so many bytes that a file can be called so."""
    return name.encode()[:_LONGEST_COLUMN].decode(errors="ignore")


def _without_sheet(name: str) -> str:
    return re.sub("sheet", "sht", name, flags=re.IGNORECASE)


def _save(file: File, image: Any, suffix: str, provenance: Provenance, loras: Sequence[NamedLora]) -> None:
    prompt = with_tags(file.picture.prompt.text, loras)
    text = parameters(prompt, provenance.negative(file.picture), _settings(file, provenance, loras))
    with disk_errors(file.path):
        write_aside(file.path, lambda aside: save(to_pil(image), aside, suffix, text))


def _write_index(files: Sequence[File], written: Written, provenance: Provenance, loras: Sequence[NamedLora]) -> None:
    """One line a picture, by file name. Lines of earlier jobs stay while their files are there."""
    lines = {name: line for name, line in read_index(written.index).items() if (written.index.parent / name).is_file()}
    lines |= {file.path.name: _index_line(file, written, provenance, loras) for file in files}
    text = "".join(json_line(lines[name]) for name in sorted(lines))
    with disk_errors(written.index):
        write_aside(written.index, lambda aside: aside.write_text(text, encoding="utf-8"))


def _index_line(file: File, written: Written, provenance: Provenance, loras: Sequence[NamedLora]) -> dict[str, Any]:
    height, width = file.picture.size
    return {
        "file": file.path.name,
        "prompt": file.picture.prompt.text,
        "negative_prompt": provenance.negative(file.picture),
        "seed": file.picture.seed,
        "height": height,
        "width": width,
        "weight": file.column.name,
        "weights": [round(w, 6) for w in file.column.weights(provenance.model)],
        "stochastic": file.column.stochastic,
        "lora_scale": file.column.lora_scale,
        "loras": [lora.to_json() for lora in _used(file, loras, provenance)],
        "evaluations": written.evaluations[file.column.name],
        "hash": file.key,
    }


def read_index(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an index.jsonl by file name; lines that are none are left out."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = text_lines(path, errors="surrogateescape")  # a line that is not UTF-8 is left out below
    except OSError:
        return found
    for line in lines:
        try:
            item = json.loads(line)
            json.dumps(item, ensure_ascii=False).encode()
            name = Path(item["file"]).name
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if len(name.encode()) < LONGEST_NAME:
            found[name] = item
    return found
