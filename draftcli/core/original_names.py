"""Where the first version had the names of the original SDXL code, for scripts that were written then.

Today they are in `draftcli.core.models.original_names`.
"""

from draftcli.core.models.original_names import original_unet_names

__all__ = ["original_unet_names"]
