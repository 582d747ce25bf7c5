"""What other programs write into prompts: switches, weights, tags.

Switches of kohya's sd-scripts, AUTOMATIC1111's prompts from file and Midjourney are read where a line of .jsonl can say
the same: prompt, negative_prompt, seed and size. The others are left out, which is told. Whatever else a program would
not read as words is read word for word here, which is told as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from draftcli.prompts.prompt import Prompt

# What a switch says, in the words of .jsonl; width and height make a size.
_KEYS = {
    "prompt": ("prompt",),
    "negative_prompt": ("n", "no", "neg", "negative", "negative_prompt"),
    "seed": ("d", "seed"),
    "width": ("w", "width"),
    "height": ("h", "height"),
}
_KEY_OF = {name: key for key, names in _KEYS.items() for name in names}
# Switches that a prompt cannot say, with the setting that can.
_SETTING_OF = {
    **dict.fromkeys(("l", "cfg_scale"), "sampling.scale"),
    **dict.fromkeys(("s", "steps"), "sampling.steps"),
    **dict.fromkeys(("ss", "sampler_name", "sampler_index"), "sampling.sampler"),
    **dict.fromkeys(("batch_size", "n_iter", "r", "repeat"), "--num-images"),
    "sd_model": "model.pretrained",
}
_WITHOUT_SETTING = (
    # kohya's
    *("g", "am", "cn", "ctr", "ct", "cl", "c", "nl", "t", "i", "m", "f", "ow", "oh", "nw", "nh"),
    *("dsd1", "dst1", "dsd2", "dst2", "dsr", "glt", "glr", "gls", "gle"),
    # AUTOMATIC1111's
    *("outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed", "subseed_strength"),
    *("seed_resize_from_h", "seed_resize_from_w", "restore_faces", "tiling", "do_not_save_samples"),
    "do_not_save_grid",
    # Midjourney's
    *("ar", "aspect", "v", "version", "niji", "q", "quality", "stylize", "chaos", "style", "iw", "stop", "tile"),
    *("weird", "sref", "cref", "oref", "cw", "sw", "p", "profile", "hd", "test", "testp", "creative", "upbeta"),
    *("uplight", "fast", "relax", "turbo", "draft", "raw", "video", "exp"),
)
_NAMES = sorted((*_KEY_OF, *_SETTING_OF, *_WITHOUT_SETTING), key=len, reverse=True)
_SWITCH = re.compile(rf"(?:^|(?<=\s))--({'|'.join(_NAMES).replace('_', '[_-]')})(?=[\s=]|$)[\s=]*", re.IGNORECASE)
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'([^']*)'""")
_INFOTEXT = re.compile(r"(?:^|\s)negative prompt:|^steps: *\d+, *sampler:", re.IGNORECASE)

# Notation by what it is to the programs that know it: one of these pieces is in it, and it looks like that.
_NOTATIONS = {
    "a switch; a .jsonl has keys": (("--",), r"(?:^|(?<=\s))--[A-Za-z][\w-]*"),
    "a negative prompt; a .jsonl has a key for it": ((":",), r"(?i:negative prompt:)"),
    "a weight": (
        ("(", "{{", "::"),
        (
            r"\([^()]*:\s*-?\d*\.?\d+\s*\)|\(\([^()]+\)\)|\{\{[^{}]+\}\}|\)(?:\+|--|\d*\.\d)"
            r"|\w::(?:-?\d|\s|$)"  # Midjourney's
        ),
    ),
    "a LoRA; --lora takes its file": (("<",), r"<(?:lora|lyco|hypernet):[^>]*>"),
    "an embedding": (("embedding:",), r"\bembedding:\w[^\s,]*"),
    "a wildcard": (("{", "__"), r"\{[^{}]*\|[^{}]*\}|(?<!\w)__[\w/-]+?__(?!\w)"),
    "a prompt that changes between steps": (
        ("[",),
        r"\[[^\[\]]*:[^\[\]]*:\s*\d*\.?\d+\s*\]|\[[^\[\]|]+\|[^\[\]]+\]",
    ),
    "a break": (("BREAK", "AND"), r"(?:^|(?<=\s))(?:BREAK|AND)(?=\s|$)"),
}
_PATTERNS = {what: (pieces, re.compile(pattern)) for what, (pieces, pattern) in _NOTATIONS.items()}


