"""What a model draws without, and what dropped captions train: one and the same, by family."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, ModelError
from ftk.models import base as models
from ftk.models.base import load_model
from ftk.run import resolve

CPU = torch.device("cpu")
FAMILIES = ["qwen-image", "stable-diffusion", "sdxl"]


def run_of(family: str, **sections: Any) -> Any:
    tree = {"run": "x", "model": {"family": family, "path": "unused"}, "data": {"sources": [{"path": "unused"}]}}
    return resolve(RunConfig.model_validate({**tree, **sections}))


def draw(pipeline: Any, family: Any, **arguments: Any) -> Any:
    return pipeline(
        **arguments, width=64, height=64, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0), **family.generation(4.0),
    ).images  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_captions_train_what_pictures_are_drawn_without(tiny_models: Callable[[str], Path], name: str) -> None:
    directory, run = tiny_models(name), run_of(name)
    negative = run.negative_prompt(directory)
    assert run.dropped_text(directory) == negative == {"qwen-image": " ", "stable-diffusion": "", "sdxl": None}[name]
    family = run.family
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    prompt, without = (family.pipeline_texts(item) for item in family.encode_texts(encoder, ["a fox", negative]))
    cached = {**prompt, **{f"negative_{key}": tensor for key, tensor in without.items()}}
    pipeline = family.pipeline(directory, torch.float32, CPU)
    # Qwen-Image's pipeline has no guidance without a negative prompt; its examples give it a space.
    given = {"negative_prompt": " "} if name == "qwen-image" else {}
    expected = draw(pipeline, family, prompt="a fox", **given)
    # The two texts were encoded in one batch, so they differ by rounding.
    assert abs(draw(pipeline, family, **cached) - expected).max() < 1e-4
    assert abs(draw(pipeline, family, prompt="a fox", negative_prompt="blurry") - expected).max() > 1e-3


def test_of_sdxl_no_text_is_zeros_and_the_empty_text_is_not(tiny_models: Callable[[str], Path]) -> None:
    family, directory = models.get("sdxl"), tiny_models("sdxl")
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    nothing, empty, fox = family.encode_texts(encoder, [None, "", "a fox"])
    pipeline = family.pipeline(directory, torch.float32, CPU)
    with torch.no_grad():
        _, negative, _, negative_pooled = pipeline.encode_prompt("a fox", device=CPU)
        encoded, _, pooled, _ = pipeline.encode_prompt("", device=CPU)
    assert torch.equal(nothing["embeds"], negative[0])
    assert torch.equal(nothing["pooled"], negative_pooled[0])
    assert not nothing["embeds"].any()
    torch.testing.assert_close(empty["embeds"], encoded[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(empty["pooled"], pooled[0], rtol=1e-5, atol=1e-6)
    assert nothing.keys() == fox.keys()
    assert all(nothing[key].shape == tensor.shape and nothing[key].dtype == tensor.dtype for key, tensor in fox.items())


def test_without_the_pipelines_setting_sdxl_has_the_empty_text(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    family = models.get("sdxl")
    shutil.copytree(tiny_models("sdxl"), tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    tree = json.loads(index.read_text())
    for value, expected in ((False, ""), (True, None)):
        index.write_text(json.dumps({**tree, "force_zeros_for_empty_prompt": value}))
        assert family.unconditional(tmp_path / "model") == expected
    del tree["force_zeros_for_empty_prompt"]
    index.write_text(json.dumps(tree))
    assert family.unconditional(tmp_path / "model") is None  # the default of the pipeline's class
    index.write_text(json.dumps({**tree, "force_zeros_for_empty_prompt": "yes"}))
    with pytest.raises(ModelError, match=r"`force_zeros_for_empty_prompt` is 'yes'\. It must be true or false"):
        family.unconditional(tmp_path / "model")


def test_trained_text_encoders_leave_no_text_zeros_and_learn_nothing_of_it(tiny_models: Callable[[str], Path]) -> None:
    family, directory = models.get("sdxl"), tiny_models("sdxl")
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    cached = family.collate_texts(family.encode_texts(encoder, ["a fox", None]))
    model = load_model(family, directory, family.trainable_encoders, torch.float32, CPU)
    for module in model.encoders.values():
        module.requires_grad_(True)
    texts = models.encoded(model, {key: tensor.clone() for key, tensor in cached.items()})
    torch.testing.assert_close(texts["embeds"].detach(), cached["embeds"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(texts["pooled"].detach(), cached["pooled"], rtol=1e-5, atol=1e-6)
    (texts["embeds"][1].sum() + texts["pooled"][1].sum()).backward()
    assert not any(
        parameter.grad is not None and parameter.grad.any()
        for module in model.encoders.values()
        for parameter in module.parameters()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_run_file_sets_either_text(tiny_models: Callable[[str], Path], name: str) -> None:
    train, sample = {"caption_dropout": 0.1, "caption_dropout_text": "a picture"}, {"negative_prompt": "blurry"}
    run = run_of(name, train=train, sample=sample)
    assert (run.dropped_text(tiny_models(name)), run.negative_prompt(tiny_models(name))) == ("a picture", "blurry")
    written = run_of(name, train={"caption_dropout": 0.1, "caption_dropout_text": ""}, sample={"negative_prompt": ""})
    assert written.dropped_text(tiny_models(name)) == written.negative_prompt(tiny_models(name)) == ""


def test_a_text_for_captions_that_are_never_dropped_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="`caption_dropout_text` has no effect without `caption_dropout`"):
        run_of("sdxl", train={"caption_dropout_text": "x"})
