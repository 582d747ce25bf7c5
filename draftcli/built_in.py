"""The weights that ship with the package, by the names under which settings know them."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "toy" / "weights"

# For `model.pretrained`: diffusers folders like any other. A folder of such a name does not replace them.
BUILT_IN_MODELS = {"toy": _WEIGHTS / "model"}
# For `model.loras`: folders as diffusers writes them.
BUILT_IN_LORAS = {"toy-4step": _WEIGHTS / "toy-4step"}
