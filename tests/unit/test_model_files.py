"""Model files that are damaged, wrong or not of each other: each is refused in words, before anything large is made."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ftk.errors import CheckpointError, FtkError, ModelError
from ftk.methods import base as methods
from ftk.methods.adapters import adapter_files, peft_directory
from ftk.models import base as models
from ftk.models.base import DENOISER, Family
from ftk.models.components import configuration, loading

CPU, META = torch.device("cpu"), torch.device("meta")
FAMILIES = ["qwen-image", "stable-diffusion", "sdxl"]
EXAMPLES = 8
VALUES = st.sampled_from(
    [
        *(None, True, "x", "", 0, -1, 1, 3, 10**9, 10**30, 0.5, -0.5, 1e9, 1e300, float("nan"), float("inf")),
        *([], {}, [0], [-1], [1e9], [10**9], ["x"], [None], [[1]], {"x": 1}, [8, 32], [1] * 100),
    ]
)


@pytest.fixture(scope="session")
def linked(tiny_models: Callable[[str], Path]) -> Callable[[str, Path], Path]:
    """A copy of a family's tiny model, its large files as links."""

    def link(family: str, target: Path) -> Path:
        for path in tiny_models(family).rglob("*"):
            if path.is_file():
                place = target / path.relative_to(tiny_models(family))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                os.link(path, place)
        return target

    return link


def replace(path: Path, tree: Any) -> None:
    path.unlink()
    path.write_text(json.dumps(tree))


def load_component(family: Family, directory: Path, component: str) -> None:
    """What the stages do with one component, from its shapes to what it computes."""
    family.check(directory)
    if component in family.latent_components:
        family.normalisation(directory)
        family.image_flops(directory, 64, 64)
        family.encode_images(family.load_vae(directory, torch.float32, CPU), torch.zeros(1, 3, 64, 64))
    elif component in family.text_components:
        family.text_flops(directory, 77)
        encoder = family.load_text_encoder(directory, torch.float32, CPU)
        family.encode_texts(encoder, ["a red fox"])
        family.tokens_cut(directory, ["a red fox"])
    elif component not in family.denoiser_components:
        family.pipeline(directory, torch.float32, CPU)
    else:
        schedule = family.load_schedule(directory)
        shapes = family.load_denoiser(directory, torch.float32, META)
        if component == "scheduler":
            family.pipeline(directory, torch.float32, CPU)
            return
        family.activations(shapes, 16, 77, torch.float32)
        model = models.Model(family=family, schedule=schedule, denoiser=family.load_denoiser(directory, torch.float32, CPU))
        width = 16 if family.name == "qwen-image" else 32 if family.name == "stable-diffusion" else 64
        texts = {"embeds": torch.zeros(1, 77, width), "pooled": torch.zeros(1, 16), "mask": None}
        noise = torch.zeros(1, family.geometry.channels, 8, 8)
        family.predict(model, noise, schedule.sigmas[:1], models.Conditions(texts=texts))


def configurations(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*.json") if path.stat().st_size < 1 << 20)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_configuration_of_a_model_is_read_or_refused(
    tiny_models: Callable[[str], Path], linked: Callable[[str, Path], Path], tmp_path: Path, name: str
) -> None:
    family = models.get(name)
    files = {path: json.loads((tiny_models(name) / path).read_text()) for path in configurations(tiny_models(name))}
    linked(name, tmp_path)
    for component in {path.parts[0] for path in files}:
        load_component(family, tmp_path, component)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(files)), "file")
        tree = copy.deepcopy(files[path])
        change(data, tree)
        linked(name, tmp_path)
        replace(tmp_path / path, tree)
        refused = outcome(family, tmp_path, path.parts[0])
        assert refused is None or (refused.exit_code == 2 and str(tmp_path) in str(refused))

    try_one()


def outcome(family: Family, directory: Path, component: str) -> FtkError | None:
    try:
        load_component(family, directory, component)
    except FtkError as error:
        return error
    return None


def change(data: st.DataObject, tree: Any) -> None:
    """Set, remove or add one value somewhere in a tree."""
    place = tree
    while True:
        if not place:
            return
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))), "key")
        inner = place[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans(), "inside"):
            place = inner
            continue
        if isinstance(place, dict) and data.draw(st.integers(0, 4), "how") == 0:
            del place[key]
        else:
            place[key] = data.draw(VALUES, "value")
        return


def lie(directory: Path, file: str, **settings: Any) -> None:
    tree = json.loads((directory / file).read_text())
    replace(directory / file, {**tree, **settings})


