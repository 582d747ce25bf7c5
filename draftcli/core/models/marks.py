"""What a single .safetensors says of itself, by shapes, empty tensors and metadata, before its weights are read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from draftcli.core.guidance import Prediction
from draftcli.core.models.original_layout import ORIGINAL_UNET
from draftcli.core.schedule import TRAIN_STEPS, sigma_table
from draftcli.errors import InputError, brief

# modelspec.prediction_type
PREDICTION_NAMES: dict[str, Prediction] = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
# Tables of noise levels that training code leaves in checkpoints, each as the share of the image in the variance.
_TABLES = {
    "alphas_cumprod": lambda alphas: alphas,
    "betas": lambda betas: (1 - betas).cumprod(0),
    "denoiser.sigmas": lambda sigmas: 1 / (1 + sigmas**2),
}
_TABLE_TOLERANCE = 0.01  # bfloat16 rounds by 0.004; SDXL's table and that with zero terminal SNR lie 0.04 apart


def check_marks(file: Path, prediction_type: Prediction | None) -> None:
    """Refuse a checkpoint that says of itself that SDXL's formulas do not hold for it.

    Args:
        file: a .safetensors in the layout of the original code.
        prediction_type: model.prediction_type, which counts more than what the file says of it.

    Raises:
        InputError: it was trained by EDM, its UNet wants the guidance scale (LCM), its noise levels are not SDXL's, or
            it predicts something that we don't know.
    """
    where = f"model.pretrained {file}"
    with safe_open(file, framework="pt") as tensors:
        keys, metadata = set(tensors.keys()), tensors.metadata() or {}
        tables = {key: tensors.get_tensor(key) for key in _TABLES if key in keys}
    if edm := sorted(key for key in keys if key.startswith("edm_")):
        raise InputError(
            f"{where}: its mark {edm[0]} says that it was trained by EDM, whose formulas are not those of SDXL; "
            "choose a model without it"
        )
    if any(key.startswith(ORIGINAL_UNET) and key.endswith("cond_proj.weight") for key in keys):
        raise InputError(
            f"{where}: the guidance scale is an input of its UNet (time_cond_proj_dim), as in LCM, and diffusers reads "
            "no such single file; give the diffusers folder, and sampling.guidance_embedding with it"
        )
    for key, table in tables.items():
        if not _is_sdxls(_TABLES[key](table.double())):
            raise InputError(f"{where}: its table {key} is not that of SDXL's noise levels; choose another model")
    said = metadata.get("modelspec.prediction_type", "")
    if said and said not in PREDICTION_NAMES and prediction_type is None and "v_pred" not in keys:
        raise InputError(
            f"{where}: its modelspec.prediction_type is {brief(said)}; draftp knows {', '.join(PREDICTION_NAMES)}. Set "
            "model.prediction_type if it predicts one of these"
        )


def _is_sdxls(shares: Tensor) -> bool:
    """Whether these shares of the image (N,) are SDXL's, plain or with zero terminal SNR, in either order."""
    if shares.shape != (TRAIN_STEPS,):
        return False
    expected = [1 / (1 + sigma_table(zero_snr).double() ** 2) for zero_snr in (False, True)]
    return any(
        bool(torch.isclose(found, own, atol=_TABLE_TOLERANCE, rtol=0).all())
        for own in expected
        for found in (shares, shares.flip(0))
    )
