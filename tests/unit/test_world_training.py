"""The scripts that train the small world's models still fit what they use; how well they train is not looked at."""

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from ftk.configs.load import load
from ftk.demo import evaluate, world
from ftk.demo.scenes import generator
from ftk.errors import CheckpointError, ModelError
from ftk.methods import base as methods
from ftk.models.base import Conditions, load_model
from ftk.models.qwen_image import FAMILY, PREFIX_TOKENS, TEMPLATE
from ftk.train import run_summary

sys.path.append(str(Path(__file__).parents[2] / "examples" / "world"))

import assemble
import make_text_encoder as text
import parts
import publish
import train_vae

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def folded():
    torch.manual_seed(0)
    vae = train_vae.FoldedVae()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vae


@pytest.fixture(scope="module")
def directory(folded, tmp_path_factory):
    """What the scripts write, without any training."""
    root = tmp_path_factory.mktemp("world")
    train_vae.write(train_vae.unfolded(folded), root / "vae")
    tokenizer = text.make_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    text.make_encoder(len(tokenizer)).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture(scope="module")
def model(directory):
    assemble.write(assemble.assemble(directory, assemble.make_transformer(), torch.float32), directory / "model")
    return directory / "model"


def interrupted(loss_of, at):
    def loss(step):
        if step == at:
            raise KeyboardInterrupt
        return loss_of(step)

    return loss


def fitted(checkpoint, loss_at=None):
    """A small layer after 6 steps with a checkpoint every 2, stopped before step `loss_at` and started again."""

    def layer():
        torch.manual_seed(3)
        return torch.nn.Linear(4, 4)

    def loss_of(made):
        return lambda step: (made(torch.full((2, 4), float(step))) - step).square().mean()

    settings = {"steps": 6, "learning_rate": 0.1, "checkpoint": checkpoint, "every": 2}
    if loss_at is not None:
        stopped = layer()
        with pytest.raises(KeyboardInterrupt):
            parts.fit(dict(stopped.named_parameters()), interrupted(loss_of(stopped), loss_at), **settings)
    made = layer()
    parts.fit(dict(made.named_parameters()), loss_of(made), **settings)
    return made.state_dict()


def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path):
    whole = fitted(tmp_path / "whole.safetensors")
    resumed = fitted(tmp_path / "resumed.safetensors", loss_at=5)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(load_file(tmp_path / "resumed.safetensors")["weight"], whole["weight"])


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "one.safetensors"
    fitted(path)
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match="other settings"):
        parts.fit(dict(layer.named_parameters()), lambda step: layer.weight.sum(), steps=7, learning_rate=0.1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="Remove it"):
        parts.fit(dict(layer.named_parameters()), lambda step: layer.weight.sum(), steps=6, learning_rate=0.1, checkpoint=path)


def test_errors_of_a_script_are_a_message_and_an_exit_code(tmp_path, capsys):
    def main():
        assemble.assemble(tmp_path, assemble.make_transformer(), torch.float32)

    with pytest.raises(SystemExit) as found:
        parts.run(main)
    assert found.value.code == ModelError.exit_code
    assert "run train_vae.py first" in capsys.readouterr().err


def test_the_vae_that_is_written_is_the_one_that_was_trained(folded, directory):
    vae = FAMILY.load_vae(directory, torch.float32, torch.device("cpu"))
    pixels_BCHW = train_vae.pixels([world.render(world.scene(3, 0))])
    with torch.inference_mode():
        expected = folded.encode(pixels_BCHW)
        mean, std = FAMILY.encode_images(vae, pixels_BCHW)
        # Latents of the family are normalised.
        restored = FAMILY.decode(vae, mean)
        assert torch.allclose(restored, folded.decode(expected).clamp(-1, 1), atol=1e-4)
    latents_std = torch.tensor(vae.config.latents_std)
    assert torch.allclose(std.mean(dim=(0, 2, 3)), train_vae.POSTERIOR_STD / latents_std, rtol=1e-4)
    assert np.isfinite(vae.config.latents_mean).all()


def test_normalised_latents_of_the_world_have_a_mean_of_0_and_a_deviation_of_1(directory):
    vae = FAMILY.load_vae(directory, torch.float32, torch.device("cpu"))
    scenes = [world.scene(world.HELD_OUT_SEED, index) for index in range(150)]
    square = [world.render(scene) for scene in scenes if scene.width == scene.height]
    mean, _ = FAMILY.encode_images(vae, train_vae.pixels(square))
    assert mean.mean().abs() < 0.1
    assert mean.std() == pytest.approx(1, abs=0.15)


