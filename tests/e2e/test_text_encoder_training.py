"""A text encoder that is trained with its U-Net, as a user trains both: the recipe of orthogonal fine-tuning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftk.configs.load import RECIPES
from ftk.deliver import export
from ftk.demo import draw_pictures
from ftk.methods.adapters import injection
from ftk.models import base as models
from ftk.run import load_run, resolve
from ftk.train import inputs, memory

RECIPE = RECIPES / "stable-diffusion-oft.yaml"
METHOD_BY_FAMILY = {
    "stable-diffusion": {"name": "lora", "rank": 2, "dropout": 0.1, "text_encoder": {}},
    "sdxl": {"name": "lora", "rank": 2, "dropout": 0.1, "text_encoder": {"targets": "attention+mlp"}},
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_models, ftk):
    """The recipe on a tiny model and drawn pictures: prepared, cached and trained. Overrides, and the workspace."""
    root = tmp_path_factory.mktemp("oft")
    draw_pictures(root / "photos", 6)
    settings = {
        "workspace": root / "work",
        "model.path": tiny_models("stable-diffusion"),
        "data.sources": json.dumps([{"path": str(root / "photos")}]),
        "data.resolutions": "[64]",
        "method.num_cayley_neumann_terms": 8,
        "train.steps": 6,
        "train.learning_rate": 0.02,
        "train.checkpoint_every": 3,
        "train.precision": "fp32",
        "train.trackers": "[]",
        "train.schedule": "constant",
        "sample.every": 6,
        "sample.num_inference_steps": 2,
        "sample.width": 64,
        "sample.height": 64,
    }
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    for stage in ("prepare", "cache", "train"):
        done = ftk(stage, RECIPE, *overrides)
        assert done.code == 0, done.err
    return overrides, root / "work"


@pytest.fixture(scope="module")
def trained(scene):
    """The model with what was trained, and the plain one."""
    overrides, _ = scene
    run = load_run(RECIPE, overrides[1::2])
    directory = Path(run.config.model.path)
    plain = models.load_model(run.family, directory, run.encoders, torch.float32, torch.device("cpu"))
    with export.trained(run, directory, export.find_checkpoint(run, export.Choice())) as model:
        yield model, plain


def assert_equal_tensors(first, second):
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def rotations(module):
    """(name, W, W R) of each adapted layer, in fp64."""
    for name, layer in injection.adapted(module).items():
        plain = layer.get_base_layer().weight.detach().double().flatten(1)
        delta = layer.oft_R["default"].get_weight().detach().double()
        yield name, plain, delta


def test_both_components_learned_rotations_that_keep_the_angles_of_neurons(trained):
    model, _ = trained
    counts = {}
    for component, module in model.components.items():
        for name, weight, rotation in rotations(module):
            identity = torch.eye(len(rotation), dtype=torch.float64)
            assert (rotation - identity).abs().max() > 1e-3, f"{component}.{name} has learned nothing"
            torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-3, rtol=0)
            rotated = weight @ rotation
            cosines = [torch.nn.functional.normalize(rows) for rows in (weight, rotated)]
            torch.testing.assert_close(cosines[0] @ cosines[0].T, cosines[1] @ cosines[1].T, atol=1e-3, rtol=0)
        counts[component] = len(injection.adapted(module))
    # Of 2 layers with 6 each; of 4 attention blocks with 2 attentions of 4, 2 of the MLP, and 2 around them.
    assert counts == {"text_encoder": 12, "denoiser": 48}


def test_the_text_encoder_learns_at_its_own_rate(scene, trained):
    overrides, _ = scene
    groups = inputs.with_rates(load_run(RECIPE, overrides[1::2])).optimizer.groups
    assert [group.learning_rate for group in groups] == [0.01]


def test_what_is_delivered_is_both_adapters(scene):
    _, work = scene
    adapter = work / "runs/my-oft/adapter"
    for folder, module in ((adapter, "down_blocks"), (adapter / "text_encoder", "encoder.layers")):
        names = load_file(folder / "adapter_model.safetensors")
        assert names
        assert all(name.startswith("base_model.model.") and ".oft_R." in name for name in names)
        assert any(module in name for name in names)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    card = (adapter / "README.md").read_text()
    assert 'PeftModel.from_pretrained(pipeline.text_encoder, "path/to/this/folder/text_encoder")' in card


def test_it_resumes_to_the_same_bytes(scene, ftk):
    overrides, work = scene
    for steps in (3, 6):
        done = ftk("train", RECIPE, *overrides, "--set", "run=halves", "--set", f"train.steps={steps}")
        assert done.code == 0, done.err
    for file in ("adapter_model.safetensors", "text_encoder/adapter_model.safetensors"):
        assert_equal_tensors(*(work / "runs" / run / "adapter" / file for run in ("my-oft", "halves")))


def test_pictures_while_training_are_drawn_with_the_trained_text_encoder(scene, ftk):
    """As `ftk sample` draws them afterwards, through the pipeline's own text encoder with the adapter loaded."""
    overrides, work = scene
    done = ftk("sample", RECIPE, *overrides, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["mean_difference"] > 0.5
    import numpy as np
    from PIL import Image

    run = work / "runs/my-oft/samples"
    with Image.open(run / "step-00000006.png") as during, Image.open(run / "base-and-adapter.png") as after:
        size = 192
        cells = [np.asarray(sheet.convert("RGB"), dtype=int)[-size - 24 : -24] for sheet in (during, after)]
    drawn, (base, adapted) = cells[0][:, 12 : 12 + size], (cells[1][:, left : left + size] for left in (12, 24 + size))
    # The cache holds what the text encoder gave in half precision, the pipeline computes it anew.
    assert np.abs(drawn - adapted).mean() < 2
    assert np.abs(base - adapted).mean() > np.abs(drawn - adapted).mean()


def test_merging_folds_both_in_and_other_formats_are_refused_with_the_reason(scene, ftk, tmp_path):
    overrides, _ = scene
    done = ftk("merge", RECIPE, *overrides, "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["difference"] < 1e-5
    family = models.get("stable-diffusion")
    merged = family.pipeline(tmp_path / "merged", torch.float32, torch.device("cpu"))
    base = Path(load_run(RECIPE, overrides[1::2]).config.model.path)
    plain = family.pipeline(base, torch.float32, torch.device("cpu"))
    for name in ("unet", "text_encoder"):
        one, two = getattr(merged, name).state_dict(), getattr(plain, name).state_dict()
        assert one.keys() == two.keys()
        assert any((one[key] - two[key]).abs().max() > 1e-3 for key in one)
    done = ftk("export", RECIPE, *overrides, "--format", "kohya")
    assert done.code == 2
    assert "rotates a layer's outputs" in done.err
    assert "Merge it into the weights" in done.err


@pytest.mark.parametrize("family", METHOD_BY_FAMILY)
def test_lora_on_both_trains_resumes_and_draws(workspace, ftk, tiny_models, tmp_path, family):
    run_file = workspace(
        model={"family": family, "path": str(tiny_models(family))},
        method=METHOD_BY_FAMILY[family],
        train={"steps": 4, "checkpoint_every": 2, "learning_rate": 0.05, "precision": "fp32", "trackers": []},
        sample={"every": 4, "width": 64, "height": 64, "num_inference_steps": 1},
    )
    for stage in ("prepare", "cache", "train"):
        done = ftk(stage, run_file)
        assert done.code == 0, done.err
    for steps in (2, 4):
        assert ftk("train", run_file, "--set", "run=halves", "--set", f"train.steps={steps}").code == 0
    files = [tmp_path / "work/runs" / run / "adapter/pytorch_lora_weights.safetensors" for run in ("test", "halves")]
    assert_equal_tensors(*files)
    prefixes = {name.partition(".")[0] for name in load_file(files[0])}
    assert prefixes == {"unet", *models.get(family).trainable_encoders}
    assert ftk("sample", run_file).code == 0
    assert ftk("export", run_file, "--format", "kohya").code == 0


def test_a_model_whose_text_encoder_cannot_be_trained_is_told_so(workspace, ftk):
    run_file = workspace(method={"name": "lora", "text_encoder": {}})
    done = ftk("prepare", run_file)
    assert done.code == 2
    assert "method.text_encoder: the text encoder of qwen-image cannot be trained" in done.err


def test_the_memory_plan_counts_the_text_encoder(scene, ftk):
    overrides, _ = scene
    run = load_run(RECIPE, overrides[1::2])
    opened = inputs.open_inputs(run, torch.device("cpu"))
    parameters = [each.numel() for each in plain_encoder(run).parameters()]
    # Of 4 texts, 77 tokens, 2 layers 32 wide.
    activations = 4 * 4 * 77 * 2 * 32 * memory._ENCODER_WIDTHS
    # In fp32; what is trained of it has a gradient and moments beside.
    assert 4 * sum(parameters) < opened.sizes.plan.parts["text encoders"] - activations < 12 * sum(parameters)
    assert "text encoders" not in inputs.open_inputs(alone(run), torch.device("cpu")).sizes.plan.parts
    done = ftk("doctor", RECIPE, *overrides)
    assert done.code == 0, done.err
    assert "text encoders" in done.out


def plain_encoder(run):
    return run.family.load_encoder(Path(run.config.model.path), "text_encoder", torch.float32, torch.device("cpu"))


def alone(run):
    """The same run without its text encoder."""
    method = run.config.method.model_copy(update={"text_encoder": None})
    return resolve(run.config.model_copy(update={"method": method}))
