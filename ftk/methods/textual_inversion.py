"""Textual inversion: new words whose vectors are all that is trained (Gal et al. 2022, arXiv 2208.01618).

A word is one or several tokens (`components/placeholders.py`). What is trained of it:

- `train: input`: its rows of the embedding table, with the text encoder in memory; texts are encoded from their token ids.
- `train: output`: the rows that the denoiser reads in its place, where a family's texts have one row for each token. No text
  encoder is needed: the cached texts are overwritten there. The rows are the same whatever stands around the word, and what
  follows it in a text was encoded with the words that it starts from.

Either goes with a LoRA of the denoiser (`lora`): pivotal tuning (Roich et al. 2021, arXiv 2106.05744), as in diffusers'
`examples/advanced_diffusion_training`.

`norm: keep` leaves each row its length and trains the direction alone. OneTrainer rescales rows after each step to that end
(`preserve_embedding_norm`), and diffusers' advanced script draws their spread back; here it is part of what is differentiated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base
from ftk.methods.adapters import formats, injection, peft_directory, targets
from ftk.methods.base import CacheNeeds, Export
from ftk.methods.lora import METHOD as LORA
from ftk.methods.lora import LoraConfig
from ftk.models.base import AddsTokens, Conditions, EncodesTokens, Family, HasTokenStates, Model, Texts
from ftk.models.components import placeholders
from ftk.models.components.placeholders import Placeholder, Placeholders

if TYPE_CHECKING:
    import torch

_FAMILY, _WORD, _VECTORS, _START = "ftk_family", "ftk_word", "ftk_vectors", "ftk_start"
"""In a file's header: the model's family, the new word, how many vectors it has, and the words that it starts from, if any."""
_INPUT, _OUTPUT = "input", "output"
_ENCODER = "text_encoder"
_START_BATCHES = 8
_LORA_FORMS = {"diffusers": "diffusers", "a1111": "kohya", "comfyui": "comfyui"}
_READING = {
    "a1111": (
        "A1111 and Forge: put {files} into `embeddings`, and write {words} in the prompt.",
        "{}",
        " Put `kohya.safetensors` into `models/Lora` and write `<lora:kohya:1>` in the prompt, too.",
    ),
    "comfyui": (
        "ComfyUI: put {files} into `models/embeddings`, and write {words} in the prompt.",
        "embedding:{}",
        " Put `comfyui.safetensors` into `models/loras` and load it with the node Load LoRA.",
    ),
}
"""By format: how its files are used, how a word is written in a prompt, and how the LoRA beside it is used."""
_NOT_IN_LORA = ("text_encoder", "modules_to_save")
_NOT_STARTS = ("eva", "pissa", "olora")


def _start_alone(value: Any) -> Any:
    return {"start": value} if isinstance(value, str) else value


class WordConfig(BaseModel):
    """Settings of one new word; a text stands for `{start: TEXT}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vectors: int = Field(default=1, ge=1, le=64, description="tokens that stand for the word: more hold more, and fit less")
    start: str | None = Field(default=None, description="words whose embeddings the vectors start from; random without")


class TextualInversionConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: dict[str, Annotated[WordConfig, BeforeValidator(_start_alone)]] = Field(
        min_length=1, description="new words of the captions, such as `<cat>`"
    )
    train: Literal["input", "output"] = Field(
        default="input", description="rows of the embedding table, or what the denoiser reads in the word's place"
    )
    norm: Literal["free", "keep"] = Field(default="free", description="keep: each row stays as long as it starts")
    rate: float = Field(default=1.0, gt=0, description="the vectors' learning rate is so many times train.learning_rate")
    lora: LoraConfig | None = Field(default=None, description="train a LoRA of the denoiser too; {} by defaults")

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if (wrong := placeholders.problem(list(self.tokens))) is not None:
            raise ValueError(f"`tokens`: {wrong}")
        stems = [file_stem(word) for word in self.tokens]
        if "" in stems or len(set(stems)) < len(stems):
            raise ValueError(f"`tokens`: files are named after the letters and digits of the words: {', '.join(self.tokens)}")
        if self.train == "output" and self.norm == "keep":
            raise ValueError("`norm: keep` has no effect with `train: output`: denoisers norm the states that they read")
        for name in _NOT_IN_LORA:
            if self.lora is not None and getattr(self.lora, name) is not None:
                raise ValueError(f"`lora.{name}` does not go with new words. Leave it out")
        if self.lora is not None and self.lora.initialisation in _NOT_STARTS:
            raise ValueError(f"`lora.initialisation: {self.lora.initialisation}` does not go with new words. Leave it out")
        return self

    @property
    def words(self) -> Placeholders:
        """The new words."""
        return {word: Placeholder(vectors=each.vectors, start=each.start) for word, each in self.tokens.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedWord:
    """A new word as files in the default format hold it.

    Attributes:
        tensors: [N,D] of each text encoder, by its name; of a family that only ftk knows, `input` and `output`.
    """

    path: Path
    family: str
    word: str
    placeholder: Placeholder
    tensors: "Mapping[str, torch.Tensor]"


class TextualInversion:
    """All rows and weights of the base model stay as they are, unless a LoRA is trained beside the words."""

    name = "textual-inversion"
    Config: ClassVar[type[BaseModel]] = TextualInversionConfig
    FORMATS = ("diffusers", "a1111", "comfyui")

    def encoders(self, family: Family, settings: TextualInversionConfig) -> tuple[str, ...]:
        """Those whose embedding tables get new rows; none with `train: output`."""
        if not isinstance(family, AddsTokens):
            raise ConfigError(
                f"method.name: {self.name} does not know {family.name}: its text encoder cannot be given new words."
            )
        if settings.lora is not None:
            targets.check_group(family, (), settings.lora)
        if settings.train == "output":
            if not isinstance(family, HasTokenStates):
                raise ConfigError(
                    f"method.train: output is for families whose text encoder is a language model; that of {family.name} is "
                    f"small, and other programs read its input rows. Leave it out."
                )
            return ()
        if not isinstance(family, EncodesTokens):
            raise ConfigError(f"method.train: input needs a text encoder in memory, which {family.name} has not. Use output.")
        return tuple(family.token_encoders)

    def cache_needs(self, family: Family, settings: TextualInversionConfig) -> CacheNeeds:
        """The new words."""
        return CacheNeeds(placeholder_tokens=settings.words)

    def parameter_groups(self, settings: TextualInversionConfig) -> Sequence[tuple[str, float]]:
        """The vectors' own learning rate, and LoRA+."""
        vectors = [] if settings.rate == 1 else [(r"(^|\.)word_vectors$", settings.rate)]
        return (*vectors, *(LORA.parameter_groups(settings.lora) if settings.lora is not None else ()))

    def start_batches(self, settings: TextualInversionConfig) -> int:
        """With `train: output` the first states are means of what the cache holds."""
        return _START_BATCHES if settings.train == "output" else 0

    def start_from(self, model: Model, predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
        """See `start_batches`."""
        from ftk.methods.adapters import trained_words

        trained_words.start_states(model, predictions)

    def attach(self, model: Model, settings: TextualInversionConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Vectors start the same whatever the seed, as the cache holds them; the LoRA's are drawn by it."""
        from ftk.methods.adapters import trained_words

        parameters: dict[str, torch.nn.Parameter] = {}
        if settings.train == "output":
            parameters[trained_words.ROWS] = trained_words.attach_states(model, settings.words)
        for name in model.encoders:
            rows_ND = trained_words.attach_rows(model, name, settings.words, keeps_norm=settings.norm == "keep")
            parameters[f"{name}.{trained_words.ROWS}"] = rows_ND
        if settings.lora is not None:
            parameters |= LORA.attach(_denoiser_alone(model), settings.lora, seed)
        return parameters

    def texts(self, model: Model, texts: Texts) -> Texts:
        """With the trained states in them, if those are trained."""
        from ftk.methods.adapters import trained_words

        return trained_words.overwritten(model, texts)

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, of texts with the trained vectors."""
        conditions = replace(conditions, texts=self.texts(model, conditions.texts))
        return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: TextualInversionConfig, export: Export) -> list[Path]:
        """A file for each word, in diffusers' format for each text encoder too, and one of the LoRA."""
        self._check_format(model.family, export.form)
        files = []
        for name, (word, tensors) in _files(model, settings, export.form).items():
            header = {**export.metadata, **_header(model.family, word, settings.words[word])}
            files.append(peft_directory.commit_tensors(export.directory / name, tensors, header))
        if settings.lora is not None:
            files += LORA.export(_denoiser_alone(model), settings.lora, replace(export, form=_LORA_FORMS[export.form]))
        return files

    def _check_format(self, family: Family, form: str) -> None:
        """Refuse what no program reads.

        Raises:
            ConfigError: see `base.check_format`.
        """
        assert isinstance(family, AddsTokens)
        reasons = {
            other: "it adds nothing to the weights of layers, and this format holds that alone. Write diffusers."
            for other in ("peft", "kohya", "lycoris")
        }
        known = self.FORMATS if family.embedding_keys else self.FORMATS[:1]
        for other in self.FORMATS[1:]:
            reasons[other] = f"it is not known how these programs read new words of {family.name}. Write diffusers."
        base.check_format(self.name, known, form, reasons)

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """diffusers' own loader where it has one; else the pipeline's prompts are taught the words."""
        words = learned_words(directory)
        if (directory / formats.SINGLE_FILE).exists():
            LORA.load_into(family, pipeline, directory)
        teach(family, pipeline, words)
        return pipeline

    def merge(self, model: Model) -> None:
        """The words into the text encoders' tables, and a LoRA into the denoiser.

        Raises:
            ConfigError: the prompts of a pipeline of this family must be taught the words.
        """
        from ftk.methods.adapters import trained_words

        trained_words.fold(model)
        if injection.adapted(model.denoiser):
            injection.merge(model.denoiser)

    def reading(self, family: Family, settings: TextualInversionConfig, form: str) -> str | None:
        """By the name of each word's file."""
        assert isinstance(family, AddsTokens)
        if form == "diffusers" or not family.embedding_keys:
            return None
        lines, written, lora = _READING[form]
        stems = [file_stem(word) for word in settings.tokens]
        files = " and ".join(f"`{stem}.safetensors`" for stem in stems)
        words = " and ".join(f"`{written.format(stem)}`" for stem in stems)
        return lines.format(files=files, words=words) + (lora if settings.lora is not None else "")

    def usage(self, family: Family, settings: TextualInversionConfig) -> str:
        """diffusers' loaders, or ftk's own where diffusers has none."""
        assert isinstance(family, AddsTokens)
        if not family.embedding_keys:
            return 'from ftk.deliver.words import load_words\n\nload_words(pipeline, "path/to/this/folder")'
        lines = [] if settings.lora is None else [LORA.usage(family, settings.lora)]
        for word in settings.tokens:
            for encoder, tokenizer in family.token_encoders.items():
                name = _diffusers_name(word, settings, encoder)
                own = f", tokenizer=pipeline.{tokenizer}, text_encoder=pipeline.{encoder}" if "_2" in encoder else ""
                of_file = f', weight_name="{name}"' if name != f"{formats.WORDS_FILE}.safetensors" else ""
                lines.append(f'pipeline.load_textual_inversion("path/to/this/folder"{of_file}{own})')
        if len(family.token_encoders) > 1:
            encoder, tokenizer = list(family.token_encoders.items())[-1]
            lines.append("# where its configuration says 2, CLIP looks for the end of a text at the highest token: a new one")
            lines.append(f"pipeline.{encoder}.text_model.eos_token_id = pipeline.{tokenizer}.eos_token_id")
        return "\n".join(lines)


def file_stem(word: str) -> str:
    """The letters, digits, `-` and `_` of a word: A1111 and ComfyUI call an embedding by the name of its file."""
    return "".join(letter for letter in word if letter.isalnum() or letter in "-_").strip("-_")


def _diffusers_name(word: str, settings: TextualInversionConfig, encoder: str) -> str:
    """As diffusers' scripts call them: `learned_embeds`, `learned_embeds_2`; with the word where there are several."""
    of_word = "" if len(settings.tokens) == 1 else f"-{file_stem(word)}"
    return f"{formats.WORDS_FILE}{encoder.removeprefix(_ENCODER)}{of_word}.safetensors"


def _header(family: Family, word: str, placeholder: Placeholder) -> dict[str, str]:
    start = {} if placeholder.start is None else {_START: placeholder.start}
    return {_FAMILY: family.name, _WORD: word, _VECTORS: str(placeholder.vectors), **start}


def _files(model: Model, settings: TextualInversionConfig, form: str) -> "dict[str, tuple[str, dict[str, torch.Tensor]]]":
    """The word and the tensors of each file, by the file's name."""
    from ftk.methods.adapters import trained_words

    family, values = model.family, trained_words.values(model)
    assert isinstance(family, AddsTokens)
    files: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
    start = 0
    for word, placeholder in settings.words.items():
        rows = {name: rows_ND[start : start + placeholder.vectors] for name, rows_ND in values.items()}
        start += placeholder.vectors
        if not family.embedding_keys:
            tensors = {_INPUT if name else _OUTPUT: tensor for name, tensor in rows.items()}
            files[_diffusers_name(word, settings, "")] = (word, tensors)
        elif form == "diffusers":
            files |= {_diffusers_name(word, settings, name): (word, {word: tensor}) for name, tensor in rows.items()}
        else:
            files[f"{file_stem(word)}.safetensors"] = (word, {family.embedding_keys[name]: rows[name] for name in rows})
    return files


def _denoiser_alone(model: Model) -> Model:
    """What the LoRA is of."""
    return replace(model, encoders={}, extras={})


def has_words(directory: Path) -> bool:
    """Whether `export` wrote words into a folder in the default format."""
    return any(directory.glob(f"{formats.WORDS_FILE}*.safetensors"))


def learned_words(directory: Path) -> list[LearnedWord]:
    """The words in a folder that `export` wrote in the default format.

    Raises:
        CheckpointError: there are none, or a file is damaged or of another program.
    """
    paths = sorted(directory.glob(f"{formats.WORDS_FILE}*.safetensors")) or [directory / f"{formats.WORDS_FILE}.safetensors"]
    words: dict[str, LearnedWord] = {}
    for path in paths:
        tensors, header = peft_directory.read_tensors(path), peft_directory.read_header(path)
        try:
            word, placeholder = header[_WORD], Placeholder(vectors=int(header[_VECTORS]), start=header.get(_START))
            family = header[_FAMILY]
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} does not say in its header which word it holds, and of which family ({error}). Use a file that "
                f"`ftk export` wrote."
            ) from error
        name = _ENCODER + path.stem.removeprefix(formats.WORDS_FILE).partition("-")[0]
        named = {name if key == word else key: tensor for key, tensor in tensors.items()}
        before = words[word].tensors if word in words else {}
        words[word] = LearnedWord(path=path, family=family, word=word, placeholder=placeholder, tensors={**before, **named})
    return list(words.values())


def teach(family: Family, pipeline: Any, words: Sequence[LearnedWord]) -> None:
    """Have a pipeline's prompts read new words.

    Raises:
        CheckpointError: they are of another family or base model, or the pipeline has them already.
    """
    assert isinstance(family, AddsTokens)
    for learned in words:
        _check_fits(family, pipeline, learned)
    if isinstance(family, HasTokenStates):
        import torch

        both = [
            torch.cat([learned.tensors[kind] for learned in words]) if kind in words[0].tensors else None
            for kind in (_INPUT, _OUTPUT)
        ]
        with peft_directory.explaining(words[0].path):
            family.teach(pipeline, {learned.word: learned.placeholder for learned in words}, *both)
        return
    for learned in words:
        for encoder, tokenizer_name in family.token_encoders.items():
            model, tokenizer = getattr(pipeline, encoder), getattr(pipeline, tokenizer_name)
            with peft_directory.explaining(learned.path):
                pipeline.load_textual_inversion(
                    {learned.word: learned.tensors[encoder]}, tokenizer=tokenizer, text_encoder=model
                )
            placeholders.find_end_by_number(tokenizer, model)


def _check_fits(family: AddsTokens, pipeline: Any, learned: LearnedWord) -> None:
    """Refuse vectors of another model."""
    expected = {} if isinstance(family, HasTokenStates) else dict.fromkeys(family.token_encoders)
    for encoder in family.token_encoders:
        width = peft_directory.encoder_of(pipeline, encoder, learned.path).get_input_embeddings().embedding_dim
        if isinstance(family, HasTokenStates):
            denoiser = getattr(pipeline, family.denoiser_attribute)  # type: ignore[attr-defined]
            widths = {_INPUT: width, _OUTPUT: family.state_width(denoiser)}
            expected = {kind: (learned.placeholder.vectors, widths[kind]) for kind in learned.tensors if kind in widths}
        else:
            expected[encoder] = (learned.placeholder.vectors, width)
    shapes = {name: tuple(tensor.shape) for name, tensor in learned.tensors.items()}
    if shapes != expected or not shapes:
        raise CheckpointError(
            f"{learned.path} was trained on another base model: it holds {shapes} of {learned.word!r}, and this "
            f"{type(pipeline).__name__} takes {expected}. Load it into the model that it was trained on."
        )


METHOD = TextualInversion()
