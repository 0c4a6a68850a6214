"""Put the parts together to a pipeline's folder that `model: {family: qwen-image}` accepts.

    python examples/world/assemble.py
    python examples/world/assemble.py --trained work/world/runs/pretrain/adapter --to work/world/small

The first writes work/world/model: VAE, text encoder, tokenizer, and a transformer of random weights to train. The second takes
the transformer that a run delivered instead, rounds all weights to float16, and fails where they have more than `--most-bytes`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from parts import TRAINING_SEED, TRANSFORMER_CONFIG, parse, parser, run
from rich.console import Console
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ftk import storage
from ftk.errors import ModelError
from ftk.models.components.loading import load_component
from ftk.models.qwen_image import FAMILY


def make_transformer() -> QwenImageTransformer2DModel:
    """Random weights; modulations and the last layer begin at zero, so that each block begins as the identity.

    Source: adaLN-Zero of DiT (Peebles and Xie 2022, arXiv 2212.09748).
    """
    torch.manual_seed(TRAINING_SEED)
    transformer = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG)
    modulations = [layer for block in transformer.transformer_blocks for layer in (block.img_mod[1], block.txt_mod[1])]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own, but for its shift, which is 3 as in training, e^1.1, whatever the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, max_image_seq_len=8192, base_shift=1.1, max_shift=1.1, shift=1.0,
        shift_terminal=0.02, time_shift_type="exponential", use_dynamic_shifting=True,
    )  # fmt: skip


def assemble(directory: Path, transformer: QwenImageTransformer2DModel, dtype: torch.dtype) -> QwenImagePipeline:
    """The pipeline of what the other scripts wrote, and this transformer.

    Raises:
        ModelError: one of them has not been run.
    """
    for name, script in (
        ("vae", "train_vae.py"),
        ("tokenizer", "make_text_encoder.py"),
        ("text_encoder", "make_text_encoder.py"),
    ):
        if not (directory / name).is_dir():
            raise ModelError(f"{directory / name} does not exist: run {script} first, with the same --directory.")
    return QwenImagePipeline(
        scheduler=make_scheduler(),
        vae=load_component(AutoencoderKLQwenImage, directory, "vae", dtype),
        text_encoder=load_component(Qwen2_5_VLForConditionalGeneration, directory, "text_encoder", dtype),
        tokenizer=Qwen2Tokenizer.from_pretrained(directory / "tokenizer"),
        transformer=transformer,
    )


def write(pipeline: Any, to: Path) -> dict[str, int]:
    """Write the folder; the bytes of each component's weights."""
    with storage.committing_directory(to) as temporary:
        pipeline.save_pretrained(temporary)
    FAMILY.check(to)
    return {path.parent.name: path.stat().st_size for path in sorted(to.glob("*/*.safetensors"))}


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--trained", type=Path, metavar="DIR", help="what a run delivered: a folder that holds transformer/")
    made.add_argument("--to", type=Path, metavar="DIR", help="the folder to write; DIRECTORY/model by default")
    made.add_argument("--most-bytes", type=float, default=math.inf, help="of all weights together")
    options = parse(made)
    if options.trained:
        if not (options.trained / "transformer").is_dir():
            raise ModelError(f"{options.trained} holds no transformer/: name the adapter/ folder of a run with `method: full`.")
        transformer = load_component(QwenImageTransformer2DModel, options.trained, "transformer", torch.float16)
        pipeline = assemble(options.directory, transformer, torch.float16)
    else:
        pipeline = assemble(options.directory, make_transformer(), torch.float32)
    to = options.to or options.directory / "model"
    found = write(pipeline, to)
    Console().print(f"{to}: {sum(found.values()):,} bytes of weights, {', '.join(f'{k} {v:,}' for k, v in found.items())}")
    if sum(found.values()) > options.most_bytes:
        raise SystemExit(f"That is more than --most-bytes {options.most_bytes:,.0f}: make a model in parts.py smaller.")


if __name__ == "__main__":
    run(main)
