"""Which control images a use of a sample is trained on."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.cache.store import CacheStore
from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.contracts import CachedSample
from ftk.errors import CacheError, ConfigError
from ftk.methods.base import CacheNeeds, empty_control
from ftk.run import Run, resolve
from ftk.train import controls
from ftk.train.data import BatchBuilder
from ftk.train.inputs import sigma_distribution
from ftk.train.order import Draw


class ReadsControls:
    """As much of a method as the choice of control images takes."""

    name = "reads-controls"
    reads_several = True

    def dropped_control(self, control: torch.Tensor, form: str) -> torch.Tensor:
        return empty_control(control, form)

    def sampling_pipeline(self, model: Any, pipeline: Any) -> Any:
        raise NotImplementedError

    def pipeline_controls(self, controls: Any) -> dict[str, Any]:
        raise NotImplementedError


def run_with(tiny_model: Path, sample: dict[str, Any] | None = None, **train: Any) -> Run:
    tree = {
        "run": "test",
        "workspace": "work",
        "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": "photos"}]},
        "method": {"name": "lora"},
        "train": {"steps": 4, "seed": 1, **train},
        **({"sample": sample} if sample else {}),
    }
    return resolve(validate(RunConfig, tree, "the test"))


def reading(tiny_model: Path, **train: Any) -> Run:
    """A run whose method reads control images."""
    plain = run_with(tiny_model)
    return replace(plain, method=ReadsControls()).with_config(
        plain.config.model_copy(update={"train": plain.config.train.model_copy(update=train)})
    )


@pytest.fixture
def store(
    tmp_path: Path,
    cached_samples: Callable[[int], list[CachedSample]],
    written_cache: Callable[..., Any],
) -> Iterator[CacheStore]:
    """Four samples of one size, with one, two, three and three control images."""
    size = {"bucket_width": 64, "bucket_height": 80}
    rows = [replace(row, **size) for row in cached_samples(7)[::2]]
    names = [[f"control{number}-{which}" for which in range(count)] for number, count in enumerate((1, 2, 3, 3))]
    written_cache(tmp_path, samples=[replace(row, controls=each) for row, each in zip(rows, names, strict=True)])
    with closing(CacheStore.open(str(tmp_path))) as opened:
        yield opened


def which(store: CacheStore, sample: int, drawn: tuple[torch.Tensor, ...]) -> list[int]:
    """Which of a sample's control images were drawn; -1 is a dropped one."""
    items = [item["mean"].float() for item in store.control_items(sample)]
    return [
        next((number for number, item in enumerate(items) if torch.equal(item, control)), -1 if not control.any() else -2)
        for control in drawn
    ]


def test_each_use_of_a_sample_takes_one_of_its_control_images(store: CacheStore, tiny_model: Path) -> None:
    run = reading(tiny_model)
    for sample, count in enumerate((1, 2, 3, 3)):
        drawn = [which(store, sample, controls.drawn(store, run, sample, (1, epoch, sample))) for epoch in range(200)]
        numbers = Counter(number for (number,) in drawn)
        assert set(numbers) == set(range(count))
        assert all(abs(times - 200 / count) < 40 for times in numbers.values())
        assert drawn == [which(store, sample, controls.drawn(store, run, sample, (1, epoch, sample))) for epoch in range(200)]


def test_all_control_images_are_taken_in_their_order(store: CacheStore, tiny_model: Path) -> None:
    run = reading(tiny_model, controls="all")
    assert which(store, 2, controls.drawn(store, run, 2, (1, 0, "b"))) == [0, 1, 2]


@pytest.mark.parametrize("taken", ["one", "all"])
def test_control_images_are_dropped_together_at_their_rate(store: CacheStore, tiny_model: Path, taken: str) -> None:
    run = reading(tiny_model, control_dropout=0.25, controls=taken)
    drawn = [which(store, 2, controls.drawn(store, run, 2, (1, epoch, "b"), can_drop=True)) for epoch in range(400)]
    dropped = [each for each in drawn if -1 in each]
    assert all(set(each) == {-1} for each in dropped)
    assert 70 < len(dropped) < 130
    # What is not dropped is what would have been drawn without dropout.
    plain = [which(store, 2, controls.drawn(store, run, 2, (1, epoch, "b"))) for epoch in range(400)]
    assert all(with_dropout in (without, [-1] * len(without)) for with_dropout, without in zip(drawn, plain, strict=True))


def test_a_dropped_control_image_is_black_pixels_or_latents_of_zeros() -> None:
    control = torch.rand(3, 4, 5)
    assert torch.equal(empty_control(control, "pixels"), torch.full((3, 4, 5), -1.0))
    assert torch.equal(empty_control(control, "latents"), torch.zeros(3, 4, 5))


def test_batches_drop_controls_by_epoch_and_sample_and_validation_never_does(store: CacheStore, tiny_model: Path) -> None:
    run = reading(tiny_model, control_dropout=0.5)
    schedule = run.family.load_schedule(tiny_model)
    sigmas = sigma_distribution(run.config.train, schedule, run.family)
    builder = BatchBuilder(store=store, run=run, sigmas=sigmas, dtype=torch.float32)
    whole = replace(builder, run=reading(tiny_model))

    def seen(one: BatchBuilder, epoch: int, samples: tuple[int, ...]) -> list[torch.Tensor]:
        draws = tuple(Draw(epoch=epoch, sample=sample, repeat=0, caption=0) for sample in samples)
        (controls_BCHW,) = one.build(draws).conditions.controls
        return list(controls_BCHW)

    is_dropped = [[not control.any() for control in seen(builder, epoch, (1, 2))] for epoch in range(40)]
    assert {tuple(each) for each in is_dropped} == {(a, b) for a in (False, True) for b in (False, True)}
    # Neither what else is in the batch nor the order in which batches are built has a say.
    assert [not control.any() for control in seen(builder, 7, (2,))] == is_dropped[7][1:]
    for epoch in range(10):
        for control, plain in zip(seen(builder, epoch, (1, 2)), seen(whole, epoch, (1, 2)), strict=True):
            assert not control.any() or torch.equal(control, plain)
    for position in range(8):
        (fixed,), (plain,) = (one.fixed([1, 2], position, 8).conditions.controls for one in (builder, whole))
        assert all(control.any() for control in fixed)
        assert torch.equal(fixed, plain)


def test_samples_without_control_images_or_with_too_few_are_refused(
    store: CacheStore, tiny_model: Path, tmp_path: Path, written_cache: Callable[..., Any]
) -> None:
    controls.check(reading(tiny_model), store)
    with pytest.raises(CacheError, match=r"train.controls: all: every sample must have as many .* have 1 to 3.*Or set train"):
        controls.check(reading(tiny_model, controls="all"), store)
    written_cache(tmp_path / "others")
    with (
        closing(CacheStore.open(str(tmp_path / "others"))) as opened,
        pytest.raises(CacheError, match="reads control images, and 6 of 8 samples have none"),
    ):
        controls.check(reading(tiny_model), opened)


def test_control_images_in_another_form_are_refused(store: CacheStore, tiny_model: Path) -> None:
    run = replace(reading(tiny_model), needs=CacheNeeds(controls="pixels"))
    with pytest.raises(CacheError, match=r"reads control images as pixels, and .* holds them as latents. Run `ftk cache RUN"):
        controls.check(run, store)


@pytest.mark.parametrize("settings", [{"controls": "all"}, {"control_dropout": 0.1}])
def test_settings_of_control_images_are_refused_by_a_method_that_reads_none(tiny_model: Path, settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"train.{name} has no effect with method lora, which reads no control images"):
        run_with(tiny_model, **settings)
