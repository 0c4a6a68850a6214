"""Qwen-Image's shortcuts: single frames through a folded VAE, captions after a cached prefix. Each against the long way."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ftk.errors import ModelError
from ftk.models import qwen_image
from ftk.models.qwen_image import FAMILY, PREFIX_TOKENS, TEMPLATE, QwenTextEncoder

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red cat on a chair", "", "größe 猫", "{} <|im_end|>", "a dog, " * 20, "word " * 3000]
SIZES = [(48, 112), (80, 16), (16, 144)]


@pytest.fixture(scope="module")
def vae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two VAEs with norms that are not all ones: the tiny model's, and a narrow one with the real block layout."""
    configs = {"tiny": {"base_dim": 8, "num_res_blocks": 1}, "real-layout": {"base_dim": 12}}
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(3)
        vae = AutoencoderKLQwenImage(**config)
        for key, parameter in vae.named_parameters():
            if key.endswith("gamma"):
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        vae.save_pretrained(folders[name] / "vae")
    return folders


@pytest.fixture(params=["tiny", "real-layout"])
def vae_folder(request: pytest.FixtureRequest, vae_folders: dict[str, Path]) -> Path:
    return vae_folders[request.param]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder with grouped heads and wide weights, so that positions and attention matter to every value."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = with_blank_lines(qwen_image.tiny_tokenizer(TEMPLATE, PREFIX_TOKENS))
    tokenizer.save_pretrained(folder / "tokenizer")
    config = qwen_image.tiny_text_config(len(tokenizer))
    config["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 336, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config["vision_config"]["out_hidden_size"] = 64
    torch.manual_seed(3)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).save_pretrained(folder / "text_encoder")
    return folder


def with_blank_lines(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    """Two line breaks become one token, as in Qwen's own vocabulary."""
    trained = json.loads(tokenizer.backend_tokenizer.to_str())
    model, special = trained["model"], [token["content"] for token in trained["added_tokens"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"] | {"ĊĊ": max(model["vocab"].values()) + 1},
        merges=[*(tuple(merge) for merge in model["merges"]), ("Ċ", "Ċ")],
        additional_special_tokens=special,
    )


def reference_vae(folder: Path) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", dtype=torch.float32).eval()
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    return vae


def reference_texts(folder: Path, captions: list[str], dtype: torch.dtype) -> list[torch.Tensor]:
    """What the pipeline makes of `captions` in one batch, without its padding."""
    encoder = FAMILY.load_text_encoder(folder, dtype, CPU)
    pipeline = QwenImagePipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=encoder.model, tokenizer=encoder.tokenizer
    )
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(captions, device=CPU)
    lengths = [embeds.shape[1]] * len(captions) if mask is None else mask.sum(1).tolist()
    return [row[:length] for row, length in zip(embeds, lengths, strict=True)]


def normalised(posterior, vae) -> tuple[torch.Tensor, torch.Tensor]:
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (posterior.mean.squeeze(2) - shift) / scale, posterior.std.squeeze(2) / scale


def assert_equal_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6 * theirs.abs().max().item(), rtol=0)


