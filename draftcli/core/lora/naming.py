"""How programs name the layers in a LoRA's file, and what else such files hold.

The namings that are recognised, each with the same module:

    diffusers        unet.down_blocks.1.attentions.0.proj_in.lora_A.weight        (.lora_B; scale in the metadata)
    older diffusers  unet.down_blocks.1.attentions.0.proj_in.lora.down.weight     (.up; attn1.processor.to_q_lora.down)
    one network's    down_blocks.1.attentions.0.proj_in.lora_A.weight             (save_lora_adapter of diffusers)
    peft             base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight   (scale in adapter_config.json)
    kohya            lora_unet_input_blocks_4_1_proj_in.lora_down.weight          (.lora_up.weight, .alpha)
    kohya, by        lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight
    diffusers' names
    ComfyUI          diffusion_model.input_blocks.4.1.proj_in.lora_down.weight    (text_encoders.clip_l.transformer.)
    OneTrainer       unet.input_blocks.4.1.proj_in.lora_down.weight               (clip_l., clip_g.)
    original         model.diffusion_model.input_blocks.4.1.proj_in...            (conditioner.embedders.0.transformer.,
                                                                                   cond_stage_model.transformer.)

Underscored names can't be parsed (is it `to_q` or `to.q`?), so every spelling is looked up in a table made from the
networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from draftcli.core.lora.files import LORA_PARTS
from draftcli.core.models.original_names import original_unet_names
from draftcli.core.models.weight_files import with_text_model

PEFT_PREFIX = "base_model.model."
_OPEN_CLIP = "conditioner.embedders.1.model."
_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
    _OPEN_CLIP: "text_encoder_2",
    **{
        f"{before}{clip}.{after}": part
        for clip, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
        for before in ("text_encoders.", "")
        for after in ("transformer.", "")
    },
    **{f"{part}.": part for part in LORA_PARTS},
}
_LONGEST_FIRST = sorted(_PREFIXES, key=len, reverse=True)

_LORA = r"[._]lora(?:_linear_layer)?[._]"
_ADAPTER = r"(?:\.[\w-]+)?"  # peft's name of the adapter
_TENSORS = {
    "down": re.compile(rf"(.+?){_LORA}(?:A|down){_ADAPTER}\.weight"),
    "up": re.compile(rf"(.+?){_LORA}(?:B|up){_ADAPTER}\.weight"),
    "middle": re.compile(rf"(.+?){_LORA}mid{_ADAPTER}\.weight"),
    "bias": re.compile(rf"(.+?){_LORA}(?:B|up){_ADAPTER}\.bias"),
    "magnitude": re.compile(r"(.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]+)*)"),
    "alpha": re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha"),
    "scalar": re.compile(r"(.+?)\.scalar"),
}
# In the order in which they are looked for.
_NOT_LORA = {
    "LoHa": r"[._]hada_[wt]\d",
    "LoKr": r"[._]lokr_[wt]\d",
    "BOFT": r"[._]boft_",
    "OFT": r"[._]oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "IA3": r"\.on_input$|[._]ia3_l",
    "VeRA": r"[._]vera_lambda",
    "AdaLoRA": r"[._](lora_E|ranknum)\b",
    "FourierFT": r"[._]fourierft_",
    "Control-LoRA": r"^lora_controlnet",
    "a LoRA of the table of token embeddings": r"[._]lora_embedding_[AB]",
    "changes of norms (LyCORIS)": r"\.[wb]_norm$",
    "differences of whole weights": r"\.diff(_b)?$",
    "weights that replace others": r"\.(set_weight|reshape_weight)$",
    "layers that were trained as a whole": r"\.(modules_to_save|base_layer|original_module)\.",
}
_EMBEDDING = re.compile(r"bundle_emb\.(?P<name>.+?)\.(clip_[lg]|string_to_param)\b.*|emb_params|clip_[lg]")
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_OPEN_CLIP_LAYERS = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}

NamedTensor = tuple[str, Tensor]  # with its key
Place = tuple[str, str, tuple[int, ...] | None]  # network, clean name of the module, shape of its weight


@dataclass
class Contents:
    """The tensors of a LoRA's file by what they are.

    Attributes:
        layers: by module as the file spells it: its tensors by what they are (down, up, middle, bias, magnitude,
            alpha, scalar).
        others: keys of what is no LoRA, by what it is.
        embeddings: names of the embeddings for trigger words that lie beside the LoRA.
        unknown: keys that no program is known to write.
        twice: keys of tensors that another adapter of the file has for the same layer.
    """

    layers: dict[str, dict[str, NamedTensor]] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def has_matrices(self) -> bool:
        """Whether there is any LoRA in it."""
        return any("down" in tensors or "up" in tensors for tensors in self.layers.values())


def sort_tensors(tensors: Mapping[str, Tensor]) -> Contents:
    """What each tensor of a file is, by its key."""
    found = Contents()
    for key, tensor in tensors.items():
        other = next((what for what, pattern in _NOT_LORA.items() if re.search(pattern, key)), None)
        matches = ((what, pattern.fullmatch(key)) for what, pattern in _TENSORS.items())
        what, match = next(((what, match) for what, match in matches if match), ("", None))
        if other:
            found.others.setdefault(other, []).append(key)
        elif embedding := _EMBEDDING.fullmatch(key):
            found.embeddings.add(embedding["name"] or key)
        elif match is None or tensor.is_complex() or (what in ("alpha", "scalar") and tensor.numel() != 1):
            found.unknown.append(key)
        elif what in found.layers.setdefault(match[1], {}):
            found.twice.append(key)
        else:
            found.layers[match[1]][what] = (key, tensor if tensor.itemsize > 1 else tensor.float())
    return found


class Spellings:
    """Finds the layer that a file means.

    Args:
        shapes: by network (see `reading.read_lora`): of the weights of its linear layers and convolutions.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        self.tables = {part: _spellings(part, names) for part, names in shapes.items()}

    def place(self, module: str) -> Place | None:
        """The network, clean name and weight's shape of a module as a file spells it, or None.

        The shape is None for a text encoder whose shapes are not there.
        """
        prefix, part, name = split_prefix(module)
        if part not in self.tables and part != "unet":
            return part, name, None
        if part != "unet" and "self_attn.to_" in name:
            stem, _, last = name.rpartition(".")
            name = f"{stem}.{_OLD_ATTENTION.get(last, last)}"
        if prefix == _OPEN_CLIP and name == "text_projection":
            return None  # transposed there, and no layer
        found = self.tables.get(part, {}).get(name)
        return (part, *found) if found else None


