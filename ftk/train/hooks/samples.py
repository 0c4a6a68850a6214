"""Draws the sample prompts while training. Prompts come from the cache; the VAE is loaded for the moment and freed."""

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftk import storage
from ftk.cache.store import CacheStore
from ftk.configs.schema import PromptConfig
from ftk.errors import CacheError, ConfigError
from ftk.methods import base as methods
from ftk.methods.base import HasControls, HasTexts
from ftk.models.base import encoded
from ftk.run import DrawnPrompt, Run
from ftk.train import drawing, sheet
from ftk.train.controls import control_tensor
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer


def check(run: Run, store: CacheStore, model: Path) -> None:
    """Before anything is loaded, not at the first picture: is all there that is to be drawn, and can it be drawn?

    Raises:
        CacheError: a prompt, or what belongs to it, is not in the cache.
        ConfigError: the family has no images of that size, or the method has no strength.
    """
    if not run.config.sample.draws_in_training:
        return
    for drawn in run.drawn_prompts:
        _check_strength(run, drawn)
        _check_prompt(store, drawn)
        _check_negative(run, store, model, drawn)
        _check_inputs(run, store, drawn)


def _check_strength(run: Run, drawn: DrawnPrompt) -> None:
    strength = drawn.entry.strength
    reason = methods.strength_refusal(run.method, run.settings) if strength not in (None, 1) else None
    if reason is not None:
        raise ConfigError(f"{drawn.place}.strength: {strength:g} cannot be drawn while training: {reason} Leave it out.")


def _check_prompt(store: CacheStore, drawn: DrawnPrompt) -> None:
    entry = drawn.entry
    if entry.key() in store.manifest.prompts:
        return
    if entry.references or entry.controls:
        raise CacheError(
            f"{drawn.place}: {entry.prompt!r} is not in the cache with these images at this size. Run `ftk cache RUN.yaml`: it "
            f"encodes them alone."
        )
    raise CacheError(
        f"sample.prompts: {entry.prompt!r} is not in the cache. Run `ftk cache RUN.yaml`: it encodes that text alone."
    )


def _check_negative(run: Run, store: CacheStore, model: Path, drawn: DrawnPrompt) -> None:
    if not drawn.has_negative or run.negative_key(drawn.entry, model) in store.manifest.prompts:
        return
    where = f"{drawn.place}.negative_prompt" if drawn.entry.negative_prompt is not None else "sample.negative_prompt"
    text = run.negative_prompt(model, drawn.entry)
    raise CacheError(
        f"{where}: {text or 'no text'!r} is not in the cache. Run `ftk cache RUN.yaml`: it encodes that text alone."
    )


def _check_inputs(run: Run, store: CacheStore, drawn: DrawnPrompt) -> None:
    """Control images must be of the picture's size, in the form that the method reads."""
    again = "Run `ftk cache RUN.yaml`: it encodes those alone."
    for number, item in enumerate(store.prompt_images(drawn.entry.key(), "controls")):
        is_pixels, tensor = "pixels" in item, control_tensor(item)
        factor = 1 if is_pixels else run.family.geometry.factor
        size = tensor.shape[-1] * factor, tensor.shape[-2] * factor
        if is_pixels != (run.needs.controls == "pixels"):
            raise CacheError(
                f"{drawn.place}.controls.{number} is in the cache as {'pixels' if is_pixels else 'latents'}, and method "
                f"{run.method.name} reads {run.needs.controls}. {again}"
            )
        if size != (drawn.width, drawn.height):
            raise CacheError(
                f"{drawn.place}.controls.{number} is in the cache at {size[0]}x{size[1]} px, and its picture is to have "
                f"{drawn.width}x{drawn.height} px. {again}"
            )