@pytest.fixture
def model(linked: Callable[[str, Path], Path], tmp_path: Path) -> Path:
    """A Stable Diffusion to be damaged."""
    return linked("stable-diffusion", tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "settings", "reason"),
    [
        ("vae/config.json", {"scaling_factor": "x"}, r"vae/config\.json: `scaling_factor` is 'x'. It must be a number above 0"),
        ("vae/config.json", {"scaling_factor": 0}, "`scaling_factor` is 0"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "`scaling_factor` is nan, which is not a finite number"),
        ("vae/config.json", {"block_out_channels": [1e9]}, "`block_out_channels` holds 1000000000.0, where a whole number"),
        ("vae/config.json", {"block_out_channels": [10**9] * 4}, r"describes a tensor \[1000000000, 3, 3, 3\]"),
        ("vae/config.json", {"act_fn": "nope"}, "could be built without `act_fn`, which is 'nope'"),
        ("vae/config.json", {"block_out_channels": [8, 8, 16, 16]}, r"conv_in\.weight is \[4, 3, 3, 3\] there.*\[8, 3, 3, 3\]"),
        ("vae/config.json", {"layers_per_block": 10**9}, "more layers than the [0-9]+ tensors beside it"),
        ("vae/config.json", {"layers_per_block": 2}, "lacks [0-9]+ of the tensors"),
        ("vae/config.json", {"_class_name": "AutoencoderKLWan"}, "`_class_name` is 'AutoencoderKLWan'"),
        ("unet/config.json", {"norm_num_groups": -4}, "`norm_num_groups` is -4. It must not be negative"),
        ("unet/config.json", {"norm_eps": "x"}, "`norm_eps` holds 'x', where a number is expected"),
        (
            "unet/config.json",
            {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
            "for which it has no layer",
        ),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "more layers than the [0-9]+ tensors beside it"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "for which it has no layer"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "lacks [0-9]+ of the tensors"),
        ("text_encoder/config.json", {"hidden_size": "x"}, "text_encoder cannot be loaded|hidden_size"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "between 1 and 100,000"),
        ("scheduler/scheduler_config.json", {"beta_end": 7.0}, "betas do not lie between 0 and 1"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "`beta_start` holds None, where a number is expected"),
        ("model_index.json", {"unet": ["os", "system"]}, r"`unet` is \['os', 'system'\]. It must name a library"),
        ("model_index.json", {"unet": ["diffusers", "NoSuchModel"]}, "NoSuchModel.*a class of it"),
    ],
)
def test_a_setting_that_lies_is_named_with_its_file(model: Path, file: str, settings: dict[str, Any], reason: str) -> None:
    lie(model, file, **settings)
    with pytest.raises(ModelError, match=reason) as caught:
        load_component(models.get("stable-diffusion"), model, Path(file).parts[0])
    assert str(model) in str(caught.value)


def test_what_published_configurations_have_is_accepted(model: Path) -> None:
    """A safety checker of the pipeline's own module, a class that is gone, settings that were not known yet."""
    index = json.loads((model / "model_index.json").read_text())
    others = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "requires_safety_checker": True,
    }
    replace(model / "model_index.json", {**index, **others})
    for name in ("safety_checker", "feature_extractor"):
        (model / name).mkdir()
        (model / name / "config.json").write_text("{}")
    lie(model, "unet/config.json", upcast_attention=None, attention_head_dim=[2, 2], pooled_projection_dim=768)
    family = models.get("stable-diffusion")
    family.check(model)
    family.load_denoiser(model, torch.float32, CPU)
    family.pipeline(model, torch.float32, CPU)


