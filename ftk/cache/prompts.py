"""What sample images are drawn from: the texts and images of `sample.prompts`, as items of the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftk.cache import plan
from ftk.cache.plan import ImageItem, TextItem
from ftk.errors import ConfigError
from ftk.models.base import SharesTexts
from ftk.models.components.geometry import ReferenceRule
from ftk.pipeline import prompt_images
from ftk.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The texts by what the cache lists them under, and the items of those prompts that have images.

    `shared` are what texts begin with that depend on references, by the same keys, where the family has such. `seen` are the
    references that texts depend on, at the size at which the text encoder sees them.
    """

    texts: dict[str, TextItem] = field(default_factory=dict)
    shared: dict[str, TextItem] = field(default_factory=dict)
    references: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)
    seen: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)
    controls: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)

    @property
    def items(self) -> list[TextItem]:
        """Every text, and what it begins with."""
        return [*self.shared.values(), *self.texts.values()]

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
            _add_references(prompts, key, entry.references, run.family.references, f"{place}.references")
        if entry.controls:
            size, is_latents = (drawn.width, drawn.height), run.needs.controls == "latents"
            controls = tuple(
                _item(prompt_images.find_control(control, size, f"{place}.controls.{number}"), f"control{number}")
                for number, control in enumerate(entry.controls)
            )
            prompts.controls[key] = controls if is_latents else tuple(map(plan.as_pixels, controls))
        _add_text(run, prompts, key, entry.prompt, prompts.seen.get(key, ()))
    for entry in run.config.sample.entries:
        # Where texts do not depend on references all prompts share one negative prompt, unless they have their own.
        references = prompts.seen.get(entry.key(), ())
        _add_text(run, prompts, run.negative_key(entry, model), run.negative_prompt(model, entry), references)
    return prompts


def _add_references(prompts: Prompts, key: str, paths: Sequence[str], rule: ReferenceRule, place: str) -> None:
    if rule.most is not None and len(paths) > rule.most:
        raise ConfigError(f"{place}: {len(paths)} input images, and the model takes {rule.most} at most.")

    def items(size: Callable[[int, int], tuple[int, int]], part: str) -> tuple[ImageItem, ...]:
        images = [prompt_images.find(path, size, f"{place}.{number}") for number, path in enumerate(paths)]
        return tuple(_item(image, f"{part}{number}") for number, image in enumerate(images))

    prompts.references[key] = items(rule.size, "reference")
    if rule.in_texts:
        prompts.seen[key] = items(rule.seen_size, "seen") if rule.seen_area else prompts.references[key]


def _add_text(run: Run, prompts: Prompts, key: str, caption: str | None, references: tuple[ImageItem, ...]) -> None:
    *shared, prompts.texts[key] = plan.text_items(caption, references, is_split=isinstance(run.family, SharesTexts))
    if shared:
        prompts.shared[key] = shared[0]


def _item(image: prompt_images.PromptImage, part: str) -> ImageItem:
    return ImageItem(image.id, "", str(image.path), part, image.width, image.height, made=image.made)
