"""Qwen-Image-Edit: Qwen-Image that is shown an image to edit, as latents behind the noisy tokens and through Qwen2.5-VL's eyes.

Source: diffusers, `pipelines/qwenimage/pipeline_qwenimage_edit.py`; Qwen-Image technical report (arXiv 2508.02324), section 4.

The pipeline hands its text encoder no `mm_token_type_ids`, without which transformers 5 gives image tokens the positions of
text. The model was trained with an image's own positions: here they have those.

Shape legend: B batch, C latent channels (16), H W latent cells, N = H W / 4 image tokens, L text tokens, D text width,
R references.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from ftk import storage
from ftk.errors import ModelError
from ftk.models.base import PutOnDevice, move
from ftk.models.components import flow_matching
from ftk.models.components.geometry import ReferenceRule
from ftk.models.components.loading import check_pipeline, check_vocabulary, load_component, load_pipeline, reading
from ftk.models.qwen_image import QwenImage, QwenImageConfig, tiny_text_config, tiny_tokenizer, write_tiny

if TYPE_CHECKING:
    import torch

SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), "
    "then explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 64
"""Tokens of `SYSTEM`, which the pipeline drops from the embeddings."""
IMAGE_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
_SPECIAL = {
    "image": "image_pad", "video": "video_pad", "vision": "vision_pad", "vision_start": "vision_start",
    "vision_end": "vision_end",
}  # fmt: skip
"""Tokens that the text encoder's configuration names, by its names."""
IMAGE_PROCESSOR = "Pillow"
"""Resizes what the text encoder sees. The one of torchvision differs by 1 to 2 of 255 levels; this is there wherever ftk is."""


