"""Which control images a use of a sample is trained on: a pure function of the seed, the epoch, the sample and the use.

Shape legend: C channels, H W pixels, h w latent cells.
"""

from collections.abc import Mapping, Sequence

import pyarrow.compute as pc
import torch

from ftk.cache.store import CacheStore
from ftk.errors import CacheError
from ftk.methods.base import HasControls
from ftk.run import Run
from ftk.train.order import keyed_seed


def drawn(
    store: CacheStore, run: Run, sample: int, key: Sequence[object], *, can_drop: bool = False
) -> tuple[torch.Tensor, ...]:
    """The control images of one use of a sample, as `train.controls` says; none for a method that reads none.

    Args:
        key: names the use: the same key draws the same control image.
        can_drop: whether `train.control_dropout` counts. All control images of a use are dropped together.
    """
    method, config = run.method, run.config.train
    if not isinstance(method, HasControls):
        return ()
    numbers = range(store.num_controls(sample))
    if config.controls == "one" and len(numbers) > 1:
        numbers = range(number := int(_uniform(*key, "control") * len(numbers)), number + 1)
    controls = tuple(control_tensor(store.control_item(sample, number)) for number in numbers)
    if can_drop and config.control_dropout and _uniform(*key, "control dropout") < config.control_dropout:
        return tuple(method.dropped_control(control, run.needs.controls) for control in controls)
    return controls


def dropped(run: Run, control_BCHW: torch.Tensor) -> torch.Tensor:
    """A batch of control images with each of them dropped: they stand for no condition."""
    assert isinstance(run.method, HasControls)
    return torch.stack([run.method.dropped_control(control, run.needs.controls) for control in control_BCHW])


def control_tensor(item: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A cached control image: the mean of its latents [C,h,w], or its pixels [3,H,W] in [-1, 1]."""
    return item["pixels"].float() / 127.5 - 1.0 if "pixels" in item else item["mean"].float()


def check(run: Run, store: CacheStore) -> None:
    """Every sample must have the control images that the method reads, in the form in which it reads them.

    Raises:
        CacheError: a sample does not.
    """
    counts = pc.list_value_length(store.table["controls"])
    least, most = (function(counts).as_py() for function in (pc.min, pc.max))
    remedy = "Name them under `controls` of each source, then run `ftk prepare` and `ftk cache`."
    if not least:
        num_without = pc.sum(pc.equal(counts, 0)).as_py() or 0
        raise CacheError(
            f"method {run.method.name} reads control images, and {num_without} of {len(store)} samples have none. {remedy}"
        )
    if run.config.train.controls == "all" and least != most:
        raise CacheError(
            f"train.controls: all: every sample must have as many control images, and those of {store.location} have {least} "
            f"to {most}. {remedy} Or set train.controls to one: each use of a sample then takes one of its control images."
        )
    is_pixels = "pixels" in store.control_item(0, 0)
    if is_pixels != (run.needs.controls == "pixels"):
        raise CacheError(
            f"method {run.method.name} reads control images as {run.needs.controls}, and {store.location} holds them as "
            f"{'pixels' if is_pixels else 'latents'}. Run `ftk cache RUN.yaml`: it encodes those alone."
        )


def _uniform(*key: object) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=torch.Generator().manual_seed(keyed_seed(*key))))