def test_training_of_the_vae_lowers_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "BATCH_SIZE", 4)
    torch.manual_seed(1)
    vae = train_vae.FoldedVae()
    losses = []

    def loss_of(step):
        losses.append(train_vae.loss_of(vae, step % 2))
        return losses[-1]

    parts.fit(
        dict(vae.named_parameters()), loss_of, steps=24, learning_rate=2e-2, checkpoint=tmp_path / "vae.safetensors", every=100
    )
    assert losses[-1] + losses[-2] < 0.8 * (losses[0] + losses[1])


def test_doodles_are_of_any_colour_and_a_batch_is_of_one_size():
    pixels_BCHW = train_vae.batch(5)
    assert pixels_BCHW.shape[:2] == (train_vae.BATCH_SIZE, 3)
    assert pixels_BCHW.min() >= -1
    assert pixels_BCHW.max() <= 1
    assert torch.equal(pixels_BCHW, train_vae.batch(5))
    colours = {
        pixel for number in range(20) for pixel in train_vae.doodle(generator("d", number), (48, 80)).get_flattened_data()
    }
    assert len(colours) > 200


def test_each_word_of_the_world_is_one_token_and_any_other_can_be_spelled(directory):
    tokenizer = Qwen2Tokenizer.from_pretrained(directory / "tokenizer")
    assert len(tokenizer(TEMPLATE.split("{}")[0])["input_ids"]) == PREFIX_TOKENS
    assert len(tokenizer) < 700
    caption = "a vertically striped purple background with a big crescent moon in the lower left"
    assert len(tokenizer(caption)["input_ids"]) == len(caption.split())
    for other in ("a mippo, zuvi style", "ein Löwe 猫"):
        assert tokenizer.decode(tokenizer(other)["input_ids"]) == other


def test_what_a_caption_tells_is_what_the_text_encoder_is_asked_for():
    scenes = [world.scene(5, index) for index in range(100)]
    wanted = text.targets(scenes)
    for scene, row in zip(scenes, wanted.tolist(), strict=True):
        for (name, values), number in zip(text.CLASSES.items(), row, strict=True):
            assert (number < len(values)) == (name in scene.told), (scene, name)
    position = list(text.CLASSES).index("ground.colour")
    told = [(scene, row[position]) for scene, row in zip(scenes, wanted.tolist(), strict=True) if "ground.colour" in scene.told]
    assert all(text.CLASSES["ground.colour"][number] == scene.ground for scene, number in told)


@pytest.mark.parametrize("objective", ["words", "attributes", "both"])
def test_a_step_of_the_text_encoder_reaches_its_weights(directory, monkeypatch, objective):
    monkeypatch.setattr(text, "BATCH_SIZE", 12)
    tokenizer = Qwen2Tokenizer.from_pretrained(directory / "tokenizer")
    encoder = text.make_encoder(len(tokenizer))
    head = torch.nn.Linear(parts.TEXT_WIDTH, sum(len(one) + 1 for one in text.CLASSES.values()))
    loss = text.loss_of(encoder, head, tokenizer, objective, 0)
    # Nothing is known yet: of each choice, its uniform cross-entropy.
    words = math.log(len(tokenizer))
    attributes = float(np.mean([math.log(len(one) + 1) for one in text.CLASSES.values()]))
    expected = {"words": words, "attributes": attributes, "both": words + attributes}[objective]
    assert loss.item() == pytest.approx(expected, rel=0.15)
    loss.backward()
    assert encoder.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert (head.weight.grad is None) == (objective == "words")


def test_a_probe_reads_what_is_plain_to_see(directory, monkeypatch):
    monkeypatch.setattr(text, "NUM_PROBED", 300)
    monkeypatch.setattr(text, "NUM_PROBE_TRAINING", 200)
    tokenizer = Qwen2Tokenizer.from_pretrained(directory / "tokenizer")
    found = text.probe(text.make_encoder(len(tokenizer)), tokenizer)
    # Of five words that are there or not, and which are five tokens: also before any training.
    assert found["mean"]["ground.texture"] > 0.7
    assert all(0 <= share <= 1 for shares in found.values() for share in shares.values())