class QwenImageEditConfig(QwenImageConfig):
    """Settings under `model:`."""

    reference_area: int = Field(
        default=1024 * 1024, ge=32 * 32, description="px to which each input image is scaled; fewer cost less memory and detail"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenEditEncoder:
    """What `encode_texts` needs in memory. `prefix` holds the keys and values of `SYSTEM`, a batch of one."""

    tokenizer: Any
    model: Any
    image_processor: Any
    prefix: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _SeenImages:
    """A list of references as captions come after it.

    `embeds` [L,D] are the states of its own tokens; `past` the keys and values of all tokens so far; `position` that of the
    first token of a caption.
    """

    embeds: "torch.Tensor"
    past: Any
    position: int


class QwenImageEdit(QwenImage):
    """The first edit model, which takes one input image. Text item: `embeds` [L,D], of the image's tokens and the caption's."""

    name = "qwen-image-edit"
    Config: ClassVar[type[BaseModel]] = QwenImageEditConfig
    config: QwenImageEditConfig
    encoder_version = 1
    text_components = ("text_encoder", "tokenizer", "processor")
    pipeline_name = "QwenImageEditPipeline"
    max_references: int | None = 1
    tiny_transformer: Mapping[str, Any] = {}
    # Its texts come after images: it neither takes new words nor encodes token ids alone, as the model without them does.
    add_tokens: ClassVar[None] = None  # type: ignore[assignment]
    load_encoder: ClassVar[None] = None  # type: ignore[assignment]

    def __init__(self, config: QwenImageEditConfig | None = None) -> None:
        super().__init__(config or QwenImageEditConfig())

    @property
    def references(self) -> ReferenceRule:  # type: ignore[override]
        """About a megapixel, of which the text encoder sees the same pixels."""
        return ReferenceRule(multiple=32, area=self.config.reference_area, in_texts=True, most=self.max_references)

    def check(self, directory: Path) -> None:
        """A Diffusers folder of the edit pipeline."""
        check_pipeline(directory, self.name, self.pipeline_name)

    def single_file_config(self, tensors: Mapping[str, Any]) -> str:
        """The one model; a file of it holds the transformer alone."""
        return "Qwen/Qwen-Image-Edit"

    def text_options(self) -> dict[str, Any]:
        """The prompt template, the cut, and what resizes images."""
        return {
            "template": SYSTEM + self._image_template(1) + "{}" + END,
            "prefix_tokens": PREFIX_TOKENS,
            "max_text_tokens": self.max_text_tokens,
            "image_processor": IMAGE_PROCESSOR,
        }

    def _image_template(self, number: int) -> str:
        """What stands before a caption for its reference of this number, from 1."""
        return f"{VISION_START}{IMAGE_PAD}{VISION_END}"

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> QwenEditEncoder:
        """Qwen2.5-VL with its vision tower. Its RoPE frequencies stay in fp32: a second `.to(dtype)` would round them."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        tokenizer = self._tokenizer(directory)
        num_tokens = len(tokenizer(SYSTEM)["input_ids"])
        if num_tokens != PREFIX_TOKENS:
            raise ModelError(
                f"{directory / 'tokenizer'}: the prompt template starts with {num_tokens} tokens instead of "
                f"{PREFIX_TOKENS}, so captions would be cut in the wrong place. This is not Qwen-Image-Edit's tokenizer."
            )
        model = load_component(Qwen2_5_VLForConditionalGeneration, directory, "text_encoder", dtype)
        check_vocabulary(tokenizer, model, directory / "tokenizer")
        model = place(model.requires_grad_(False).eval(), device)
        return _encoder(tokenizer, model, directory)

    def encode_texts(
        self, encoder: Any, captions: Sequence[str], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """As the pipeline's `_get_qwen_prompt_embeds` with `mm_token_type_ids`.

        In a causal model what comes before a caption does not depend on it: captions with equal references share one pass over
        these. Texts are padded on the right, where no token before the padding sees it.

        Raises:
            ModelError: a caption holds a special token of the template.
        """
        import torch

        images = [tuple(each) for each in references] or [()] * len(captions)
        ids = self._caption_ids(encoder, captions)
        groups: list[tuple[tuple[torch.Tensor, ...], list[int]]] = []
        for number, each in enumerate(images):
            members = next((members for seen, members in groups if _are_equal(seen, each)), None)
            if members is None:
                groups.append((each, [number]))
            else:
                members.append(number)
        items: dict[int, dict[str, torch.Tensor]] = {}
        with torch.inference_mode():
            for each, members in groups:
                seen = self._seen(encoder, each)
                tails = self._after(encoder, seen, [ids[number] for number in members])
                items |= {
                    number: {"embeds": torch.cat([seen.embeds, tail])} for number, tail in zip(members, tails, strict=True)
                }
        return [items[number] for number in range(len(captions))]

    def shared_tokens(self, encoder: QwenEditEncoder, references: "Sequence[torch.Tensor]") -> int:
        """How many of a text's first states depend on its references alone; no model runs."""
        return len(self._image_ids(encoder, _grids(encoder, references)))

    def _seen(self, encoder: QwenEditEncoder, references: "Sequence[torch.Tensor]") -> _SeenImages:
        import torch

        past, device = copy.deepcopy(encoder.prefix), encoder.model.device  # the model appends to what it is given
        if not references:
            embeds = torch.empty(0, encoder.model.config.text_config.hidden_size, dtype=encoder.model.dtype, device=device)
            return _SeenImages(embeds=embeds, past=past, position=PREFIX_TOKENS)
        inputs = encoder.image_processor(images=[_as_picture(each) for each in references], return_tensors="pt")
        grid_R3 = inputs["image_grid_thw"].to(device)
        ids_BL = torch.tensor([self._image_ids(encoder, inputs["image_grid_thw"])], device=device)
        is_image_BL = ids_BL == encoder.model.config.image_token_id
        inner = encoder.model.model
        features = torch.cat(inner.get_image_features(inputs["pixel_values"].to(device), grid_R3).pooler_output)
        embeds_BLD = inner.get_input_embeddings()(ids_BL)
        embeds_BLD = embeds_BLD.masked_scatter(is_image_BL[..., None], features.to(embeds_BLD.dtype))
        # A prefix of text alone has the same position in all of M-RoPE's three axes; images are counted on from there.
        position_3BL, _ = inner.get_rope_index(ids_BL, mm_token_type_ids=is_image_BL.int(), image_grid_thw=grid_R3)
        position_3BL = position_3BL + PREFIX_TOKENS
        output = inner.language_model(inputs_embeds=embeds_BLD, position_ids=position_3BL, past_key_values=past, use_cache=True)
        return _SeenImages(
            embeds=output.last_hidden_state[0].clone(), past=output.past_key_values, position=int(position_3BL.max()) + 1
        )

    @staticmethod
    def _after(encoder: QwenEditEncoder, seen: _SeenImages, ids: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
        """[L,D] of each caption behind these images."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device = encoder.model.device
        ids_BL = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        past = copy.deepcopy(seen.past)
        past.batch_repeat_interleave(len(ids))
        positions = seen.position + torch.arange(ids_BL.shape[1], device=device)
        hidden_BLD = encoder.model.model.language_model(
            input_ids=ids_BL, position_ids=positions[None, None].expand(3, *ids_BL.shape), past_key_values=past
        ).last_hidden_state
        return [row[: len(tokens)].clone() for row, tokens in zip(hidden_BLD, ids, strict=True)]

    def _image_ids(self, encoder: QwenEditEncoder, grid_R3: Any) -> list[int]:
        """Token ids of the references, as many for each as its patches make."""
        merged = encoder.model.config.vision_config.spatial_merge_size**2
        ids: list[int] = []
        for number, (frames, height, width) in enumerate(grid_R3.tolist(), 1):
            row = encoder.tokenizer(self._image_template(number))["input_ids"]
            place = row.index(encoder.model.config.image_token_id)
            ids += [*row[:place], *[row[place]] * (frames * height * width // merged), *row[place + 1 :]]
        return ids

    def text_lengths(self, encoder: QwenEditEncoder, captions: Sequence[str]) -> list[int]:
        """Caption and the template's end, 5 tokens, after the cut; without what references add."""
        return [len(row) for row in self._caption_ids(encoder, captions)]

    def tokens_cut(self, directory: Path, captions: Sequence[str]) -> list[int]:  # type: ignore[override]
        """The template's end is cut first."""
        rows = self._tokenizer(directory)([caption + END for caption in captions], verbose=False)["input_ids"]
        return [max(0, len(row) - self.max_text_tokens) for row in rows]

    def _caption_ids(self, encoder: Any, captions: Sequence[str]) -> list[list[int]]:
        special = encoder.tokenizer.all_special_tokens
        for caption in captions:
            found = next((token for token in special if token in caption), None)
            if found is not None:
                raise ModelError(
                    f"caption {caption[:60]!r} holds {found}, by which the prompt template marks images and turns. Write it "
                    f"otherwise."
                )
            if caption.startswith("\n"):
                raise ModelError(
                    f"caption {caption[:60]!r} starts with a line break, which becomes one token with the one that the prompt "
                    f"template ends in where there is no input image. Remove the white space at its start."
                )
        rows = encoder.tokenizer([caption + END for caption in captions], max_length=self.max_text_tokens, truncation=True)
        ids: list[list[int]] = rows["input_ids"]
        return ids

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """diffusers' own, which also takes `reference_latents` with `prompt_embeds`, as training does."""
        import diffusers

        official = getattr(diffusers, self.pipeline_name)
        pipeline_class = type(official.__name__, (_EditPipeline, official), {"family": self, "directory": directory})
        # Its processor needs torchvision, and what it gives the text encoder lacks the positions of images.
        return load_pipeline(pipeline_class, directory, device, dtype=dtype, **{"processor": None, **components})

    def pipeline_references(self, references: "Sequence[torch.Tensor]") -> dict[str, Any]:
        """Normalised latents."""
        return {"reference_latents": tuple(references)}

    def tiny(self, directory: Path) -> None:
        """As that of Qwen-Image, with a vision tower whose weights are large enough to show in the texts."""
        import diffusers
        from transformers import Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = tiny_tokenizer(SYSTEM + "{}" + END, PREFIX_TOKENS)
        config = tiny_text_config(len(tokenizer))
        config["text_config"]["initializer_range"] = config["vision_config"]["initializer_range"] = 0.3
        config |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in _SPECIAL.items()}
        write_tiny(directory, getattr(diffusers, self.pipeline_name), tokenizer, config, **self.tiny_transformer)
        folder = directory / "processor"
        Qwen2VLImageProcessorPil().save_pretrained(folder)
        Qwen2Tokenizer.from_pretrained(directory / "tokenizer").save_pretrained(folder)
        _rewrite(folder / "preprocessor_config.json", image_processor_type="Qwen2VLImageProcessor")
        # Qwen2VLProcessor asks for one, though no video is shown.
        storage.commit_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"})
        _rewrite(directory / "model_index.json", processor=["transformers", "Qwen2VLProcessor"])

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As musubi-tuner and ai-toolkit write them."""
        return {"modelspec.architecture": "Qwen-Image-Edit", "ss_base_model_version": "qwen_image_edit"}


class _EditPipeline:
    """What differs from the official pipeline: the family encodes texts, and references may be given as latents.

    Without `image` the loop is that of QwenImagePipeline, which is the same one.
    """

    family: QwenImageEdit
    directory: Path
    _edit_encoder: QwenEditEncoder | None = None

    def __call__(self, *arguments: Any, reference_latents: Any = None, **options: Any) -> Any:
        if arguments or options.get("image") is not None:
            return super().__call__(*arguments, **options)  # type: ignore[misc]
        from diffusers import QwenImagePipeline

        for prefix in ("", "negative_"):
            prompt = options.pop(f"{prefix}prompt", None)
            if prompt is not None:
                embeds_BLD, mask_BL = self._get_qwen_prompt_embeds(prompt)
                options |= {f"{prefix}prompt_embeds": embeds_BLD, f"{prefix}prompt_embeds_mask": mask_BL}
        parts = {name: part for name, part in self.components.items() if name != "processor"}  # type: ignore[attr-defined]

        class Uncut(QwenImagePipeline):  # type: ignore[misc]
            """Texts of edits are longer than those that this pipeline cuts off at: images make most of their tokens."""

            def encode_prompt(self, *_: Any, prompt_embeds: Any, prompt_embeds_mask: Any, **__: Any) -> Any:
                return prompt_embeds, None if prompt_embeds_mask is None or prompt_embeds_mask.all() else prompt_embeds_mask

        plain = Uncut(**parts)
        plain.set_progress_bar_config(disable=True)
        with _shown(self.transformer, reference_latents or ()):  # type: ignore[attr-defined]
            return plain(**options)

    def _get_qwen_prompt_embeds(
        self, prompt: str | list[str], image: Any = None, device: Any = None, dtype: Any = None
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        if self._edit_encoder is None:
            self._edit_encoder = _encoder(self.tokenizer, self.text_encoder, self.directory)  # type: ignore[attr-defined]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        pictures = image if isinstance(image, list) else [] if image is None else [image]
        references = [_as_pixels(picture) for picture in pictures]
        texts = self.family.encode_texts(self._edit_encoder, prompts, [references] * len(prompts))
        batch = self.family.collate_texts(texts)
        embeds_BLD, mask_BL = batch["embeds"], batch["mask"]
        assert embeds_BLD is not None
        mask_BL = torch.ones(embeds_BLD.shape[:2], device=embeds_BLD.device) if mask_BL is None else mask_BL
        return embeds_BLD.to(device or embeds_BLD.device, dtype or embeds_BLD.dtype), mask_BL.long()


def _encoder(tokenizer: Any, model: Any, directory: Path) -> QwenEditEncoder:
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    with reading(directory / "processor", "an image processor"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory / "processor")
    with torch.inference_mode():
        ids_BL = torch.tensor([tokenizer(SYSTEM)["input_ids"]], device=model.device)
        prefix = model.model.language_model(input_ids=ids_BL, use_cache=True).past_key_values
    return QwenEditEncoder(tokenizer=tokenizer, model=model, image_processor=image_processor, prefix=prefix)


@contextmanager
def _shown(denoiser: Any, references: "Sequence[torch.Tensor]") -> Iterator[None]:
    """Have the denoiser see the references [B,C,h,w] behind the image's tokens, and give the image's tokens alone."""
    import torch

    if not references:
        yield
        return
    tokens_BND = torch.cat([flow_matching.pack(each) for each in references], dim=1)
    shapes = [(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in references]
    counts: list[int] = []

    def before(_module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden_BND = options["hidden_states"]
        counts.append(hidden_BND.shape[1])
        tokens = tokens_BND.to(hidden_BND.dtype)
        tokens = tokens.expand(len(hidden_BND), -1, -1)
        changed = {
            "hidden_states": torch.cat([hidden_BND, tokens], dim=1),
            "img_shapes": [[*own, *shapes] for own in options["img_shapes"]],
        }
        return arguments, {**options, **changed}

    def after(_module: Any, _arguments: Any, output: Any) -> Any:
        return (output[0][:, : counts.pop()], *output[1:])

    handles = [denoiser.register_forward_pre_hook(before, with_kwargs=True), denoiser.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rewrite(path: Path, **changes: Any) -> None:
    storage.commit_json(path, {**storage.read_json(path), **changes})


def _are_equal(first: "Sequence[torch.Tensor]", second: "Sequence[torch.Tensor]") -> bool:
    import torch

    return len(first) == len(second) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )


def _as_picture(pixels_CHW: "torch.Tensor") -> Any:
    """A Pillow image of pixels in [-1, 1]."""
    from PIL import Image

    levels = ((pixels_CHW.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _as_pixels(picture: Any) -> "torch.Tensor":
    """[3,H,W] in [-1, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1.0


def _grids(encoder: QwenEditEncoder, references: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """[R,3]: frames, rows and columns of each reference's patches."""
    import torch

    processor = encoder.image_processor
    options = {"patch_size": processor.patch_size, "merge_size": processor.merge_size}
    sides = [processor.get_number_of_image_patches(*each.shape[-2:], options) for each in references]
    return torch.tensor([[1, 1, patches] for patches in sides]).reshape(-1, 3)


FAMILY = QwenImageEdit()
