"""The section `sample` of a run file: pictures that are drawn to look at."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from ftk.configs.prompt_lines import HAS_OPTIONS
from ftk.configs.resolutions import a_size
from ftk.configs.section import Device, Section, require_default, require_text


class AddedAdapterConfig(Section):
    """What another run delivered, drawn together with this one by `ftk sample`."""

    path: str = Field(min_length=1, description="a folder with a LoRA, LoHa or LoKr, in diffusers' or PEFT's format")
    strength: float = Field(default=1.0, ge=-10, le=10)


def negative_key(negative: str | None) -> str:
    """What a cache lists a negative prompt under; no text has a key that no prompt has."""
    return "\0" if negative is None else negative


class PromptConfig(Section):
    """A prompt, with the images that are drawn from, and settings in place of those of `sample`."""

    prompt: str
    references: tuple[str, ...] = Field(default=(), description="files of input images, for an edit model")
    controls: tuple[str | dict[str, Any], ...] = Field(
        default=(), description="control images, for a method that reads them: files, or {make: canny, from: FILE}"
    )
    control_strength: float = Field(default=1.0, ge=0, le=10, description="factor on what the control images add")
    negative_prompt: str | None = Field(default=None, description="instead of sample.negative_prompt, and so on below")
    width: int | None = Field(default=None, ge=16, description="px; `size: 768x1024` sets both sides")
    height: int | None = Field(default=None, ge=16)
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, description="sample.seed plus the prompt's position by default")
    strength: float | None = Field(default=None, ge=-10, le=10, description="of the run's own LoRA, LoHa or LoKr")

    @model_validator(mode="before")
    @classmethod
    def _size_sets_both_sides(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or "size" not in tree:
            return tree
        if {"width", "height"} & tree.keys():
            raise ValueError("`size` sets `width` and `height`: leave it out, or both of them")
        width, height = a_size(tree["size"])
        return {"width": width, "height": height, **{name: value for name, value in tree.items() if name != "size"}}

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _prompts_are_text(cls, value: str | None) -> str | None:
        require_text(value or "")
        return value

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.controls:
            require_default(self, "control_strength", "controls")
        return self

    def key(self, negative: str | Literal[False] | None = False) -> str:
        """What a cache lists this prompt under, or the negative one that goes with the same images; no path is in it."""
        text = self.prompt if negative is False else negative_key(negative)
        files: list[Any] = [list(self.references), list(self.controls)]
        if not any(files):
            return text
        if self.controls and (self.width or self.height):
            # Control images are encoded at the size of the picture.
            files.append([self.width, self.height])
        return f"{text} #{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"

    def notes(self) -> str:
        """The settings of its own, for people; empty without any."""
        size = [f"{self.width or '?'}x{self.height or '?'} px"] if self.width or self.height else []
        named = {"steps": self.num_inference_steps, "guidance": self.guidance_scale, "seed": self.seed,
                 "strength": self.strength, "control strength": self.control_strength if self.control_strength != 1 else None,
                 "without": self.negative_prompt}  # fmt: skip
        return ", ".join([*size, *(f"{name} {value}" for name, value in named.items() if value is not None)])


def _prompt(value: Any) -> Any:
    """A prompt alone will do; a union would complain of both forms."""
    if isinstance(value, str) and HAS_OPTIONS.search(value):
        raise ValueError(
            "options of a prompt (--n, --w, ...) are read from a file of lines alone: write {prompt: ..., width: 768}, or "
            "`prompts: FILE`. In {prompt: ...} they are a part of the text"
        )
    if isinstance(value, (str, PromptConfig)):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("a prompt, or {prompt: ..., seed: ..., controls: [...]}")
    return PromptConfig.model_validate(value)


Prompt = Annotated[str | PromptConfig, BeforeValidator(_prompt)]


class SampleConfig(Section):
    """Images drawn to look at. `strength` and `adapters` are for `ftk sample`: training draws the weights as they are."""

    prompts: tuple[Prompt, ...] = Field(
        default=(),
        description="prompts, with images and settings of their own: {prompt: ..., seed: 7}; or a file of sd-scripts' lines",
    )
    negative_prompt: str | None = Field(
        default=None, description="what is not to be seen; the family's own text for no prompt by default"
    )
    every: int | None = Field(default=None, ge=1, description="steps between sample images while training; none by default")
    at_start: bool = Field(default=False, description="sample images before the first step, too: of what training begins with")
    num_inference_steps: int = Field(default=30, ge=1)
    guidance_scale: float = Field(default=4.0, ge=0, description="true classifier-free guidance; 1 or less turns it off")
    width: int | None = Field(default=None, ge=16, description="px; the first resolution by default")
    height: int | None = Field(default=None, ge=16)
    seed: int = Field(default=0, ge=0)
    device: Device = "auto"
    strength: float = Field(
        default=1.0, ge=-10, le=10, description="of the run's own LoRA, LoHa or LoKr; others load at 1 alone"
    )
    adapters: tuple[AddedAdapterConfig, ...] = Field(
        default=(), description="drawn on top of the run's own, in one more column"
    )

    @field_validator("prompts", "negative_prompt")
    @classmethod
    def _prompts_are_text(cls, value: tuple[Prompt, ...] | str | None) -> tuple[Prompt, ...] | str | None:
        for prompt in (value,) if isinstance(value, str) else value or ():
            require_text(prompt if isinstance(prompt, str) else prompt.prompt)
        return value

    @model_validator(mode="after")
    def _negative_prompts_take_effect(self) -> Self:
        for position, entry in enumerate(self.entries):
            guidance = self.guidance_scale if entry.guidance_scale is None else entry.guidance_scale
            if entry.negative_prompt is not None and guidance <= 1:
                raise ValueError(f"`prompts.{position}.negative_prompt` has no effect without `guidance_scale` above 1")
        return self

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if not self.prompts:
            require_default(self, "every", "prompts")
            require_default(self, "at_start", "prompts")
        return self

    @property
    def draws_in_training(self) -> bool:
        """Whether `ftk train` draws images."""
        return bool(self.prompts) and (self.at_start or self.every is not None)

    @property
    def entries(self) -> tuple[PromptConfig, ...]:
        """The prompts with their images and settings, of which most have none."""
        return tuple(PromptConfig(prompt=each) if isinstance(each, str) else each for each in self.prompts)