def split_prefix(module: str) -> tuple[str, str, str]:
    """(prefix, network, rest) of a module as a file spells it; without a prefix it is one of the UNet's."""
    name = module.removeprefix(PEFT_PREFIX)
    prefix = next((p for p in _LONGEST_FIRST if name.startswith(p)), "")
    rest = name.removeprefix(prefix).removeprefix(PEFT_PREFIX).replace(".processor.", ".")
    return prefix, _PREFIXES.get(prefix, "unet"), rest


def why_unplaced(module: str) -> str | None:
    """What a module is that the networks don't have, where its name says so; for people."""
    name = module.replace(".", "_")
    if "in_proj" in name:
        return "is for q, k and v in one matrix, as OpenCLIP has them"
    if re.match(r"(text_encoder_3|lora_te3|lora_t5|text_encoders_t5|t5xxl)", name):
        return "is for a third text encoder, as SD3 has it"
    if re.match(r"(base_model_model_|lycoris_)?text_model_", name):
        return "is for a text encoder, and does not say for which of the two"
    return None


def _spellings(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every way in which files spell a module's name, to the one in clean form and its weight's shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    originals = original_unet_names(shapes) if part == "unet" else {}
    for name, shape in shapes.items():
        clean = name if part == "unet" else with_text_model(name)
        original = originals.get(name) if part == "unet" else _open_clip_name(clean)
        bare = clean.removeprefix("text_model.")  # as transformers 5 has the first encoder's
        for spelling in filter(None, (name, clean, bare, original)):
            found[spelling] = found[spelling.replace(".", "_")] = (clean, shape)
            if spelling.endswith("to_out.0"):
                found[spelling.removesuffix(".0")] = (clean, shape)
    return found


def _open_clip_name(name: str) -> str | None:
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
    layer = _OPEN_CLIP_LAYERS.get(match[2]) if match else None
    return f"transformer.resblocks.{match[1]}.{layer}" if match and layer else None