def read_switches(text: str) -> tuple[dict[str, Any], list[str]]:
    """What a text with other programs' switches says.

    Args:
        text: one prompt of a text file.

    Returns:
        the keys of a line of .jsonl, "prompt" among them; and the switches that were left out, with their values.

    Raises:
        ValueError: a value that its switch does not take, a switch twice, a size without one of its edges, no prompt,
            or AUTOMATIC1111's text of a picture, whose lines belong together.
    """
    if ":" in text and _INFOTEXT.search(text):
        raise ValueError(
            "this is the text that AUTOMATIC1111 stores with an image; write its parts as "
            '{"prompt": "...", "negative_prompt": "..."} into a .jsonl'
        )
    if "--" not in text:
        return {"prompt": text}, []
    before, switches = _split(text)
    said: dict[str, str] = {}
    left_out = []
    for name, value in switches:
        key = _KEY_OF.get(name)
        if key is None:
            left_out.append(f"--{name} {value}".rstrip())
        elif key in said:
            raise ValueError(f"--{name} {value[:60]!r}: its {key} is there twice")
        else:
            said[key] = value
    if before and "prompt" in said:
        raise ValueError(f"{before[:60]!r} stands before --prompt; one of them is the prompt")
    item: dict[str, Any] = {"prompt": said.get("prompt", before)}
    if switches and not item["prompt"]:
        raise ValueError(f"there is no prompt before --{switches[0][0]}")
    if "negative_prompt" in said:
        item["negative_prompt"] = said["negative_prompt"]
    if said.get("seed", "-1") != "-1":  # AUTOMATIC1111's word for any seed
        item["seed"] = _whole(said, "seed")
    if "width" in said or "height" in said:
        missing = [key for key in ("height", "width") if key not in said]
        if missing:
            raise ValueError(f"a size needs both edges; its {missing[0]} is missing")
        item["size"] = [_whole(said, "height"), _whole(said, "width")]
    return item, left_out


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first switch, and each switch with its value. No switch begins within quotes."""
    found = _SWITCH.search(text)
    before, switches = text[: found.start()].strip() if found else text, []
    while found:
        name, start = found[1].lower().replace("-", "_"), found.end()
        quoted = _QUOTED.match(text, start)
        found = _SWITCH.search(text, quoted.end() if quoted else start)
        value = text[start : found.start() if found else len(text)].strip()
        if quoted and quoted[0] == value:
            value = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted[1] is not None else quoted[2]
        switches.append((name, value))
    return before, switches


def _whole(said: dict[str, str], key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", said[key]):
        raise ValueError(f"{key} {said[key][:60]!r} must be a whole number")
    return int(said[key])


class Notation:
    """What was seen of other programs' notation in the prompts of one source: once each, for its notes.

    Attributes:
        comments: lines that begin with #, which were skipped.
    """

    def __init__(self) -> None:
        self.comments = 0
        self._left_out: dict[str, str] = {}
        self._with_left_out = 0
        self._literal: dict[str, str] = {}

    def add(self, prompt: Prompt, left_out: Sequence[str] = ()) -> None:
        """Look through a prompt's texts; and `left_out`, the switches that were cut off it."""
        if left_out:
            self._with_left_out += 1
            for switch in left_out:
                self._left_out.setdefault(switch.partition(" ")[0], switch)
        for text in (prompt.text, prompt.negative or ""):
            for what, (pieces, pattern) in _PATTERNS.items():
                if what in self._literal or not any(piece in text for piece in pieces):
                    continue
                if found := pattern.search(text):
                    self._literal[what] = found[0]

    def notes(self, where: str) -> Iterator[str]:
        """What people should know of the source that messages call `where`, a line each."""
        if self.comments:
            yield f"{where}: lines that begin with # are comments ({self.comments}); a .jsonl can hold such prompts"
        if self._left_out:
            listed = [_with_setting(name, example) for name, example in self._left_out.items()]
            count = f"{self._with_left_out} prompt{'s' * (self._with_left_out != 1)}"
            yield f"{where}: removed from {count}, as a prompt cannot set it: {', '.join(listed)}"
        if self._literal:
            listed = [f"{example[:40]!r} ({what})" for what, example in self._literal.items()]
            yield f"{where}: taken literally, because draftp has no such notation: {', '.join(listed)}"


def _with_setting(name: str, example: str) -> str:
    setting = _SETTING_OF.get(name.removeprefix("--"))
    return repr(example[:40]) + (f" ({setting} sets it for all)" if setting else "")
