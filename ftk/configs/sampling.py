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

from ftk.configs.section import Device, Section, require_default, require_text


class AddedAdapterConfig(Section):
    """What another run delivered, drawn together with this one by `ftk sample`."""

    path: str = Field(min_length=1, description="a folder with a LoRA, LoHa or LoKr, in diffusers' or PEFT's format")
    strength: float = Field(default=1.0, ge=-10, le=10)


def negative_key(negative: str | None) -> str:
    """What a cache lists a negative prompt under; no text has a key that no prompt has."""
    return "\0" if negative is None else negative


class PromptConfig(Section):
    """A prompt, with the images that are drawn from."""

    prompt: str
    references: tuple[str, ...] = Field(default=(), description="files of input images, for an edit model")
    controls: tuple[str, ...] = Field(default=(), description="files of control images, for a method that reads them")

    def key(self, negative: str | Literal[False] | None = False) -> str:
        """What a cache lists this prompt under, or the negative one that goes with the same images; no path is in it."""
        text = self.prompt if negative is False else negative_key(negative)
        files = [list(self.references), list(self.controls)]
        return f"{text} #{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}" if any(files) else text


def _prompt(value: Any) -> Any:
    """A prompt alone will do; a union would complain of both forms."""
    if isinstance(value, (str, PromptConfig)):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("a prompt, or {prompt: ..., references: [...], controls: [...]}")
    return PromptConfig.model_validate(value)


Prompt = Annotated[str | PromptConfig, BeforeValidator(_prompt)]


class SampleConfig(Section):
    """Images drawn to look at. `strength` and `adapters` are for `ftk sample`: training draws the weights as they are."""

    prompts: tuple[Prompt, ...] = Field(default=(), description="prompts; with images: {prompt: ..., references: [FILE]}")
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
        """The prompts with their images, of which most have none."""
        return tuple(PromptConfig(prompt=each) if isinstance(each, str) else each for each in self.prompts)
