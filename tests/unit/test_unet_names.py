"""Names of a U-Net's layers in kohya's format: those of the first publication of SDXL, which diffusers reads back."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft

from ftk.configs.schema import MethodConfig
from ftk.methods import base as methods
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import DENOISER

META = torch.device("meta")
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
"""As published in stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""


@pytest.fixture(scope="module")
def denoiser() -> Any:
    with META:
        return UNet2DConditionModel(**SDXL)


def layers_of(denoiser: Any) -> list[str]:
    return [name for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]


def transformer(start: str, depth: int) -> Iterator[str]:
    yield from (f"{start}.proj_in", f"{start}.proj_out")
    for number in range(depth):
        block = f"{start}.transformer_blocks.{number}"
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")


def resnet(start: str, before: int, after: int) -> Iterator[str]:
    yield from (f"{start}.in_layers.2", f"{start}.emb_layers.1", f"{start}.out_layers.3")
    if before != after:
        yield f"{start}.skip_connection"


def published() -> Iterator[str]:
    """Layers of Stability's SDXL, made in the order of its `UNetModel` from the settings of `sd_xl_base.yaml`."""
    channels, multiples, depths, per_level = 320, (1, 2, 4), (1, 2, 10), 2
    attended = {2, 4}
    yield from ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0")
    width, number, shrunk, widths = channels, 0, 1, [channels]
    for level, multiple in enumerate(multiples):
        for _ in range(per_level):
            number += 1
            yield from resnet(f"input_blocks.{number}.0", width, multiple * channels)
            width = multiple * channels
            if shrunk in attended:
                yield from transformer(f"input_blocks.{number}.1", depths[level])
            widths.append(width)
        if level < len(multiples) - 1:
            number, shrunk = number + 1, shrunk * 2
            yield f"input_blocks.{number}.0.op"
            widths.append(width)
    yield from resnet("middle_block.0", width, width)
    yield from transformer("middle_block.1", depths[-1])
    yield from resnet("middle_block.2", width, width)
    number = 0
    for level, multiple in reversed(list(enumerate(multiples))):
        for place in range(per_level + 1):
            yield from resnet(f"output_blocks.{number}.0", width + widths.pop(), multiple * channels)
            width, parts = multiple * channels, 1
            if shrunk in attended:
                yield from transformer(f"output_blocks.{number}.1", depths[level])
                parts = 2
            if level and place == per_level:
                yield f"output_blocks.{number}.{parts}.conv"
                shrunk //= 2
            number += 1
    yield "out.2"


def test_every_layer_of_a_full_size_sdxl_has_its_published_name(denoiser: Any) -> None:
    names = families.get("sdxl").adapter_names("kohya", DENOISER, denoiser)
    found = [names.module(layer) for layer in layers_of(denoiser)]
    assert len(set(found)) == len(found) == 794
    assert set(found) == {"lora_unet_" + name.replace(".", "_") for name in published()}


def test_diffusers_reads_each_published_name_back_as_its_layer(denoiser: Any) -> None:
    names = families.get("sdxl").adapter_names("kohya", DENOISER, denoiser)
    layers = layers_of(denoiser)
    tensors = {}
    for number, layer in enumerate(layers):
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"{names.module(layer)}.{part}"] = torch.tensor(float(number))
    state, _ = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=denoiser.config)
    renamed = convert_unet_state_dict_to_peft({name.removeprefix("unet."): tensor for name, tensor in state.items()})
    assert len(renamed) == 2 * len(layers)
    assert {name.rpartition(".lora_")[0]: layers[int(tensor)] for name, tensor in renamed.items()} == {
        layer: layer for layer in layers
    }


def test_stable_diffusion_keeps_the_names_of_diffusers_that_sd_scripts_train_it_with(
    tiny_models: Callable[[str], Path],
) -> None:
    module = families.get("stable-diffusion").load_denoiser(tiny_models("stable-diffusion"), torch.float32, META)
    names = families.get("stable-diffusion").adapter_names("kohya", DENOISER, module)
    assert {names.module(layer) for layer in layers_of(module)} == {
        "lora_unet_" + layer.replace(".", "_") for layer in layers_of(module)
    }


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
@pytest.mark.parametrize(
    ("family", "unread"),
    [
        ("stable-diffusion", ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out")),
        ("sdxl", ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
                  "add_embedding.linear_2", "conv_out")),
    ],
)  # fmt: skip
def test_layers_that_sd_scripts_pass_over_are_named(
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
    family: str,
    unread: tuple[str, ...],
) -> None:
    made, settings = methods.parse(MethodConfig(name=method, rank=2, targets="all"))
    model = families.load_model(families.get(family), tiny_models(family), (), torch.float32, torch.device("cpu"))
    made.attach(model, settings, 0)
    with caplog.at_level(logging.WARNING):
        made.export(model, settings, Export(directory=tmp_path, form="kohya", metadata={}))
        (record,) = caplog.records
        assert f"have no place for {len(unread)} of the layers and pass over them: {', '.join(unread)}." in record.getMessage()
        made.export(model, settings, Export(directory=tmp_path, form="comfyui", metadata={}))
    assert len(caplog.records) == 1
