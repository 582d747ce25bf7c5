"""What is known of a merge once it is done: the JSON beside the result, and the lines that the command prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from draftcli.core.models.family import find_family
from draftcli.export.compress import Loss
from draftcli.export.verify import Comparison

REPORT = "draftp-merge.json"


@dataclass(frozen=True)
class ReportedInput:
    """One input.

    Attributes:
        name: as the user gave it, or the run's folder.
        weights: the file or folder that was read.
        scale: that it was added with, the scale of all inputs included.
    """

    name: str
    weights: str
    scale: float


@dataclass(frozen=True)
class MergeFigures:
    """Figures of what was written. A model has the first three, a LoRA that was compressed the last.

    Attributes:
        bytes: of all tensors.
        changed: how many tensors differ from the base's.
        rounding: by dtype, the norm of what casting moved over the norm of the change.
        compression: what a lower rank lost.
    """

    bytes: int | None = None
    changed: int | None = None
    rounding: dict[str, float] | None = None
    compression: Loss | None = None


@dataclass
class MergeReport:
    """A merge, for programs and for the card.

    Attributes:
        draftp: the version that wrote it.
        title: the output's name without its ending.
        format: as --format takes it.
        family: of the model that it is, or is for.
        base: the model merged into, as the user gave it; None: LoRAs were merged without one.
        inputs: what was merged.
        vae: what a model decodes with, as model.vae of its run has it; None: with the base's own VAE.
        figures: of the result.
        verification: outputs of the result's networks beside those that were wanted; None: not compared.
        checks: one line for each check that it passed.
    """

    draftp: str
    title: str
    format: str
    family: str
    base: str | None
    inputs: list[ReportedInput]
    vae: str | None = None
    figures: MergeFigures = MergeFigures()
    verification: list[Comparison] | None = None
    checks: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """What the inputs were merged with, for people."""
        return self.base or f"{find_family(self.family).short}'s configuration"

    def to_json(self) -> str:
        """The text of draftp-merge.json; what does not apply to the format is left out."""
        values: dict[str, object] = {}
        for key, value in asdict(self).items():
            values |= value if key == "figures" else {key: value}
        return json.dumps({key: value for key, value in values.items() if value is not None}, indent=2)
