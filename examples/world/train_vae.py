"""Train the small VAE: 8 px to a latent cell of 16 channels.

    python examples/world/train_vae.py

writes work/world/vae, with the mean and standard deviation of the world's latents in its config. Stop it at any time: the same
command goes on. Half of what it sees are scenes of the world, half doodles in any colours, so that it can draw what is not in
the world too: it stays as it is when the transformer learns something new.

It is trained folded to two dimensions, half the time of its own causal convolutions over one frame, and written unfolded: the
folded kernels are the last slices in time, the slices that a still never meets are zeros. The loss is the squared error of the
decoder's own output: `vae.decode` cuts it to [-1, 1], where gradients end.

Shape legend: B batch, C channels, H W pixels or latent cells.
"""

import math
import random
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from parts import TRAINING_SEED, VAE_CONFIG, fit, parse, parser, positive, run
from PIL import Image, ImageDraw
from rich.console import Console

from ftk import storage
from ftk.demo import checker, drawing, world
from ftk.demo.scenes import SIZES, generator, layout
from ftk.models.qwen_image import fold_single_frame

BATCH_SIZE = 8
LEARNING_RATE = 1e-3
POSTERIOR_STD = 0.1
"""Of each latent, beside a deviation of about 1 over all pictures: fixed, so that nothing has to be learned about it."""
LATENT_WEIGHT = 1e-4
"""Of the squared latents in the loss, which keeps their deviation near 1."""
_DOODLE_SCALE = 2
NUM_STATISTICS = 400
NUM_HELD_OUT = 100


class FoldedVae(torch.nn.Module):
    """Encoder and decoder of stills; parameter names are those of AutoencoderKLQwenImage."""

    def __init__(self) -> None:
        super().__init__()
        vae = AutoencoderKLQwenImage(**VAE_CONFIG)
        fold_single_frame(vae)
        # The decoder is made of the same parts.
        decoder = SimpleNamespace(encoder=vae.decoder, quant_conv=vae.post_quant_conv, dtype=vae.dtype)
        fold_single_frame(decoder)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, decoder.quant_conv
        self.requires_grad_(True)
        _initialise(self)

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """The posterior's mean."""
        return self.quant_conv(self.encoder(pixels_BCHW)).chunk(2, dim=1)[0]

    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels from about -1 to 1, not cut."""
        return self.decoder(self.post_quant_conv(latents_BCHW))


def _initialise(vae: torch.nn.Module) -> None:
    """Weights that keep a signal's size, and residual branches that begin at zero.

    torch's own are three times too small here: they shrink a signal a little, and count the slices in time that a still never
    meets. Through so many layers only biases arrive, and for thousands of steps nothing but a flat colour comes back: 9 dB.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj")):
                torch.nn.init.zeros_(module.weight)