class Samples:
    """Writes `samples/step-NNNNNNNN.png`, one image a prompt.

    Args:
        renew_cards: shows the images of a step on the cards of the weights that are of this step.
        is_sharded: every process holds a part of the weights alone, so all draw every image; else they share them.
    """

    def __init__(
        self,
        run: Run,
        model: Path,
        store: CacheStore,
        recorder: Recorder,
        renew_cards: Callable[[int], None],
        *,
        is_sharded: bool,
    ) -> None:
        self._directory = run.paths.run / "samples"
        self._model = model
        self._run = run
        self._config = run.config
        self._store = store
        self._recorder = recorder
        self._renew_cards = renew_cards
        self._is_sharded = is_sharded
        self._inputs: list[sheet.Inputs] = []
        """What each prompt is drawn from, once the main process has drawn."""

    def on_start(self, trainer: Trainer) -> None:
        """Draw what training begins with, if asked for; and what a kill left out after this step's checkpoint."""
        is_missing = trainer.ranks.is_main and self._is_due(trainer.step) and not self._sheet(trainer.step).exists()
        (is_missing,) = trainer.ranks.agree(is_missing)
        if is_missing:
            self._show(trainer)
        elif self._is_due(trainer.step):
            with trainer.ranks.unhurried():
                if trainer.ranks.is_main:
                    self._renew_cards(trainer.step)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw at every `sample.every`-th step."""
        if self._is_due(result.step):
            self._show(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing to close."""

    def _is_due(self, step: int) -> bool:
        settings = self._config.sample
        return settings.at_start if step == 0 else settings.every is not None and step % settings.every == 0

    def _sheet(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.png"

    def _show(self, trainer: Trainer) -> None:
        with self._recorder.paused(trainer), trainer.optimizer.averaged():
            images = self._drawn_by_all(trainer)
        with trainer.ranks.unhurried():
            if images and trainer.ranks.is_main:
                prompts = [entry.prompt for entry in self._config.sample.entries]
                notes = [entry.notes() for entry in self._config.sample.entries]
                rows, titles = [[image] for image in images], [f"step {trainer.step}"]
                page = sheet.grid(rows, prompts, titles, self._inputs, notes)
                storage.commit_bytes(self._sheet(trainer.step), sheet.png_bytes(page))
                self._recorder.images(trainer.step, images, prompts)
                self._renew_cards(trainer.step)

    def _drawn_by_all(self, trainer: Trainer) -> list[Image.Image]:
        """All: one image per prompt, on every process; each draws its share, or all of them where weights are split.

        No image where the run is to stop: it saves first, and draws when it goes on.
        """
        ranks, count = trainer.ranks, len(self._config.sample.entries)
        if ranks.agree(self._stops(trainer))[0]:
            return []
        if self._is_sharded:
            return list(self._draw(trainer, range(count)).values())
        share = range(count)[ranks.rank :: ranks.size]
        with ranks.unhurried():
            images = self._draw(trainer, share) if share else {}
        if ranks.agree(len(images) < len(share))[0]:
            return []
        if ranks.size == 1:
            return list(images.values())
        pixels = [torch.zeros(drawn.height, drawn.width, 3, dtype=torch.uint8) for drawn in self._run.drawn_prompts]
        for position, image in images.items():
            pixels[position] = torch.from_numpy(np.array(image.convert("RGB")))
        ranks.sum(pixels)
        return [Image.fromarray(each.numpy()) for each in pixels]

    def _stops(self, trainer: Trainer) -> bool:
        """Whether a signal asks this process to save instead; the last step is saved already."""
        return trainer.ranks.stop_requested and trainer.step < trainer.config.steps

    def _draw(self, trainer: Trainer, positions: Sequence[int]) -> dict[int, Image.Image]:
        """The images of the prompts at these positions, from the denoiser as it is now; fewer where the run is to stop."""
        family = trainer.model.family
        components = {family.denoiser_attribute: trainer.model.denoiser, **dict.fromkeys(family.text_components)}
        pipeline = family.pipeline(self._model, trainer.dtype, trainer.device, **components)
        vae = weakref.ref(pipeline.vae)
        if isinstance(trainer.method, HasControls):
            pipeline = trainer.method.sampling_pipeline(trainer.model, pipeline)
        images: dict[int, Image.Image] = {}
        with torch.no_grad(), trainer.model.evaluating():
            if trainer.ranks.is_main and not self._inputs:
                self._inputs = [self._shown(entry, vae()) for entry in self._config.sample.entries]
            for position in positions:
                if self._stops(trainer) and not self._is_sharded:
                    break
                entry = self._config.sample.entries[position]
                with methods.at_strength(trainer.method, trainer.model, entry.strength):
                    images[position] = drawing.generate(pipeline, self._run, self._arguments(trainer, position), position)
        del pipeline
        gc.collect()
        assert vae() is None, "something keeps the VAE in memory"
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        return images

    def _shown(self, entry: PromptConfig, vae: Any) -> sheet.Inputs:
        """The images that a prompt is drawn from, out of the cache."""

        def image(item: Mapping[str, torch.Tensor]) -> Image.Image:
            tensor = control_tensor(item)
            pixels_CHW = tensor if "pixels" in item else self._run.family.decode(vae, tensor[None])[0]
            levels_HWC = ((pixels_CHW.float() + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0)
            return Image.fromarray(levels_HWC.to("cpu", torch.uint8).numpy())

        return {
            part.removesuffix("s"): [image(item) for item in items]
            for part in ("references", "controls")
            if (items := self._store.prompt_images(entry.key(), part))
        }

    def _arguments(self, trainer: Trainer, position: int) -> dict[str, Any]:
        """The pipeline's arguments for a prompt: its texts, the negative ones with their prefix, and its images."""
        family, drawn = trainer.model.family, self._run.drawn_prompts[position]

        def texts(key: str) -> dict[str, Any]:
            item = {
                name: tensor.to(trainer.device, trainer.dtype if tensor.is_floating_point() else None)
                for name, tensor in self._store.prompt(key).items()
            }
            batch = encoded(trainer.model, family.collate_texts([item]))
            if isinstance(trainer.method, HasTexts):
                batch = trainer.method.texts(trainer.model, batch)
            return family.pipeline_texts({name: tensor[0] for name, tensor in batch.items() if tensor is not None})

        def batch_of_one(item: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return control_tensor(item)[None].to(trainer.device, trainer.dtype)

        arguments = texts(drawn.entry.key())
        if drawn.has_negative:
            negative = texts(self._run.negative_key(drawn.entry, self._model))
            arguments |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        references, controls = (
            [batch_of_one(item) for item in self._store.prompt_images(drawn.entry.key(), part)]
            for part in ("references", "controls")
        )
        return arguments | drawing.image_arguments(self._run, drawn.entry, references, controls)
