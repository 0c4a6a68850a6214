"""The model card beside delivered weights: what they are, how to load them, how they were trained, and pictures.

As the metadata in the files it is a function of the settings, the step and what the run's folder holds up to that step.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image

import ftk
from ftk import storage
from ftk.configs.load import parse_yaml, redact
from ftk.configs.resolutions import label
from ftk.configs.schema import CardConfig, ModelConfig
from ftk.deliver import metadata
from ftk.deliver.metadata import Subject
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import peft_method
from ftk.methods.base import Method
from ftk.models.base import Family
from ftk.run import Run
from ftk.train import sheet
from ftk.train.hooks.recorder import validation_table

LOGGER = logging.getLogger("ftk")
CARD = "README.md"
PICTURES = "images"
HERE = "path/to/this/folder"
"""How the card's Python lines call the folder that it lies in."""
_MOST_PICTURES = 8
_PICTURE_PX = 512
_PICTURE_LINK = re.compile(rf"\]\(({PICTURES}/\d+(?:-from-\d+)?\.png)\)", re.ASCII)
_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_OTHER_READERS = {
    "comfyui": "ComfyUI: put `comfyui.safetensors` into `models/loras` and load it with the node Load LoRA.",
    "kohya": (
        "A1111 and Forge: put `kohya.safetensors` into `models/Lora` and write `<lora:kohya:1>` in the prompt. ComfyUI: put it "
        "into `models/loras`. sd-scripts and musubi-tuner: `--network_weights kohya.safetensors`."
    ),
    "lycoris": (
        "LyCORIS: `create_lycoris_from_weights(1.0, 'lycoris.safetensors', denoiser)`; ComfyUI: put it into `models/loras`."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardImage:
    """A picture beside the card, the prompt that it was drawn for, if that is known, and the pictures it was drawn from."""

    file: str
    prompt: str
    inputs: tuple[str, ...] = ()


def write(subject: Subject, directory: Path, loading: str, *, merged: bool = False) -> list[Path]:
    """Write the card, and the pictures that it shows, beside weights; returns the files.

    Args:
        loading: how the weights are loaded: Markdown, such as of `loading`.
        merged: the folder is a pipeline with the weights folded in.
    """
    step, images = _pictures(subject)
    pictures = []
    for number, (image, prompt, sources) in enumerate(images):
        inputs = {f"{PICTURES}/{number}-from-{position}.png": source for position, source in enumerate(sources)}
        picture = CardImage(file=f"{PICTURES}/{number}.png", prompt=prompt, inputs=tuple(inputs))
        for file, each in {picture.file: image, **inputs}.items():
            storage.commit_bytes(directory / file, sheet.png_bytes(each))
        pictures.append(picture)
    files = [file for picture in pictures for file in (picture.file, *picture.inputs)]
    _remove_stale(directory, files)
    storage.commit_bytes(directory / CARD, redact(text(subject, loading, pictures, step, merged=merged)).encode())
    return [directory / CARD, *(directory / file for file in files)]


def _remove_stale(directory: Path, keep: Sequence[str]) -> None:
    """Remove the pictures of the card that is there still, but for those that the next one has; no others are ftk's."""
    try:
        before = (directory / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for file in set(_PICTURE_LINK.findall(before)) - set(keep):
        (directory / file).unlink(missing_ok=True)


def loading(subject: Subject, form: str, repository: str | None = None) -> str:
    """Markdown: how a delivery in this format is loaded, from its folder or from the Hub.

    Args:
        repository: its Hub id.
    """
    base = metadata.base_name(subject.config.model, subject.config.card)
    lines = how_to_load(subject.run.method, subject.run.settings, subject.run.family, base, form)
    if form != "comfyui" and _is_for_comfyui(subject.run):
        lines += "\n\nFor ComfyUI: `ftk export RUN.yaml --format comfyui` writes these weights as it reads them."
    return _from_hub(lines, repository) if repository else lines


def _is_for_comfyui(run: Run) -> bool:
    """Whether the weights can be written as ComfyUI reads them."""
    if isinstance(run.method, methods.HasReaders):
        return run.method.reading(run.family, run.settings, "comfyui") is not None
    return "comfyui" in run.formats


def how_to_load(method: Method, settings: Any, family: Family, base: str, form: str) -> str:
    """Markdown: how what a method wrote in a format is loaded from its folder.

    Args:
        base: the base model's Hub id, or the name of its folder.
    """
    if isinstance(method, methods.HasReaders) and (reading := method.reading(family, settings, form)) is not None:
        return reading
    first = methods.formats(method, settings)[0]
    if form in _OTHER_READERS:
        return "\n\n".join([_OTHER_READERS[form], *(_not_for_diffusers(settings, first) if form == "comfyui" else [])])
    if form == first:
        return _python(base, method.usage(family, settings))
    return _python(base, peft_method.usage_of_directories(family, method.encoders(family, settings)))


def _not_for_diffusers(settings: Any, form: str) -> list[str]:
    """Why a file for ComfyUI is not for diffusers, if it is not; and the format to write for it."""
    if getattr(settings, "modules_to_save", None) is not None:
        reason = "refuses the modules that were trained whole (`diff`, `diff_b`)"
    elif getattr(settings, "dora", False):
        reason = "leaves out DoRA's scales (`dora_scale`), and draws something else without them"
    else:
        return []
    return [f"This file is for ComfyUI alone: diffusers {reason}. For diffusers: `ftk export RUN.yaml --format {form}`."]


def _python(base: str, usage: str) -> str:
    place = base if "/" in base else f"path/to/{base}"
    start = f'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("{place}")'
    return f"```python\n{start}\n{usage}\n```"


def _from_hub(lines: str, repository: str) -> str:
    """What loads from a folder, from a repository: its folders are subfolders there, and its files are downloaded."""
    below = re.sub(rf'"{HERE}/(\w+)"', rf'"{repository}", subfolder="\1"', lines)
    files = re.sub(rf'"{HERE}/([\w.-]+)"', rf'hf_hub_download("{repository}", "\1")', below)
    if files != below:
        files = files.replace("from safetensors", "from huggingface_hub import hf_hub_download\nfrom safetensors", 1)
    return files.replace(HERE, repository)


def merged_loading(mixed: Sequence[str] = (), usage: str = "") -> str:
    """How a merged pipeline is loaded.

    Args:
        mixed: what else is folded in, and at which strength.
        usage: a line of Python that draws with it, where that is not as with the base's.
    """
    start = "from diffusers import DiffusionPipeline\n\n# the trained weights are in the pipeline itself"
    lines = [start, f'pipeline = DiffusionPipeline.from_pretrained("{HERE}")', *([usage] if usage else [])]
    code = "\n".join(["```python", *lines, "```"])
    return f"{code}\n\nMerged: {', '.join(mixed)}." if mixed else code


def text(subject: Subject, loading: str, pictures: Sequence[CardImage], step: int, *, merged: bool = False) -> str:
    """README.md as the Hub reads it: YAML, then Markdown.

    Args:
        step: of the pictures.
    """
    config, triggers = subject.config, subject.triggers
    relation = "finetune" if merged or subject.is_whole else "adapter"
    front = front_matter(
        config.model,
        config.card,
        relation=relation,
        tags=[config.model.family, config.method.name],
        instance_prompt=", ".join(triggers) or None,
        widget=[{"text": one.prompt or " ", "output": {"url": one.file}} for one in pictures] or None,
    )
    sections = [
        f"---\n{front}\n---",
        f"# {_cell(metadata.title(subject))}",
        f"{_what(subject, merged)}, trained for {subject.step:,} steps with ftk {ftk.__version__}.",
        config.card.description or "",
        f"Trigger words: {', '.join(f'`{trigger}`' for trigger in triggers)}" if triggers else "",
        *_gallery(pictures, step),
        "## How to load it",
        loading,
        "## How it was trained",
        _table(_training(subject)),
        _table(_dataset(subject)),
        _license_line(config.card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(model: ModelConfig, card: CardConfig, *, relation: str, tags: Sequence[str], **others: Any) -> str:
    """The Hub's metadata of a model. A base that is no Hub id is left out: the Hub would refuse the card."""
    base = metadata.hub_id(model, card)
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        tags=["ftk", "diffusers", "text-to-image", *tags],
        **others,
    )
    front: str = data.to_yaml()
    return front


def base_license(model: Path) -> str | None:
    """The licence that the base model's own card names, if its folder holds that card."""
    try:
        front = _FRONT.match((model / CARD).read_text(encoding="utf-8"))
        tree = parse_yaml(front[1], str(model / CARD)) if front else None
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    found = tree.get("license_name") or tree.get("license") if isinstance(tree, dict) else None
    return found if isinstance(found, str) else None


def _what(subject: Subject, merged: bool) -> str:
    base, name = metadata.hub_id(subject.config.model, subject.config.card), subject.config.method.name
    shown = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else _cell(metadata.base_name(subject.config.model, subject.config.card))
    )
    family = subject.config.model.family
    if merged:
        return f"{shown} ({family}) with what {name} learned folded into its weights"
    return f"{shown} ({family}), fine-tuned" if subject.is_whole else f"An adapter ({name}) for {shown} ({family})"


def _gallery(pictures: Sequence[CardImage], step: int) -> list[str]:
    if not pictures:
        return []
    rows = [f"| ![{number}]({one.file}) | {_cell(one.prompt)} |" for number, one in enumerate(pictures)]
    heads = ["| picture | prompt |", "|---|---|"]
    if any(one.inputs for one in pictures):
        heads = ["| drawn from " + heads[0], "|---" + heads[1]]
        links = [" ".join(f"![from]({file})" for file in one.inputs) for one in pictures]
        rows = [f"| {link} {row}" for link, row in zip(links, rows, strict=True)]
    return [f"Drawn at step {step:,}:", "\n".join([*heads, *rows])]


def _training(subject: Subject) -> dict[str, str]:
    train, start = subject.config.train, metadata.counts(subject).get("start_from")
    averaged = {"moving average": f"{train.ema_decay:g}"} if train.ema_decay else {}
    settings = ", ".join(f"{_words(name)} {_shown(value)}" for name, value in metadata.settings_of(subject).items())
    return {
        "method": subject.config.method.name,
        "its settings": f"{settings}; the strength alpha / rank is in the tensors"
        if metadata.network_of(subject)
        else settings,
        "resolutions": ", ".join(map(label, subject.config.data.resolutions_in_use)),
        "steps": f"{subject.step:,}",
        "batch size": str(train.global_batch_size),
        "learning rate": f"{train.learning_rate:g}, {_words(train.schedule.name)}",
        "optimizer": train.optimizer.name,
        **averaged,
        "precision": train.precision,
        "seed": str(train.seed),
        **({"started from": start} if start else {}),
        **_validation(subject),
    }


def _dataset(subject: Subject) -> dict[str, str]:
    counted = metadata.counts(subject)
    if not counted:
        return {}
    held_out = counted["num_held_out"]
    rows = {"samples": f"{counted['num_samples']:,} of {counted['num_images']:,} images"}
    if counted["num_class_samples"]:
        rows["class samples among them"] = f"{counted['num_class_samples']:,}"
    if held_out:
        rows["held out for validation"] = f"{held_out:,}"
    for source in counted["sources"]:
        rows[f"source {source['name']}"] = f"repeats {source['repeats']}, {source['role']}"
    return rows


def _validation(subject: Subject) -> dict[str, str]:
    """Of this step or the last measurement before it."""
    rows = [row for row in validation_table(subject.run.paths.run).to_pylist() if row["step"] <= subject.step]
    if not rows:
        return {}
    best = [row for row in rows if row["is_best"]]
    noted = f"; the best was {best[-1]['loss']:.4g} at step {best[-1]['step']:,}" if best else ""
    return {"validation loss": f"{rows[-1]['loss']:.4g} at step {rows[-1]['step']:,}{noted}"}


def _pictures(subject: Subject) -> tuple[int, list[tuple[Image.Image, str, list[Image.Image]]]]:
    """The newest sheet of sample images up to this step: its step, and its pictures with their prompts and input images."""
    sheets = {
        int(path.stem.removeprefix("step-")): path for path in (subject.run.paths.run / "samples").glob("step-[0-9]*.png")
    }
    step = max((step for step in sheets if step <= subject.step), default=0)
    if not step:
        return 0, []
    try:
        cells = sheet.cells_with_inputs(sheets[step])[:_MOST_PICTURES]
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is damaged (%s), so the model card shows no pictures", sheets[step], error)
        return 0, []
    for image, _, inputs in cells:
        for each in (image, *inputs):
            each.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.LANCZOS)
    return step, cells


def _license_line(card: CardConfig) -> str:
    if card.license is None:
        return ""
    return (
        f"Licence: [{metadata.license_name(card)}]({card.license_link})"
        if card.license_link
        else f"Licence: {metadata.license_name(card)}"
    )


def _table(rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}: {_shown(one)}" for name, one in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(text: str) -> str:
    """One line."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Text in a table's cell."""
    return _plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
