"""Custom Diffusion: the keys and values of cross-attention, by which a U-Net reads its text, trained beside class images.

They are 2% of the weights of Stable Diffusion. Source: Kumari et al. 2022 (arXiv 2212.04488); diffusers'
`CustomDiffusionAttnProcessor` and `examples/custom_diffusion`, to whose predictions and gradients these are equal. As there, no
gradient passes through the keys and values of a text's first token, which marks its beginning.

A transformer with joint attention has no cross-attention. The keys and values of its text stream are the closest to it: an
analogue, not the paper's method. The first token of its texts is a word, and is trained like the others.

The change of a layer can be delivered compressed, as the reference code does it (`src/compress.py`): its largest singular
values, as many as add up to a share of the sum of all. With `rank` a change of low rank is trained in the first place.

Each concept may have a new word, whose vectors are trained too ("modifier tokens"): `words` are those of textual inversion.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods import lora, textual_inversion
from ftk.methods.adapters import attention_files, formats, injection, peft_directory, targets, whole_modules
from ftk.methods.adapters.targets import TrainedComponent
from ftk.methods.base import CacheNeeds, Export, check_format
from ftk.methods.lora import Factors, LoraConfig
from ftk.methods.textual_inversion import METHOD as WORDS
from ftk.methods.textual_inversion import TextualInversionConfig
from ftk.models.base import DENOISER, AddsTokens, Conditions, Family, Model, Texts

if TYPE_CHECKING:
    import torch

_SETTING = "method.targets"
_WHOLE_FORMATS = ("diffusers", "comfyui")
"""The delivery formats of weights that are neither of low rank nor compressed."""
_REASON = (
    "its readers know low-rank changes alone. Write diffusers or comfyui; or export with `--set method.energy=0.9`, which "
    "compresses the change of each layer to a low rank."
)
_REASONS = {
    **dict.fromkeys(("peft", "kohya"), _REASON),
    "lycoris": "LyCORIS' files hold adapters alone. Write diffusers or comfyui.",
}


_NO_PLACE_FOR_WORDS = "a PEFT folder has no place for new words. Write diffusers, which holds a LoRA too."
_FORMS_OF_WORDS = {"comfyui": "comfyui", "kohya": "a1111"}
"""The format of new words that goes with one of the weights; elsewhere it is diffusers'."""
_READING = {
    "comfyui": "ComfyUI: put `comfyui.safetensors` into `models/loras` and load it with the node Load LoRA.",
    "kohya": "A1111 and Forge: put `kohya.safetensors` into `models/Lora` and write `<lora:kohya:1>` in the prompt.",
}
_NOT_FOR_DIFFUSERS = (
    "This file is for ComfyUI alone: diffusers refuses changes of whole matrices (`diff`). For diffusers: `ftk export RUN.yaml "
    "--format diffusers`."
)


class CustomDiffusionConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Literal["text-kv", "cross-attention"] = Field(
        default="text-kv", description="keys and values; or, of a U-Net, queries and outputs too"
    )
    rank: int | None = Field(default=None, ge=1, description="train changes of this rank, not whole matrices")
    energy: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="deliver the largest singular values of each change, up to this share of the sum",
    )
    class_images: bool = Field(default=True, description="whether there must be class images, as in the paper")
    words: TextualInversionConfig | None = Field(
        default=None, description="new words of the concepts, as textual-inversion has them: {tokens: {'<new1>': ktn}}"
    )

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.energy is not None and self.rank is None and self.targets == "cross-attention":
            raise ValueError(
                "`energy` compresses changes of matrices, and with `targets: cross-attention` biases are trained too. Leave "
                "out one of them, or set `rank`"
            )
        if self.words is not None and self.words.lora is not None:
            raise ValueError("`words.lora` does not go with this method, which trains the denoiser itself. Set `rank`")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether whole weights are delivered, not low-rank changes."""
        return self.rank is None and self.energy is None


class CustomDiffusion:
    """Thawed matrices of the base, or a LoRA on them."""

    name = "custom-diffusion"
    Config: ClassVar[type[BaseModel]] = CustomDiffusionConfig
    FORMATS = ("diffusers", "comfyui", "peft", "kohya")

    def encoders(self, family: Family, settings: CustomDiffusionConfig) -> tuple[str, ...]:
        """Those that new words need in memory.

        Raises:
            ConfigError: the family has no such layers, or cannot be given such words.
        """
        if settings.targets not in family.target_groups:
            raise ConfigError(
                f"{_SETTING}: {family.name} has no {settings.targets}: image and text share one attention there. Leave it out: "
                f"the keys and values of the text are trained then."
            )
        if settings.words is None:
            return ()
        if not isinstance(family, AddsTokens):
            raise ConfigError(
                f"method.words: the tokenizer of {family.name} takes no new words here. Leave it out, and write a rare word "
                f"before the kind of thing: `trigger: sks dog`."
            )
        return WORDS.encoders(family, settings.words)

    def cache_needs(self, family: Family, settings: CustomDiffusionConfig) -> CacheNeeds:
        """Class images, unless the settings do without; and new words."""
        words = {} if settings.words is None else settings.words.words
        return CacheNeeds(class_images=settings.class_images, placeholder_tokens=words)

    def parameter_groups(self, settings: CustomDiffusionConfig) -> Sequence[tuple[str, float]]:
        """The new words' own learning rate."""
        return () if settings.words is None else WORDS.parameter_groups(settings.words)

    def start_batches(self, settings: CustomDiffusionConfig) -> int:
        """What new words take."""
        return 0 if settings.words is None else WORDS.start_batches(settings.words)

    def start_from(self, model: Model, predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
        """See `start_batches`."""
        WORDS.start_from(model, predictions)

    def thaw(self, model: Model, settings: CustomDiffusionConfig) -> None:
        """The matrices that are trained whole."""
        if settings.rank is None:
            _thaw(_component(model, settings))

    def attach(self, model: Model, settings: CustomDiffusionConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Thaw the matrices, or give them a LoRA; the first token's keys and values pass no gradient. Add the new words."""
        component = _component(model, settings)
        layers = _layers(component)
        if settings.rank is None:
            parameters = _thaw(component)
        else:
            inner = _as_lora(settings)
            parameters = lora.METHOD.inject(component, lora.METHOD.peft_config(component, layers, inner), inner, seed)
        for name in layers:
            if name.endswith((".attn2.to_k", ".attn2.to_v")):
                model.denoiser.get_submodule(name).register_forward_hook(_hold_first_token)
        if settings.words is not None:
            parameters |= WORDS.attach(model, settings.words, seed)
        return parameters

    def texts(self, model: Model, texts: Texts) -> Texts:
        """With the new words in them, where those are not in the text encoder."""
        return WORDS.texts(model, texts)

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, of texts with the new words."""
        return WORDS.predict(model, noisy_BCHW, sigma_B, conditions)

    def formats(self, settings: CustomDiffusionConfig) -> tuple[str, ...]:
        """A LoRA's of what is of low rank; else those that can hold whole weights."""
        if settings.is_whole:
            return _WHOLE_FORMATS
        return tuple(form for form in lora.METHOD.FORMATS if settings.words is None or form != "peft")

    def export(self, model: Model, settings: CustomDiffusionConfig, export: Export) -> list[Path]:
        """The weights themselves, or a LoRA of what changed in them."""
        reasons = _REASONS if settings.is_whole else {**lora.METHOD.REASONS, "peft": _NO_PLACE_FOR_WORDS}
        check_format(self.name, self.formats(settings), export.form, reasons)
        files = [] if settings.words is None else _write_words(model, settings.words, export)
        if settings.is_whole:
            return [*files, _write_whole(model, export)]
        if settings.energy is None:
            adapter = lora.adapter_of(model.denoiser, _as_lora(settings))
        else:
            factors = {name: compressed(change, settings.energy) for name, change in _changes(model.denoiser)}
            adapter = lora.of_factors(_component(model, settings), factors)
        return [*files, *lora.write({DENOISER: adapter}, model.family, export)]

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """Weights into the denoiser's own layers; a LoRA, and new words, with diffusers' loaders."""
        if (directory / lora.WEIGHTS_FILE).exists():
            lora.METHOD.load_into(family, pipeline, directory)
        else:
            attention_files.load(family, getattr(pipeline, family.denoiser_attribute), directory)
        if textual_inversion.has_words(directory):
            textual_inversion.teach(family, pipeline, textual_inversion.learned_words(directory))
        return pipeline

    def merge(self, model: Model) -> None:
        """Fold a LoRA into the weights, where whole matrices are already, and the words into the text encoders."""
        if model.encoders or model.extras:
            WORDS.merge(model)
        elif injection.adapted(model.denoiser):
            injection.merge(model.denoiser)

    def reading(self, family: Family, settings: CustomDiffusionConfig, form: str) -> str | None:
        """Of weights and new words in the files of other programs."""
        if form not in _READING or (settings.words is not None and not _embedding_keys(family)):
            return None
        lines = [_READING[form], *([_NOT_FOR_DIFFUSERS] if settings.is_whole else [])]
        words = None if settings.words is None else WORDS.reading(family, settings.words, _FORMS_OF_WORDS[form])
        return "\n\n".join([*lines, *([words] if words else [])])

    def usage(self, family: Family, settings: CustomDiffusionConfig) -> str:
        """diffusers' loaders of what is delivered; of whole weights of a transformer torch's, of its words ftk's."""
        lines = attention_files.usage(family) if settings.is_whole else lora.METHOD.usage(family, _as_lora(settings))
        if settings.words is None:
            return lines
        words = WORDS.usage(family, settings.words)
        # ftk's loader of words loads the LoRA beside them too.
        return words if not (_embedding_keys(family) or settings.is_whole) else f"{lines}\n{words}"


def compressed(change_OI: "torch.Tensor", energy: float) -> Factors:
    """The largest singular values of a layer's change, as many as have a sum of at most this share of all; at least one."""
    import torch

    U_OR, S_R, V_RI = torch.linalg.svd(change_OI.float(), full_matrices=False)
    rank = max(1, int((S_R.cumsum(0) / S_R.sum() <= energy).sum()))
    roots_R = S_R[:rank].sqrt()
    return Factors(A=roots_R[:, None] * V_RI[:rank], B=U_OR[:, :rank] * roots_R, magnitude=None)


def _component(model: Model, settings: CustomDiffusionConfig) -> TrainedComponent:
    return targets.denoiser_component(model.family, model.denoiser, settings.targets, _SETTING)


def _layers(component: TrainedComponent) -> list[str]:
    return targets.select(component, targets.linear_or_convolution)


def _thaw(component: TrainedComponent) -> "dict[str, torch.nn.Parameter]":
    """Keys and values are matrices: where they have biases, those stay. That of outputs is trained, as diffusers does."""
    biases = component.targets == "cross-attention"
    return whole_modules.thaw(component, _layers(component), _SETTING, biases=biases)


def _as_lora(settings: CustomDiffusionConfig) -> LoraConfig:
    """The LoRA that is trained, or that a compressed change is delivered as."""
    return LoraConfig(targets=settings.targets, rank=settings.rank or 1)


def _changes(denoiser: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """What training has added to the weight of each layer, [out,in] fp32, by the layer's name."""
    for name, layer in injection.adapted(denoiser).items():
        yield name, layer.get_delta_weight(injection.ADAPTER).detach().float()
    for name in whole_modules.thawed(denoiser):
        layer = denoiser.get_submodule(name)
        weight = layer.weight.detach().float()
        yield name, weight - layer.initial_values["weight"].to(weight)


def _embedding_keys(family: Family) -> Mapping[str, str]:
    """See `AddsTokens`: whether other programs read new words of the family."""
    assert isinstance(family, AddsTokens)
    return family.embedding_keys


def _write_words(model: Model, settings: TextualInversionConfig, export: Export) -> list[Path]:
    """In the format that goes with that of the weights."""
    return WORDS.export(model, settings, replace(export, form=_FORMS_OF_WORDS.get(export.form, "diffusers")))


def _write_whole(model: Model, export: Export) -> Path:
    layers = whole_modules.thawed(model.denoiser)
    if export.form == "diffusers":
        return attention_files.write(model.family, model.denoiser, layers, export.directory, export.metadata)
    names = model.family.adapter_names(export.form, DENOISER, model.denoiser)
    named = whole_modules.differences(model.denoiser, layers, names)
    header = {**export.metadata, "ftk_read_by": formats.readers(export.form, "whole")}
    return peft_directory.commit_tensors(export.directory / formats.NAMED_FILES[export.form], named, header)


def _hold_first_token(_layer: Any, _inputs: Any, output_BLD: "torch.Tensor") -> "torch.Tensor":
    """The same values, without a gradient through the first token's."""
    import torch

    if not output_BLD.requires_grad:
        return output_BLD
    return torch.cat([output_BLD[:, :1].detach(), output_BLD[:, 1:]], dim=1)


METHOD = CustomDiffusion()