def draw_pixels(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors made by `work` hold at one time, after a first call that may fill caches."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_folded_vae_encodes_as_the_video_vae_does(vae_folder: Path, batch: int, height: int, width: int) -> None:
    pixels, vae = draw_pixels(batch, height, width), reference_vae(vae_folder)
    with torch.no_grad():
        mean, std = normalised(vae.encode(pixels[:, :, None]).latent_dist, vae)
    our_mean, our_std = FAMILY.encode_images(FAMILY.load_vae(vae_folder, torch.float32, CPU), pixels)
    assert our_mean.shape == our_std.shape == (batch, 16, height // 8, width // 8)
    assert our_mean.dtype == our_std.dtype == torch.float32
    assert_equal_to_rounding(our_mean, mean)
    assert_equal_to_rounding(our_std, std)


def test_the_layout_of_the_pixels_changes_nothing(vae_folder: Path) -> None:
    vae, pixels = FAMILY.load_vae(vae_folder, torch.float32, CPU), draw_pixels(2, 64, 48)
    strided = pixels.to(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*(FAMILY.encode_images(vae, each) for each in (pixels, strided)), strict=True))


def test_the_folded_vae_decodes_as_before_to_the_bit(vae_folder: Path) -> None:
    vae = reference_vae(vae_folder)
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = vae.decode(latents[:, :, None] / (1.0 / scale) + shift).sample[:, :, 0]
    assert torch.equal(FAMILY.decode(FAMILY.load_vae(vae_folder, torch.float32, CPU), latents), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_video_kernel_of_the_encoder_stays_in_memory(vae_folder: Path, dtype: torch.dtype) -> None:
    vae = FAMILY.load_vae(vae_folder, dtype, CPU)
    assert not any(isinstance(module, torch.nn.Conv3d) for module in (*vae.encoder.modules(), vae.quant_conv))
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        assert not parameter.requires_grad
        assert parameter.dtype == dtype
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_loading_the_vae_leaves_the_random_state(vae_folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    FAMILY.load_vae(vae_folder, torch.float32, CPU)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_in_bf16_the_folded_vae_is_as_near_the_truth_as_the_video_vae(vae_folder: Path) -> None:
    pixels, vae = draw_pixels(3, 48, 112), reference_vae(vae_folder)
    truth, _ = normalised(vae.encode(pixels[:, :, None]).latent_dist, vae)
    vae.to(torch.bfloat16)
    posterior = vae.encode(pixels[:, :, None].bfloat16()).latent_dist
    theirs, _ = normalised(posterior, vae)
    ours, std = FAMILY.encode_images(FAMILY.load_vae(vae_folder, torch.bfloat16, CPU), pixels)
    assert ours.dtype == std.dtype == torch.float32
    assert (ours - truth).pow(2).mean() < 1.5 * (theirs - truth).pow(2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 128, 128), (3, 64, 160)])
def test_image_memory_is_what_encoding_takes(vae_folder: Path, dtype: torch.dtype, batch: int, height: int, width: int) -> None:
    vae, pixels = FAMILY.load_vae(vae_folder, dtype, CPU), draw_pixels(batch, height, width)
    taken = peak_bytes(lambda: FAMILY.encode_images(vae, pixels)) / batch
    assert 0.8 * taken <= FAMILY.image_memory(vae, height, width) <= 1.5 * taken


def test_texts_after_the_cached_prefix_equal_the_pipelines(text_folder: Path) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    texts = FAMILY.encode_texts(encoder, CAPTIONS)
    for caption, item, expected in zip(CAPTIONS, texts, reference_texts(text_folder, CAPTIONS, torch.float32), strict=True):
        assert_equal_to_rounding(item["embeds"], expected)
        assert_equal_to_rounding(item["embeds"], reference_texts(text_folder, [caption], torch.float32)[0])
        assert_equal_to_rounding(FAMILY.encode_texts(encoder, [caption])[0]["embeds"], item["embeds"])
    assert len(texts[-1]["embeds"]) == FAMILY.max_text_tokens
    assert FAMILY.text_lengths(encoder, CAPTIONS) == [len(item["embeds"]) for item in texts]


def test_in_bf16_the_cached_prefix_is_as_near_the_truth_as_the_pipeline(text_folder: Path) -> None:
    truth = torch.cat(reference_texts(text_folder, CAPTIONS, torch.float32))
    theirs = torch.cat(reference_texts(text_folder, CAPTIONS, torch.bfloat16)).float()
    encoder = FAMILY.load_text_encoder(text_folder, torch.bfloat16, CPU)
    items = FAMILY.encode_texts(encoder, CAPTIONS)
    assert {item["embeds"].dtype for item in items} == {torch.bfloat16}
    ours = torch.cat([item["embeds"] for item in items]).float()
    error = (theirs - truth).pow(2).mean()
    assert (ours - truth).pow(2).mean() < 1.2 * error
    assert (ours - theirs).pow(2).mean() < error


def test_encoding_leaves_the_cached_prefix_as_it_was(text_folder: Path) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in encoder.prefix.layers]
    first = FAMILY.encode_texts(encoder, CAPTIONS[:4])
    FAMILY.encode_texts(encoder, ["something else"])
    again = FAMILY.encode_texts(encoder, CAPTIONS[:4])
    assert all(torch.equal(one["embeds"], other["embeds"]) for one, other in zip(first, again, strict=True))
    assert len(before) == len(encoder.prefix.layers) == encoder.model.config.text_config.num_hidden_layers
    for layer, (keys, values) in zip(encoder.prefix.layers, before, strict=True):
        assert keys.shape[0] == 1
        assert keys.shape[2] == PREFIX_TOKENS
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_an_item_holds_the_memory_of_its_own_tokens_alone(text_folder: Path) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    for item in FAMILY.encode_texts(encoder, CAPTIONS):
        assert item["embeds"].untyped_storage().nbytes() == item["embeds"].nbytes


@pytest.mark.parametrize("caption", ["\na cat", "\n\na cat", "\n"])
def test_a_caption_that_joins_the_template_is_refused(text_folder: Path, caption: str) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    for work in (FAMILY.encode_texts, FAMILY.text_lengths):
        with pytest.raises(ModelError, match="starts with a line break"):
            work(encoder, ["a dog", caption])


@pytest.mark.parametrize("caption", ["", " a", "́", "\ufeff\n", "{}", "1\n", "<|im_start|>", "\u200b\n", "…\n\n"])
def test_other_captions_leave_the_templates_prefix_whole(text_folder: Path, caption: str) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    whole = encoder.tokenizer(TEMPLATE.format(caption))["input_ids"]
    assert whole[:PREFIX_TOKENS] == encoder.prefix_ids
    assert FAMILY.text_lengths(encoder, [caption]) == [len(whole) - PREFIX_TOKENS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("captions", "letters"), [(1, 60), (8, 60), (4, 300), (1, 1100)])
def test_text_memory_is_what_encoding_takes(text_folder: Path, dtype: torch.dtype, captions: int, letters: int) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, dtype, CPU)
    batch = ["abcdefghij"[: 10 - index] * (letters // 10) for index in range(captions)]
    longest = max(FAMILY.text_lengths(encoder, batch))
    taken = peak_bytes(lambda: FAMILY.encode_texts(encoder, batch)) / captions
    assert 0.8 * taken <= FAMILY.text_memory(encoder, longest) <= 1.5 * taken


def test_the_cached_prefix_is_the_start_of_the_template(text_folder: Path) -> None:
    encoder = FAMILY.load_text_encoder(text_folder, torch.float32, CPU)
    assert isinstance(encoder, QwenTextEncoder)
    assert encoder.tokenizer.decode(encoder.prefix_ids) == TEMPLATE.split("{}")[0]
