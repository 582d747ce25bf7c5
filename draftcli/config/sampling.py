"""The section `sampling`: how pictures are drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from draftcli.config.section import Edge, Section, Share


class SamplingConfig(Section):
    """How images are generated, in training and in validation."""

    height: Edge = 1024
    """Height of the images, in pixels."""
    width: Edge = 1024
    """Width of the images, in pixels."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    """N, the number of sampler steps."""
    scale: Annotated[float, Field(le=100)] = 5.0
    """Scale of classifier-free guidance, 1 to 100; 1 turns it off."""
    sampler: Literal["euler", "heun", "ddim", "dpmpp_2m", "euler_ancestral", "lcm"] = "euler"
    """heun takes two evaluations a step; heun and dpmpp_2m can generate but not train. euler_ancestral (SDXL Turbo) and
    lcm (LCM, Hyper, DMD2) add fresh noise after each step but the last, from the image's seed."""
    schedule: Literal["trailing", "leading"] = "trailing"
    """Step grid. Trailing gives the last step, the only one with gradient when K = 1, five times more leverage."""
    timesteps: list[Annotated[int, Field(ge=0, lt=1000)]] = []
    """The timesteps themselves in falling order, such as LCM's [999, 759, 499, 259]; `steps` is then their number.
    Empty: the grid of `schedule`."""
    s_churn: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Fresh noise per step (Karras et al. 2022), one draw for tuned and base."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """First and last part of the steps with guidance, [from, to) in shares of N; outside it the scale is 1, at half the
    cost (Kynkäänniemi et al. 2024). This changes the images, and other programs that use the LoRA must do the same."""
    guidance_embedding: Annotated[float, Field(ge=1, le=100)] | None = None
    """The guidance scale that the UNet itself is told, where it takes one (time_cond_proj_dim, as LCM's own UNets);
    scale is then 1. null for all other UNets."""
    negative_prompt: str | None = None
    """Negative prompt; null: none, as in diffusers."""
    sizes: list[tuple[Edge, Edge]] = []
    """(height, width) pairs to choose from in training, one size for each batch; empty: always height x width."""

    @field_validator("scale")
    @classmethod
    def _at_least_one(cls, scale: float) -> float:
        """Below 1 guidance turns away from the prompt, and 0 is the unconditional network. Nobody asks for that: in
        diffusers and on the cards of few-step models 0 is another way to write no guidance.
        """
        if scale < 1:
            raise ValueError("allowed are 1 to 100; 1 is no guidance, which diffusers and few-step models write as 0")
        return scale

    @field_validator("guidance_interval")
    @classmethod
    def _in_order(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise ValueError("the first number is the smaller one")
        return interval

    @field_validator("timesteps")
    @classmethod
    def _falling(cls, timesteps: list[int]) -> list[int]:
        if any(after >= before for before, after in pairwise(timesteps)):
            raise ValueError("each is smaller than the one before, as in [999, 749, 499, 249]")
        return timesteps

    @model_validator(mode="before")
    @classmethod
    def _steps_follow(cls, data: Any) -> Any:
        """Where timesteps are given alone, steps is their number."""
        if isinstance(data, dict) and isinstance(data.get("timesteps"), list) and data["timesteps"]:
            return {"steps": len(data["timesteps"]), **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _scale_follows(cls, data: Any) -> Any:
        """Where guidance_embedding is given alone, the UNet is not guided a second time."""
        if isinstance(data, dict) and data.get("guidance_embedding") is not None:
            return {"scale": 1.0, **data}
        return data

    @property
    def guidance(self) -> float:
        """What diffusers' pipelines call guidance_scale, whether two evaluations do it or the UNet itself."""
        return self.scale if self.guidance_embedding is None else self.guidance_embedding

    @property
    def grid(self) -> str:
        """Which steps are taken, in words."""
        return f"timesteps {' '.join(map(str, self.timesteps))}" if self.timesteps else f"{self.schedule} grid"

    @property
    def summary(self) -> str:
        """Steps, sampler and guidance in words, for footers."""
        return f"{self.steps} steps of {self.sampler}, guidance {self.guidance:g}"

    def is_guided(self, step: int) -> bool:
        """Whether a sampler step, 0 .. steps - 1, takes two evaluations: with the prompt and without."""
        first, last = self.guidance_interval
        return self.scale != 1 and first <= step / self.steps < last
