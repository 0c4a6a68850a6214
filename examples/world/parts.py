"""What the scripts beside this one share: the sizes of the three small models, where things lie, and a training loop.

All weights together are under 6 MB in two bytes each: VAE 686 k parameters, text encoder 280 k, transformer 1.9 M.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ftk import storage
from ftk.errors import CheckpointError, FtkError
from ftk.models.components.loading import hide_progress_bars
from ftk.progress import track

DIRECTORY = Path("work/world")
TRAINING_SEED = 1

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
    # Stills only: no weights for steps in time, and still a factor of 8 in space.
    "temperal_downsample": [False, False, False],
}  # fmt: skip
TEXT_WIDTH = 96
TEXT_CONFIG: dict[str, Any] = {
    "text_config": {
        "bos_token_id": None, "eos_token_id": None,
        "hidden_size": TEXT_WIDTH, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
    },
    # Never run: the pipeline's class has it.
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    },
    "tie_word_embeddings": True,
}  # fmt: skip
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 4, "attention_head_dim": 28,
    "num_attention_heads": 4, "joint_attention_dim": TEXT_WIDTH, "guidance_embeds": False,
    # Frame, row, column: there is one frame.
    "axes_dims_rope": (4, 12, 12),
}  # fmt: skip

_WARMUP_STEPS = 50
_DECAY = 0.98


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all scripts have."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--directory", type=Path, default=DIRECTORY, help="where everything lies")
    made.add_argument("--threads", type=positive, help="torch's CPU threads; all cores by default")
    return made


def positive(text: str) -> int:
    """An option's value: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; sets the number of threads, and lets progress be seen in a log too."""
    options = made.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ftk").setLevel(logging.INFO)
    hide_progress_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def run(main: Callable[[], None]) -> None:
    """Run a script: every expected failure ends in a message and its exit code."""
    try:
        main()
    except FtkError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. The same command goes on from the newest checkpoint.\n")
        raise SystemExit(130) from None


def fit(
    parameters: Mapping[str, torch.nn.Parameter],
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    every: int = 250,
) -> None:
    """AdamW with a warm-up and a linear decay to zero; goes on from its checkpoint, if there is one of the same settings.

    Args:
        parameters: what is trained, by name.
        loss_of: the loss of a step, by its number, and nothing else: so a resumed run is the same run.
        steps: in all.
        learning_rate: its peak.
        checkpoint: a safetensors file with parameters and moments.
        every: steps between two checkpoints.

    Raises:
        CheckpointError: the checkpoint is damaged, or of other settings.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99))
    settings = {"steps": steps, "learning_rate": learning_rate}
    first = _resume(checkpoint, settings, parameters, optimizer)
    smooth = 0.0
    with track("train", steps, "step", first) as progress:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / _WARMUP_STEPS, (steps - step) / steps)
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smooth = _DECAY * smooth + (1 - _DECAY) * loss.item()
            progress.advance(1, f"loss {smooth / (1 - _DECAY ** (step - first + 1)):.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                _save(checkpoint, settings, step + 1, parameters, optimizer)


def _save(
    path: Path,
    settings: Mapping[str, Any],
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment].contiguous()
    storage.commit_bytes(path, save(tensors, {"settings": json.dumps(settings), "step": str(step)}))


def _resume(
    path: Path,
    settings: Mapping[str, Any],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Steps that the checkpoint has behind it; 0 without one."""
    if not path.exists():
        return 0
    noted, tensors = _read(path)
    if json.loads(noted["settings"]) != settings:
        raise CheckpointError(
            f"{path} is of a training with other settings: {noted['settings']} instead of {json.dumps(settings)}. "
            f"Give those, or remove the file to start over."
        )
    step = int(noted["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
            moments = {moment: tensors[f"{moment}:{name}"] for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Remove it to start over.") from error
