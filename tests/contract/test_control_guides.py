"""The recipes in docs/methods.md for methods that read control images run as they stand, on a tiny model and a few pictures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control_images
import pytest

from ftk.cache import stage as cache
from ftk.configs.load import parse_yaml, validate
from ftk.configs.schema import RunConfig
from ftk.deliver.run_delivery import RunDelivery
from ftk.pipeline import stage as prepare
from ftk.run import resolve
from ftk.train import stage as train

GUIDE = Path(__file__).parents[2] / "docs" / "methods.md"
TINY = {
    "data": {"resolutions": [control_images.SIDE], "workers": 1},
    "cache": {"device": "cpu", "text_dtype": "float32"},
    "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "device": "cpu", "trackers": []},
    "sample": {"every": 1, "num_inference_steps": 2, "device": "cpu"},
}


def recipe(section: str) -> dict[str, Any]:
    """The first YAML under a heading of the guide."""
    text = GUIDE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None, section
    return parse_yaml(block[1], section)


@pytest.mark.parametrize(("method", "family"), [("control-lora", "qwen-image"), ("t2i-adapter", "sdxl")])
def test_the_recipe_of_the_guide_runs_on_a_tiny_model(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, family: str
) -> None:
    tree = recipe(method)
    assert tree["method"]["name"] == method
    assert tree.setdefault("model", {"family": family})["family"] == family
    control_images.write(tmp_path)
    for theirs, ours in (("photos", "one/images"), ("photos-edges", "one/edges")):
        (tmp_path / ours).rename(tmp_path / theirs)
    (prompt,) = tree["sample"]["prompts"]
    prompt["controls"] = [str(tmp_path / "photos-edges" / "1.png")]
    tree["model"]["path"] = str(tiny_models(family))
    for section, values in TINY.items():
        tree[section] = {**tree.get(section, {}), **values}
    monkeypatch.chdir(tmp_path)
    run = resolve(validate(RunConfig, {"run": "guide", "workspace": "work", **tree}, section))
    prepare.run(run)
    cache.run(run)
    report = train.run(run, RunDelivery)
    assert report is not None
    assert report.step == 1
    assert (Path(run.paths.run) / "samples" / "step-00000001.png").exists()
    assert list(Path(run.paths.adapter).glob("*.safetensors"))
