"""`resolutions`: what may be written, and the buckets and sizes that come of it."""

import subprocess
import sys
from typing import Any

import pytest

from ftk.configs import load
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, FtkError
from ftk.models import base
from ftk.pipeline import stage
from ftk.run import Run, resolve

KINDS = "a resolution is an edge (1024), a size (512x288), or `native`"


def _run(resolutions: Any, family: str = "qwen-image", **sections: Any) -> Run:
    tree = {
        "run": "test",
        "model": {"family": family, "path": "nowhere"},
        "data": {"sources": [{"path": "photos"}], "resolutions": resolutions, **sections.pop("data", {})},
        **sections,
    }
    return resolve(load.validate(RunConfig, tree, "run.yaml"))


def _recipe(resolutions: Any, family: str = "qwen-image", **data: Any) -> Any:
    (recipe,) = stage.image_recipes(_run(resolutions, family, data=data)).values()
    return recipe


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([512], (512,)), (["512"], (512,)), ([1.0e3], (1000,)),
        (["512x288"], ("512x288",)), (["512X288"], ("512x288",)), ([" 512 × 288 "], ("512x288",)),
        (["native", 512, "512x288"], ("native", 512, "512x288")), (["Native"], ("native",)),
    ],
)  # fmt: skip
def test_edges_sizes_and_the_familys_list_are_read(written: list[Any], read: tuple[Any, ...]) -> None:
    assert _run(written).config.data.resolutions == read


@pytest.mark.parametrize(
    ("written", "told"),
    [
        *[(word, KINDS) for word in ("512x", "512x288x3", "-512x288", "wide", 1.5, True, None, [512, 288], "1" * 5000)],
        *[(side, "1 to 16,384 px") for side in (0, 100_000, "512x0", "99999x16")],
        ("nativ", "Did you mean `native`?"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_words_are_refused(written: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run([written])
    assert "data.resolutions.0" in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("written", "told"),
    [(["512x288", "512 x 288"], "names the same size twice: 512x288"), ("native", "a list"), ([], "at least 1 item")],
    ids=str,
)
def test_other_lists_are_refused(written: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(written)
    assert "data.resolutions" in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("family", "size", "nearest"),
    [
        ("qwen-image", "1472x1140", "1472x1136"), ("qwen-image", "7x1000", "16x992"), ("sdxl", "512x288", "512x256"),
        ("stable-diffusion", "500x700", "512x704"),
    ],
)  # fmt: skip
def test_a_size_that_the_family_does_not_have_is_refused_with_the_nearest(family: str, size: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"data.resolutions: {size} is not a size of {family}.*The nearest is {nearest}"):
        _recipe([size], family)
    assert _recipe([nearest], family).exact_sizes


def test_sizes_are_kept_exactly_beside_the_buckets_of_edges() -> None:
    recipe = _recipe([512, "1664x928", "512x288", 256])
    assert recipe.exact_sizes == ((512, 288), (1664, 928))
    assert recipe.sizes == (*_recipe([512]).sizes, *_recipe([256]).sizes)
    assert _recipe(["512x288", 512, "1664x928", 256]) == recipe, "the order of sizes means nothing"


@pytest.mark.parametrize("family", base.available())
def test_native_means_the_familys_own_list(family: str) -> None:
    recipe = _recipe(["native"], family)
    assert set(recipe.exact_sizes) == set(base.get(family).native_sizes)
    assert recipe.sizes == ()


def test_native_and_its_sizes_written_out_are_the_same() -> None:
    names = [f"{width}x{height}" for width, height in base.get("qwen-image").native_sizes]
    assert _recipe(["native"]) == _recipe(names) == _recipe(["native", names[0]])


def test_a_family_without_published_sizes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(base.get("qwen-image")), "native_sizes", ())
    with pytest.raises(ConfigError, match="makers publish, and qwen-image has none"):
        _recipe(["native"])


@pytest.mark.parametrize("setting", [{"max_aspect": 3.0}, {"bucket_step": 64}])
def test_settings_of_edges_are_refused_without_one(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no effect without an edge in `resolutions`"):
        _recipe(["512x288"], **setting)
    assert _recipe(["512x288", 512], **setting)


@pytest.mark.parametrize(
    ("resolutions", "size"),
    [([1000], (992, 992)), (["1664x928", 512], (1664, 928)), (["native"], (1328, 1328)), ([512, "native"], (512, 512))],
    ids=str,
)
def test_sample_images_have_the_first_size(resolutions: list[Any], size: tuple[int, int]) -> None:
    assert _run(resolutions).sample_size == size
    assert _run(resolutions, sample={"width": 64}).sample_size == (64, size[1])


def test_no_torch_is_needed_for_a_familys_sizes() -> None:
    program = """
import sys
from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.pipeline import stage
from ftk.run import resolve
data = {"sources": [{"path": "photos"}], "resolutions": ["native"]}
tree = {"run": "test", "model": {"family": "sdxl", "path": "nowhere"}, "data": data}
stage.image_recipes(resolve(validate(RunConfig, tree, "run.yaml")))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_edge_smaller_than_a_bucket_step_is_refused() -> None:
    with pytest.raises(FtkError, match=r"data\.resolutions: 8 is smaller than one bucket step"):
        _recipe([8])
