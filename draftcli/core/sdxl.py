"""Where the first version had built-in models; its model cards and documents import them from here.

Today they are in `draftcli.core.models.places`.
"""

from draftcli.core.models.places import BUILT_IN, model_path

__all__ = ["BUILT_IN", "model_path"]