def doodle(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A few figures of any colours on one of any colour, sometimes ruled: what the VAE cannot draw, no model can learn."""
    canvas = Image.new("RGB", (_DOODLE_SCALE * size[0], _DOODLE_SCALE * size[1]), _any_colour(rng))
    draw = ImageDraw.Draw(canvas)
    if rng.random() < 0.3:
        _rule(draw, rng, canvas.size)
    for _ in range(rng.randint(1, 5)):
        at = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        radius = _DOODLE_SCALE * math.exp(rng.uniform(math.log(6), math.log(20)))
        _stroke(draw, rng, at, radius)
        for _ in range(rng.choice((0, 2, 4, 6))):
            part = at[0] + rng.uniform(-radius, radius), at[1] + rng.uniform(-radius, radius)
            _stroke(draw, rng, part, radius * rng.uniform(0.15, 0.6))
    return canvas.reduce(_DOODLE_SCALE)


def _rule(draw: ImageDraw.ImageDraw, rng: random.Random, size: tuple[int, int]) -> None:
    """Lines over all of it, across or down."""
    width, height = size
    period, thickness, colour = _DOODLE_SCALE * rng.randint(6, 16), _DOODLE_SCALE * rng.randint(1, 3), _any_colour(rng)
    down = rng.random() < 0.5
    for start in range(rng.randrange(period), width if down else height, period):
        end = start + thickness - 1
        draw.rectangle((start, 0, end, height) if down else (0, start, width, end), fill=colour)


def _stroke(draw: ImageDraw.ImageDraw, rng: random.Random, at: tuple[float, float], radius: float) -> None:
    """A disc, an outline, a polygon or a line."""
    x, y = at
    colour, thickness = _any_colour(rng), _DOODLE_SCALE * rng.randint(1, 4)
    flat, narrow = (radius * rng.uniform(0.4, 1) for _ in range(2))
    box = (x - narrow, y - flat, x + narrow, y + flat)
    corners = [(x + rng.uniform(-radius, radius), y + rng.uniform(-radius, radius)) for _ in range(rng.randint(3, 6))]
    match rng.randrange(5):
        case 0 | 1:
            draw.ellipse(box, fill=colour)
        case 2:
            draw.ellipse(box, outline=colour, width=thickness)
        case 3:
            draw.polygon(corners, fill=colour)
        case _:
            draw.line(corners, fill=colour, width=thickness)


def _any_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def batch(step: int) -> torch.Tensor:
    """Pictures of one size, from -1 to 1: half of the world, half doodles."""
    rng = generator("vae", TRAINING_SEED, step)
    size = rng.choice(SIZES)
    scenes = (layout(rng, loose=True) for _ in count())
    drawn = [drawing.render(next(one for one in scenes if (one.width, one.height) == size)) for _ in range(BATCH_SIZE // 2)]
    return pixels([*drawn, *(doodle(rng, size) for _ in range(BATCH_SIZE - len(drawn)))])


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Of pictures of one size, from -1 to 1."""
    values = np.stack([np.asarray(picture) for picture in pictures])
    return torch.tensor(values, dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1


def loss_of(vae: FoldedVae, step: int) -> torch.Tensor:
    """Squared error of what comes back from a draw of the posterior, and the latents' size."""
    pixels_BCHW = batch(step)
    latents_BCHW = vae.encode(pixels_BCHW)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=torch.Generator().manual_seed(step))
    error = (vae.decode(latents_BCHW + POSTERIOR_STD * noise_BCHW) - pixels_BCHW).square().mean()
    return error + LATENT_WEIGHT * latents_BCHW.square().mean()


def unfolded(folded: FoldedVae) -> AutoencoderKLQwenImage:
    """The VAE in its own class, with the world's latent statistics and a posterior of fixed width."""
    means_BCHW = encoded([drawing.render(world.scene(TRAINING_SEED, index)) for index in range(NUM_STATISTICS)], folded)
    flat_CN = torch.cat([one.transpose(0, 1).flatten(1) for one in means_BCHW], dim=1)
    statistics = {"latents_mean": flat_CN.mean(dim=1).tolist(), "latents_std": flat_CN.std(dim=1).tolist()}
    vae = AutoencoderKLQwenImage(**VAE_CONFIG, **statistics)
    given = folded.state_dict()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            tensor = given[name.replace(".resample.", ".")]  # folding put these layers in their module's place
            if tensor.ndim == 4 and parameter.ndim == 5:
                parameter.zero_()
                parameter[:, :, -1] = tensor
            else:
                parameter.copy_(tensor.view(parameter.shape))
        half = VAE_CONFIG["z_dim"]
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = 2 * math.log(POSTERIOR_STD)
    return vae.eval()


def encoded(pictures: list[Image.Image], folded: FoldedVae) -> list[torch.Tensor]:
    """Means, one picture at a time: they differ in size."""
    with torch.inference_mode():
        return [folded.encode(pixels([picture])) for picture in pictures]


def decoded(picture: Image.Image, vae: AutoencoderKLQwenImage) -> Image.Image:
    """There and back, through what the pipeline calls."""
    with torch.inference_mode():
        latents = vae.encode(pixels([picture]).unsqueeze(2)).latent_dist.mode()
        values = vae.decode(latents, return_dict=False)[0][0, :, 0]
    return Image.fromarray(((values.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """dB."""
    error = np.mean((np.asarray(picture, np.float64) - np.asarray(reference, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


def report(vae: AutoencoderKLQwenImage) -> float:
    """Print how well held-out pictures come back, and what the checker reads in them. Returns the world's PSNR, dB."""
    scenes = [world.scene(world.HELD_OUT_SEED, index) for index in range(NUM_HELD_OUT)]
    drawn = {
        "world": [drawing.render(scene) for scene in scenes],
        "creature": [drawing.render(world.concept_scene(world.HELD_OUT_SEED, index)) for index in range(NUM_HELD_OUT // 4)],
        "style": [drawing.render_sketch(scene) for scene in scenes[: NUM_HELD_OUT // 4]],
    }
    back = {name: [decoded(picture, vae) for picture in pictures] for name, pictures in drawn.items()}
    found = {name: float(np.mean([psnr(*pair) for pair in zip(back[name], drawn[name], strict=True)])) for name in drawn}
    agreed = [
        value for picture, scene in zip(back["world"], scenes, strict=True) for value in checker.score(picture, scene).values()
    ]
    likeness = float(np.mean([checker.similarity(picture) for picture in back["creature"]]))
    console = Console()
    console.print(", ".join(f"{name} {value:.1f} dB" for name, value in found.items()))
    console.print(
        f"the checker reads {np.mean(agreed):.1%} of the world's attributes right; likeness of the creature {likeness:.2f}"
    )
    return found["world"]


def write(vae: AutoencoderKLQwenImage, directory: Path) -> None:
    """The VAE's folder of a pipeline."""
    with storage.committing_directory(directory) as temporary:
        vae.save_pretrained(temporary)


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--steps", type=positive, default=14000)
    made.add_argument("--least-psnr", type=float, default=27.0, help="dB of held-out pictures, below which the script fails")
    made.add_argument("--compile", action="store_true", help="two thirds of the time; needs a C++ compiler")
    options = parse(made)
    torch.manual_seed(TRAINING_SEED)
    folded = FoldedVae()
    if options.compile:
        folded.encoder.compile(dynamic=False)
        folded.decoder.compile(dynamic=False)
    fit(
        dict(folded.named_parameters()),
        lambda step: loss_of(folded, step),
        steps=options.steps,
        learning_rate=LEARNING_RATE,
        checkpoint=options.directory / "vae.checkpoint.safetensors",
    )
    vae = unfolded(folded)
    write(vae, options.directory / "vae")
    found = report(vae)
    if found < options.least_psnr:
        raise SystemExit(f"{found:.1f} dB is less than --least-psnr {options.least_psnr}: give it more --steps.")


if __name__ == "__main__":
    run(main)