def test_files_that_are_no_settings_are_refused(model: Path) -> None:
    family = models.get("stable-diffusion")
    for name, content, reason in [
        ("model_index.json", "[" * 100_000, "nested too deep"),
        ("vae/config.json", "[" * 100_000, "nested too deep"),
        ("vae/config.json", "[1]", "holds a list instead of settings by name"),
        ("vae/config.json", '"' + "x" * (2 << 20) + '"', "more than any configuration"),
        ("tokenizer/tokenizer.json", "{", "cannot be loaded as a tokenizer"),
        ("tokenizer/tokenizer.json", "[" * 100_000, "cannot be loaded as a tokenizer"),
    ]:
        kept = (model / name).read_bytes()
        (model / name).unlink()
        (model / name).write_text(content)
        with pytest.raises(ModelError, match=reason):
            load_component(family, model, Path(name).parts[0])
        (model / name).write_bytes(kept)
    (model / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config\.json does not exist"):
        load_component(family, model, "vae")


def test_weights_that_lie_are_refused(model: Path) -> None:
    family, path = models.get("stable-diffusion"), model / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    claims = {**header, "conv_in.bias": {**header["conv_in.bias"], "data_offsets": [0, 1 << 50], "shape": [1 << 48]}}
    data = json.dumps(claims).encode()
    for content in (
        whole[:-10],
        whole[:4],
        (1 << 60).to_bytes(8, "little") + whole[8:],
        len(data).to_bytes(8, "little") + data,
    ):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors is not a whole safetensors file"):
            load_component(family, model, "unet")


def test_equal_files_are_compared_once_and_others_again(
    model: Path, linked: Callable[[str, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    plain, built = configuration._built, []
    monkeypatch.setattr(configuration, "_CHECKED", {})
    monkeypatch.setattr(configuration, "_built", lambda *arguments: built.append(arguments[1]) or plain(*arguments))
    other = linked("stable-diffusion", tmp_path / "equal")
    for directory in (model, model, other):
        assert configuration.checked(AutoencoderKL, directory / "vae").block_out_channels == [4, 4, 8, 8]
    assert built == [model / "vae"]
    path = other / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "encoder.conv_in.bias": torch.zeros(7)}, path)
    with pytest.raises(ModelError, match=r"encoder\.conv_in\.bias is \[7\] there"):
        configuration.checked(AutoencoderKL, other / "vae")
    lie(model, "vae/config.json", block_out_channels=[4, 4, 8, 16])
    with pytest.raises(ModelError, match="does not describe the weights beside it"):
        configuration.checked(AutoencoderKL, model / "vae")


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["new"] = len(tree["model"]["vocab"]) + 5
    replace(path, tree)
    with pytest.raises(ModelError, match=r"has a token number .* embeds 514 tokens"):
        load_component(models.get("stable-diffusion"), model, "tokenizer")


def test_older_names_of_attention_are_still_read(model: Path) -> None:
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    path.unlink()
    save_file(renamed, path, {"format": "pt"})
    vae = models.get("stable-diffusion").load_vae(model, torch.float32, CPU)
    assert torch.equal(vae.encoder.mid_block.attentions[0].to_q.weight, tensors["encoder.mid_block.attentions.0.to_q.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_weight_that_is_not_finite_is_named(model: Path, value: float) -> None:
    family = models.get("stable-diffusion")
    names = {"unet": "conv_in.weight", "vae": "decoder.conv_in.bias", "text_encoder": "final_layer_norm.weight"}
    for folder, name in names.items():
        (path,) = (model / folder).glob("*.safetensors")
        tensors = load_file(path)
        key = next(each for each in tensors if each.endswith(name))
        tensors[key].view(-1)[1] = value
        path.unlink()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ModelError, match=rf"{path}: 1 of the .* values of .*{name} are NaN or infinite"):
            load_component(family, model, folder)
    with pytest.raises(ModelError, match="are NaN or infinite"):
        family.pipeline(model, torch.float32, CPU)


def test_large_finite_weights_are_accepted() -> None:
    large = torch.full((100,), 3e38)
    assert loading.num_not_finite(large) == 0
    assert loading.num_not_finite(torch.full((100,), 6e4, dtype=torch.float16)) == 0
    assert loading.num_not_finite(torch.tensor([float("inf"), -float("inf"), 1.0])) == 2
    assert loading.num_not_finite(torch.arange(3)) == 0


@pytest.mark.parametrize("name", ["lora", "lokr", "oft"])
def test_an_adapter_that_is_not_finite_is_refused_when_it_is_loaded(
    tiny_models: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, method = models.get("stable-diffusion"), methods.get(name)
    directory = tiny_models("stable-diffusion")
    model = models.load_model(family, directory, (), torch.float32, CPU)
    settings = method.Config()
    method.attach(model, settings, 0)
    method.export(model, settings, methods.Export(directory=tmp_path, form=method.FORMATS[0], metadata={}))
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    key = sorted(tensors)[3]
    tensors[key].view(-1)[0] = float("nan")
    peft_directory.commit_tensors(path, tensors, {})
    with pytest.raises(CheckpointError, match=f"{path}: 1 of the .* values of {key} are NaN or infinite"):
        method.load_into(family, family.pipeline(directory, torch.float32, CPU), tmp_path)


def test_an_adapter_of_another_program_that_is_not_finite_is_refused(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    family = models.get("stable-diffusion")
    unet = family.load_denoiser(tiny_models("stable-diffusion"), torch.float32, META)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.full((32, 2), float("inf"))}
    path = tmp_path / "kohya.safetensors"
    save_file({f"{layer}.{name}": tensor for name, tensor in factors.items()}, path)
    with pytest.raises(CheckpointError, match=f"{path}: 64 of the 64 values of {layer}.lora_up.weight are NaN or infinite"):
        adapter_files.read(path, family, {DENOISER: unet}, "sample.adapters.0")
