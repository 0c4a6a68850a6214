"""Output preservation: the base model's own predictions stay as they were for other texts than those that are learned."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from ftk.cache import plan
from ftk.cache.store import CacheStore
from ftk.configs.schema import PreservationConfig
from ftk.deliver.run_delivery import RunDelivery
from ftk.models.base import Conditions, load_model
from ftk.run import load_run
from ftk.train.build import build_trainer
from ftk.train.hooks.recorder import read_metrics

CPU = torch.device("cpu")
REPLACE = {"red": "green", "red sun": "moon"}
TRAIN: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "learning_rate": 0.02, "caption_dropout": 0.3, "ema_decay": 0.5}


def preserving(**settings: Any) -> dict[str, Any]:
    return {**TRAIN, "loss": {"preservation": settings}}


def test_adding_preservation_encodes_its_texts_alone_and_the_rest_of_the_cache_stays(
    ftk: Any, cached: Any, tmp_path: Path
) -> None:
    run_file = cached()
    place = tmp_path / "work/cache"
    before = (place / "cache.json").read_text()
    assert "preserv" not in before
    setting = ["--set", "train.loss.preservation={prompt: a small dog}"]
    told = ftk("train", run_file, *setting)
    assert told.code == 2
    assert "train.loss.preservation.prompt:" in told.err
    assert "does not hold the texts of 'a small dog'. Run `ftk cache RUN.yaml`: it encodes those texts alone." in told.err
    report = json.loads(ftk("cache", run_file, *setting, "--json").out)
    assert (report["num_texts_encoded"], report["num_latents_encoded"]) == (1, 0)
    with closing(CacheStore.open(place)) as store:
        expected = store.item("texts", plan.text_id("a small dog"))
        for number, caption in ((0, 0), (3, 0), (0, -1)):
            text = store.preserved_text(number, caption)
            assert text is not None
            assert torch.equal(text["embeds"], expected["embeds"])
        # `ftk gc` keeps what it names.
        assert plan.text_id("a small dog") in store.named("texts").to_pylist()
    assert ftk("cache", run_file).code == 0
    after = (place / "cache.json").read_text()
    assert "preserv" not in after
    assert json.loads(after)["tables"]["samples"] == json.loads(before)["tables"]["samples"]


def test_words_of_captions_are_replaced_and_captions_without_them_take_no_part(ftk: Any, cached: Any, tmp_path: Path) -> None:
    run_file = cached(train=preserving(replace=REPLACE))
    texts = {path.stem: path.read_text().strip() for path in (tmp_path / "pictures").glob("*.txt")}
    with closing(CacheStore.open(tmp_path / "work/cache")) as store:
        none = 0
        for number in range(len(store)):
            caption = texts[store.sample(number).key.rpartition("-")[0]]
            replaced = caption.replace("red sun", "moon").replace("red", "green")
            assert store.text(number)["embeds"].equal(store.item("texts", plan.text_id(caption))["embeds"])
            kept = store.preserved_text(number, 0)
            if replaced == caption:
                none += 1
                assert kept is None
            else:
                assert kept is not None
                assert kept["embeds"].equal(store.item("texts", plan.text_id(replaced))["embeds"])
            # A dropped caption has no word to replace.
            assert store.preserved_text(number, -1) is None
        assert 0 < none < len(store)
    build = build_trainer(load_run(run_file), RunDelivery, device=CPU)
    with closing(build.inputs.store), closing(build.recorder):
        batches = [batch for index in range(3) for _, batch in build.loader.step(index).batches]
        parts = torch.cat([torch.zeros(len(batch)) if batch.preserved_B is None else batch.preserved_B for batch in batches])
        assert 0 < parts.sum() < len(parts)
        assert all(batch.preserved is None or batch.preserved_B.any() for batch in batches)


def test_words_that_no_caption_has_are_refused_with_the_nearest(ftk: Any, workspace: Any) -> None:
    run_file = workspace(train=preserving(replace={"purpel": "x"}))
    assert ftk("prepare", run_file).code == 0
    told = ftk("cache", run_file)
    assert told.code == 2
    message = " ".join(told.err.split())
    assert "train.loss.preservation.replace: none of the 12 captions has 'purpel'" in message
    assert "Did you mean `purple`?" in message
    told = ftk("cache", run_file, "--set", "train.loss.preservation.replace={purple: x}")
    assert told.code == 0
    assert "of 12 captions have none of 'purple', and nothing is preserved for them, such as" in " ".join(told.err.split())


def test_a_killed_run_ends_with_the_same_bytes_and_the_loss_begins_at_zero(ftk: Any, cached: Any, tmp_path: Path) -> None:
    run_file = cached(train=preserving(prompt="", weight=2.0, every=2), method={"name": "lora", "rank": 4, "dropout": 0.2})
    assert ftk("train", run_file, "--set", "run=whole").code == 0
    for steps in (2, 4):
        assert ftk("train", run_file, "--set", "run=part", "--set", f"train.steps={steps}").code == 0
    whole, part = (tmp_path / "work/runs" / name for name in ("whole", "part"))
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert (whole / "checkpoints/00000004" / name).read_bytes() == (part / "checkpoints/00000004" / name).read_bytes()
    first, second, third, fourth = (row["preservation_loss"] for row in read_metrics(whole))
    assert first == 0
    assert third > 0
    assert second is fourth is None
    shown = json.loads(ftk("inspect", whole, "--json").out)
    assert shown["preservation_loss"] == pytest.approx((first + third) / 2)
    assert "preservation loss" in ftk("inspect", whole).out
    assert ftk("inspect", whole, "--html", "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<dt>preservation loss, mean of 20 steps</dt>" in page
    assert f'"preservation":[0,null,{third:.5g},null]' in page.replace(" ", "")
    # Other texts or weights are another run; so is one without.
    for change in ("train.loss.preservation.weight=1", "train.loss.preservation=null"):
        told = ftk("train", run_file, "--set", "run=whole", "--set", change, "--set", "train.steps=6")
        assert told.code == 2
        assert "train.loss.preservation.weight: checkpoint 2.0" in told.err


def test_runs_without_preservation_write_what_they_wrote_before(ftk: Any, cached: Any, tmp_path: Path) -> None:
    run_file = cached(train={"steps": 1, "checkpoint_every": 1})
    assert ftk("train", run_file).code == 0
    run = tmp_path / "work/runs/test"
    assert "preservation" not in (run / "checkpoints/00000001/trainer.json").read_text()
    assert read_metrics(run)[0]["preservation_loss"] is None
    assert ftk("inspect", run, "--html", "--out", tmp_path / "page.html").code == 0
    assert "<dt>preservation loss" not in (tmp_path / "page.html").read_text()


def test_preserved_predictions_move_less(ftk: Any, cached: Any, tmp_path: Path) -> None:
    """Trained hard on a few captions, the prediction for another text drifts, and less so where it is preserved."""
    run_file = cached(train={**preserving(prompt="a dog", weight=10.0), "steps": 8, "caption_dropout": 0})
    moved = {}
    for name, change in (("plain", ["--set", "train.loss.preservation=null"]), ("kept", [])):
        assert ftk("train", run_file, "--set", f"run={name}", *change).code == 0
        run = load_run(run_file, [f"run={name}"])
        with closing(CacheStore.open(run.paths.cache)) as store:
            texts = run.family.collate_texts([store.preserved_text(0, 0)])
            noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        base = load_model(run.family, Path(run.config.model.path), (), torch.float32, CPU)
        pipeline = run.family.pipeline(Path(run.config.model.path), torch.float32, CPU)
        pipeline = run.method.load_into(run.family, pipeline, run.paths.adapter)
        with torch.no_grad():
            conditions, sigma = Conditions(texts=texts), torch.tensor([0.6])
            before = run.family.predict(base, noisy, sigma, conditions)
            base.denoiser = pipeline.transformer
            moved[name] = float((run.family.predict(base, noisy, sigma, conditions) - before).square().mean())
    assert moved["kept"] < moved["plain"] / 2


def test_a_longer_preserved_text_is_planned_for(ftk: Any, cached: Any) -> None:
    long = "a dog, " * 60
    run_file = cached(train=preserving(prompt=long))
    told = json.loads(ftk("train", run_file, "--dry-run", "--json").out)
    plain = json.loads(ftk("train", run_file, "--dry-run", "--json", "--set", "train.loss.preservation=null").out)
    assert told["activations"] != plain["activations"]
    assert any("train.loss.preservation predicts twice more" in reason for reason in told["reasons"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "full"}, "method full changes the base weights themselves, and what they were is not in memory."),
        ({"name": "lora", "initialisation": "olora"}, "olora has moved a part of the base weights into the adapter."),
        ({"name": "lora", "modules_to_save": ["proj_out"]}, "the modules of method.modules_to_save are trained whole"),
        ({"name": "oft", "bias": "oft_only"}, "biases of the base are trained too (method.bias)"),
        ({"name": "boft", "bias": "all"}, "biases of the base are trained too (method.bias)"),
    ],
)
def test_methods_that_change_the_base_are_refused_before_anything_is_read(
    ftk: Any, workspace: Any, method: Any, message: str
) -> None:
    run_file = workspace(train=preserving(prompt="a dog"), method=method)
    for command in ("prepare", "train"):
        told = ftk(command, run_file)
        assert told.code == 2
        assert message in " ".join(told.err.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of `prompt` (a text for all samples) and `replace` ({sks dog: dog}) is needed"),
        ({"prompt": "x", "replace": {"a": "b"}}, "one of `prompt`"),
        ({"replace": {"a": "a"}}, "'a' cannot be replaced by 'a'"),
        ({"replace": {" ": "a"}}, "' ' cannot be replaced by 'a'"),
        ({"prompt": "x", "weight": 0}, "greater than 0"),
        ({"prompt": "x", "evry": 2}, "Did you mean `every`?"),
        ({"promt": "x"}, "Did you mean `prompt`?"),
    ],
)
def test_wrong_settings_of_preservation_are_refused(ftk: Any, workspace: Any, settings: Any, message: str) -> None:
    told = ftk("prepare", workspace(train={"loss": {"preservation": settings}}))
    assert told.code == 2
    assert message in " ".join(told.err.split())


def test_whole_words_alone_are_replaced_the_longest_first() -> None:
    settings = PreservationConfig(replace={"sks": "a", "sks dog": "dog", "c++": "C"})
    assert settings.text("sks dog asks sks, c++ and sks dogs") == "dog asks a, C and a dogs"
    assert settings.text("it asks for Sks") is None
