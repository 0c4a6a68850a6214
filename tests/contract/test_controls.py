"""Every method that reads control images, on every family that it knows: from pictures with controls to a delivery."""

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import control_images
import denoisers
import numpy as np
import pytest

from ftk.cache import stage as cache
from ftk.cache.store import CacheStore
from ftk.configs.schema import AddedAdapterConfig
from ftk.deliver import export, merge, sample
from ftk.deliver.run_delivery import RunDelivery
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.base import HasControls
from ftk.models import base as families
from ftk.pipeline import stage as prepare
from ftk.run import Run
from ftk.train import stage as train
from ftk.train.sheet import cells

READING = [name for name in methods.available() if isinstance(methods.get(name), HasControls)]
PAIRS = [
    denoisers.marked(family, name)
    for family in denoisers.families_of_each()
    for name in READING
    if control_images.knows(family, name, {})
]
SMALL: dict[str, dict[str, dict[str, Any]]] = {"t2i-adapter": {"qwen-image": {"width": 8}}}
"""By method and family, settings that fit a tiny model."""
each_pair = pytest.mark.parametrize(("family_name", "method_name"), PAIRS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those with control images of one and of two kinds."""
    root = tmp_path_factory.mktemp("pictures")
    control_images.write(root)
    return root


@pytest.fixture(scope="module")
def make_run(
    pictures: Path, tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """A run over the pictures, by its family and method; those of one family and form of controls share a workspace."""
    root = tmp_path_factory.mktemp("work")
    cached: set[Path] = set()
    prepared: dict[str, Path] = {}

    def make(family_name: str, method_name: str, **sections: Any) -> Run:
        model = tiny_models(family_name)
        needs = methods.get(method_name)
        form = needs.cache_needs(families.get(family_name), needs.Config()).controls
        workspace = root / f"{family_name}-{form}"
        run = control_images.run(
            pictures,
            model,
            workspace,
            family_name,
            {"name": method_name, **SMALL.get(method_name, {}).get(family_name, {})},
            **sections,
        )
        if workspace not in cached:
            # One dataset does for both forms of control images.
            if family_name in prepared:
                shutil.copytree(prepared[family_name], run.paths.prepared)
            else:
                prepare.run(run)
                prepared[family_name] = Path(run.paths.prepared)
            cache.run(run)
            cached.add(workspace)
        return run

    return make


@each_pair
def test_a_run_with_controls_resumes_to_the_same_bytes_samples_and_delivers(
    make_run: Callable[..., Run], family_name: str, method_name: str, tmp_path: Path
) -> None:
    whole = make_run(family_name, method_name, name=f"{method_name}-whole")
    with closing(CacheStore.open(whole.paths.cache)) as store:
        assert {store.num_controls(number) for number in range(len(store))} == {1, 2}
        assert all((whole.needs.controls == "pixels") == ("pixels" in item) for item in store.control_items(0))
    report = train.run(whole, RunDelivery)
    assert report is not None
    assert report.step == 4
    assert report.best_step is not None, "validation has run"
    for steps in (2, 4):
        part = make_run(family_name, method_name, name=f"{method_name}-part", train={"steps": steps})
        train.run(part, RunDelivery)
    files = sorted(whole.paths.checkpoints.glob("00000004/*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (part.paths.checkpoints / "00000004" / file.name).read_bytes(), file.name

    # The pictures of training are those of `ftk sample`, which loads what was delivered and encodes the controls itself.
    drawn = sample.run(whole)
    assert drawn.mean_difference > 0
    ((while_training, _),) = cells(whole.paths.run / "samples" / "step-00000004.png")
    _, (afterwards, _) = cells(Path(drawn.grid))
    difference = np.asarray(while_training).astype(int) - np.asarray(afterwards).astype(int)
    assert np.abs(difference).max() <= 1
    exported = export.export(whole, out=tmp_path / "out")
    assert all((Path(exported.directory) / name).is_file() for name in exported.files)
    if (family_name, method_name) in control_images.MERGED:
        assert merge.merge(whole, tmp_path / "merged").difference < 1e-5
        assert "image_guidance_scale=1" in (tmp_path / "merged" / "README.md").read_text()
        with pytest.raises(ConfigError, match=r"--add other.safetensors: what control-lora merges takes other inputs"):
            merge.merge(whole, tmp_path / "both", added=[AddedAdapterConfig(path="other.safetensors")])
        return
    with pytest.raises(ConfigError, match=r"nothing of it can be merged.*Use `ftk export`"):
        merge.merge(whole, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@each_pair
def test_a_prompt_without_a_control_image_is_refused(make_run: Callable[..., Run], family_name: str, method_name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"sample.prompts.0: 'a red box' has no control image, and method .*controls: \[FILE\]"
    ):
        make_run(family_name, method_name, sample={"prompts": ["a red box"]})


@each_pair
def test_a_strength_is_that_of_the_control_image(make_run: Callable[..., Run], family_name: str, method_name: str) -> None:
    run = make_run(family_name, method_name, name="strength")
    section = run.config.sample.model_copy(update={"strength": 0.5})
    stronger = dataclasses.replace(run, config=run.config.model_copy(update={"sample": section}))
    with pytest.raises(ConfigError, match=rf"sample.strength: method {method_name} has .*control_strength: 0.5"):
        sample._check_strengths(stronger, Path())
    assert methods.strength_refusal(run.method, run.settings)