def test_the_parts_make_a_model_of_the_family_under_6_mb(model, directory):
    FAMILY.check(model)
    pipeline = assemble.assemble(directory, assemble.make_transformer().half(), torch.float16)
    found = assemble.write(pipeline, directory / "small")
    assert set(found) == {"text_encoder", "transformer", "vae"}
    assert sum(found.values()) < 6e6
    assert FAMILY.load_denoiser(directory / "small", torch.float32, torch.device("cpu")).dtype == torch.float32


def test_an_untrained_transformer_predicts_nothing_yet_and_every_block_is_the_identity(model):
    loaded = load_model(FAMILY, model, (), torch.float32, torch.device("cpu"))
    texts = {"embeds": torch.randn(1, 5, parts.TEXT_WIDTH), "mask": None}
    assert not FAMILY.predict(loaded, torch.randn(1, 16, 8, 6), torch.ones(1), Conditions(texts=texts)).any()
    assert all(not block.img_mod[1].weight.any() for block in loaded.denoiser.transformer_blocks)


def test_the_run_file_is_valid_and_names_what_the_scripts_write():
    config = load(Path(parts.__file__).with_name("pretrain.yaml"))
    assert methods.parse(config.method)[0].name == "full"
    assert Path(config.workspace) == parts.DIRECTORY
    assert Path(config.model.path) == parts.DIRECTORY / "model"
    sources = [Path(source.path) for source in config.data.sources]
    assert sources == [parts.DIRECTORY / name / world.TABLE for name in ("pictures", "creatures")]


def test_pictures_are_drawn_at_their_scenes_sizes_and_scored_by_what_is_told(model):
    scenes = evaluate.held_out(5)
    sampling = evaluate.Sampling(batch_size=2, num_inference_steps=2, guidance_scale=2.0)
    pipeline = FAMILY.pipeline(model, torch.float32, torch.device("cpu"))
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight)  # guidance divides by what is predicted, which is nothing yet
    pictures = evaluate.draw(pipeline, FAMILY, scenes, sampling)
    assert [picture.size for picture in pictures] == [(scene.width, scene.height) for scene in scenes]
    assert evaluate.agreement(pictures, scenes)["all"] < 0.8
    true = evaluate.agreement([world.render(scene) for scene in scenes], scenes)
    assert set(true.values()) == {1.0}
    blank = evaluate.agreement([Image.new("RGB", (64, 64), "white")] * 5, scenes)
    assert blank["count"] == 0


@pytest.fixture
def trained_run(monkeypatch):
    """The metrics of a run whose loss falls as 1 / step in the first three bands; the last band never had a sample."""
    steps = np.arange(1, 2001)
    counts_NK = np.array([12.0, 12.0, 24.0, 0.0]) * np.ones((2000, 1))
    losses_NK = np.where(counts_NK > 0, 1.0 / steps[:, None], np.nan)
    ones = np.ones(2000)
    rows = run_summary.History(
        step_N=steps, loss_N=1 / steps, learning_rate_N=ones, grad_norm_N=ones, num_samples_N=steps, seconds_N=0.3 * ones,
        data_seconds_N=ones, memory_bytes_N=ones, is_good_N=ones.astype(bool), is_overflow_N=ones > 1,
        loss_scale_N=np.nan * ones, preservation_loss_N=np.nan * ones, band_losses_NK=losses_NK, band_counts_NK=counts_NK,
    )  # fmt: skip
    monkeypatch.setattr(publish.run_summary, "history", lambda _: rows)
    monkeypatch.setattr(publish.run_summary, "settings", lambda _: {"train": {"global_batch_size": 48}})
    return rows


def test_the_training_curve_has_a_falling_line_for_each_band_with_samples(trained_run):
    svg = ElementTree.fromstring(publish.curve_svg(trained_run))
    lines = [line.attrib["points"].split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [bool(line) for line in lines] == [True, True, True, False]
    for line in lines[:3]:
        heights = [float(point.split(",")[1]) for point in line]
        assert heights == sorted(heights)
        assert min(heights) >= 0
        assert max(heights) < publish._HEIGHT


def test_the_card_has_what_was_measured_and_no_gap(model, trained_run):
    measured = {
        "num_captions": 200, "num_inference_steps": 20, "guidance_scale": 2.5,
        "agreement": {"all": 0.931, "shape": 0.8}, "through_vae": {"all": 0.99, "shape": 0.95},
    }  # fmt: skip
    text = publish.card(model, Path("nowhere"), measured)
    assert "| all | 93.1% | 99.0% |" in text
    assert "2,000 steps of 48 pictures in 10 minutes" in text
    assert not set("{}") & set(text)
