"""What sample images are drawn from: the texts and images of `sample.prompts`, as items of the cache."""

from dataclasses import dataclass, field
from pathlib import Path

from ftk.cache import plan
from ftk.cache.plan import ImageItem, TextItem
from ftk.pipeline import prompt_images
from ftk.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The texts by what the cache lists them under, and the items of those prompts that have images."""

    texts: dict[str, TextItem] = field(default_factory=dict)
    references: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)
    controls: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)

    @property
    def images(self) -> list[ImageItem]:
        """Every image of every prompt."""
        return [item for part in (self.references, self.controls) for items in part.values() for item in items]


def of(run: Run, model: Path) -> Prompts:
    """The prompts of a run and the negative one; nothing where there are no prompts.

    Args:
        model: the folder of the base model.

    Raises:
        ConfigError: an image cannot be read, or the family or method has no use for it.
    """
    prompts = Prompts()
    for drawn in run.drawn_prompts:
        entry, place, key = drawn.entry, drawn.place, drawn.entry.key()
        if run.family.references is not None and entry.references:
            prompts.references[key] = tuple(
                _item(prompt_images.find(path, run.family.references, f"{place}.references.{number}"), f"reference{number}")
                for number, path in enumerate(entry.references)
            )
        if entry.controls:
            size, is_latents = (drawn.width, drawn.height), run.needs.controls == "latents"
            controls = tuple(
                _item(prompt_images.find_control(control, size, f"{place}.controls.{number}"), f"control{number}")
                for number, control in enumerate(entry.controls)
            )
            prompts.controls[key] = controls if is_latents else tuple(map(plan.as_pixels, controls))
        prompts.texts[key] = _text(entry.prompt, _seen_by_texts(run, prompts, key))
    for entry in run.config.sample.entries:
        # Where texts do not depend on references all prompts share one negative prompt, unless they have their own.
        references = _seen_by_texts(run, prompts, entry.key())
        prompts.texts[run.negative_key(entry, model)] = _text(run.negative_prompt(model, entry), references)
    return prompts


def _seen_by_texts(run: Run, prompts: Prompts, key: str) -> tuple[ImageItem, ...]:
    rule = run.family.references
    return prompts.references.get(key, ()) if rule is not None and rule.in_texts else ()


def _text(caption: str | None, references: tuple[ImageItem, ...]) -> TextItem:
    return TextItem(plan.text_id(caption, [each.id for each in references]), caption, references)


def _item(image: prompt_images.PromptImage, part: str) -> ImageItem:
    return ImageItem(image.id, "", str(image.path), part, image.width, image.height, made=image.made)
