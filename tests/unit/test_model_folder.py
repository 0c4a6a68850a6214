"""Base models that are not in the plain Diffusers layout: variants, checkpoints in one file, and what the Hub has of both."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import single_files
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from ftk.cache.fingerprint import weights_digest
from ftk.cli import run as run_command
from ftk.configs.schema import ModelConfig
from ftk.errors import EnvironmentFault, ModelError
from ftk.models import base as models
from ftk.models.base import Conditions, load_model
from ftk.models.components import model_folder, weights
from ftk.run import load_run

CPU = torch.device("cpu")
FAMILIES = ["stable-diffusion", "sdxl"]


def components(family: str) -> tuple[str, ...]:
    found = models.get(family)
    return (*found.latent_components, *found.text_components, *found.denoiser_components)


def locate(family: str, path: Path, made: Path, names: Sequence[str] = (), **settings: Any) -> Path:
    config = ModelConfig(family=family, path=str(path), **settings)
    return model_folder.locate(models.get(family), config, names or components(family), made)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rename_weights(folder: Path, variant: str) -> None:
    for file in list(folder.glob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def shard(folder: Path, variant: str) -> None:
    """Two shards and their index under the names that diffusers gives those of a variant."""
    (file,) = folder.glob("*.safetensors")
    tensors, stem = load_file(file), file.stem
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard_name = f"{stem}.{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.{variant}.json").write_text(json.dumps(index))
    file.unlink()


def prediction(family: str, directory: Path) -> torch.Tensor:
    """What the model makes of fixed noise and a fixed text."""
    found = models.get(family)
    model = load_model(found, directory, (), torch.float32, CPU)
    texts = found.encode_texts(found.load_text_encoder(directory, torch.float32, CPU), ["a red fox"])
    noise = torch.randn(1, found.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return found.predict(model, noise, model.schedule.sigmas[500:501], Conditions(texts=found.collate_texts(texts)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_in_one_file_is_the_model_it_was_written_from(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    tiny = tiny_models(family)
    file = single_files.write(tiny, tmp_path / "model.safetensors")
    directory = locate(family, file, tmp_path / "made", config=str(tiny))
    for name in components(family):
        for weight in (tiny / name).glob("*.safetensors"):
            before, after = load_file(weight), load_file(directory / name / weight.name)
            assert before.keys() == after.keys()
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert torch.equal(prediction(family, directory), prediction(family, tiny))
    pipeline = models.get(family).pipeline(directory, torch.float32, CPU)
    assert torch.equal(
        pipeline.vae.decoder.conv_in.weight, load_file(next((tiny / "vae").glob("*.safetensors")))["decoder.conv_in.weight"]
    )


def test_a_transformer_in_one_file_takes_the_rest_from_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    for number, prefix in enumerate(("", "model.diffusion_model.", "diffusion_model.")):
        file = tmp_path / f"{number}.safetensors"
        save_file({prefix + name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, file)
        directory = locate("qwen-image", file, tmp_path / "made", config=str(tiny_model))
        converted = load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")
        assert {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}.keys() == converted.keys()
        assert all(torch.equal(tensor.to(torch.bfloat16), converted[name]) for name, tensor in tensors.items())
        for name in ("vae", "text_encoder", "tokenizer"):
            assert weights_digest(directory / name) == weights_digest(tiny_model / name)


def test_a_checkpoint_is_converted_once_in_its_own_precision(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_models("stable-diffusion")
    file = tmp_path / "half.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in single_files.original(tiny).items()}, file)
    directory = locate("stable-diffusion", file, tmp_path / "made", ["unet", "scheduler"], config=str(tiny))
    assert {tensor.dtype for tensor in load_file(directory / "unet/diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    assert not (directory / "vae").exists()
    with monkeypatch.context() as patch:
        patch.setattr(model_folder.single_file, "convert", lambda *_: pytest.fail("it is converted already"))
        assert locate("stable-diffusion", file, tmp_path / "made", ["unet"], config=str(tiny)) == directory
    assert locate("stable-diffusion", file, tmp_path / "made", ["vae"], config=str(tiny)) == directory
    assert (directory / "vae").is_dir()
    single_files.write(tiny, file)
    assert locate("stable-diffusion", file, tmp_path / "made", ["unet"], config=str(tiny)) != directory


@pytest.mark.parametrize("mark", ["tensors", "metadata"])
def test_the_objective_that_a_checkpoint_names_counts(tiny_models: Callable[[str], Path], tmp_path: Path, mark: str) -> None:
    tiny = tiny_models("sdxl")
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)} if mark == "tensors" else {}
    metadata = {"modelspec.prediction_type": "v"} if mark == "metadata" else None
    file = single_files.write(tiny, tmp_path / "v.safetensors", metadata, **marks)
    directory = locate("sdxl", file, tmp_path / "made", ["scheduler"], config=str(tiny))
    schedule = models.get("sdxl").load_schedule(directory)
    assert schedule.objective == "v"
    assert models.get("sdxl").load_schedule(tiny).objective == "epsilon"
    assert (float(schedule.sigmas[0]) == 1.0) == (mark == "tensors")


def test_text_encoders_under_older_names_are_found(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    tiny = tiny_models("stable-diffusion")
    clip = load_file(tiny / "text_encoder" / "model.safetensors")
    plain = single_files.original(tiny)
    ours = {name: tensor for name, tensor in plain.items() if not name.startswith("cond_stage_model.")}
    open_clip = {f"cond_stage_model.model.{name}": tensor for name, tensor in single_files.open_clip(clip).items()}
    forms = {
        "short": {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in plain.items()},
        "open": {**ours, **open_clip},
    }
    for name, tensors in forms.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        directory = locate(
            "stable-diffusion", tmp_path / f"{name}.safetensors", tmp_path / "made", ["text_encoder"], config=str(tiny)
        )
        converted = load_file(directory / "text_encoder" / "model.safetensors")
        assert all(torch.equal(tensor, converted[key]) for key, tensor in clip.items())


def test_a_file_that_is_not_such_a_checkpoint_is_refused_with_a_reason(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny, made = tiny_models("stable-diffusion"), tmp_path / "made"
    whole = single_files.original(tiny)

    def file(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        return tmp_path / name

    eighth = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in whole.items() if "diffusion_model" in name}
    lacking = {name: tensor for name, tensor in whole.items() if "output_blocks.0.0.in_layers.0" not in name}
    cut = file("cut.safetensors", whole)
    cut.write_bytes(cut.read_bytes()[:-100])
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"pickle")
    refused = {
        file("lora.safetensors", {"lora_unet_mid.lora_down.weight": torch.zeros(2)}): "is an adapter",
        file(
            "other.safetensors", {"double_blocks.0.weight": torch.zeros(2)}
        ): "holds none of the parts.*double_blocks.0.weight",
        file("fp8.safetensors", eighth): "quantised copy",
        file("part.safetensors", lacking): "its unet lacks tensors",
        file("xl.safetensors", single_files.original(tiny_models("sdxl"))): "SDXL checkpoint. Set model.family to sdxl",
        cut: "not a whole safetensors file",
        pickle: "Other formats",
        tmp_path / "cat.safetensors": "no such file. Did you mean `.*cut.safetensors`",
    }
    for path, reason in refused.items():
        with pytest.raises(ModelError, match=reason):
            locate("stable-diffusion", path, made, config=str(tiny))
    with pytest.raises(ModelError, match="not an SDXL checkpoint"):
        locate("sdxl", file("sd.safetensors", whole), made, config=str(tiny_models("sdxl")))
    with pytest.raises(ModelError, match=r"model\.config: .* holds a StableDiffusionXLPipeline"):
        locate("stable-diffusion", tmp_path / "sd.safetensors", made, config=str(tiny_models("sdxl")))
    with pytest.raises(ModelError, match=r"model\.config goes with a checkpoint in one file"):
        locate("stable-diffusion", tiny, made, config=str(tiny))
    with pytest.raises(ModelError, match=r"model\.variant: fp16: .* has no variants"):
        locate("stable-diffusion", tmp_path / "sd.safetensors", made, config=str(tiny), variant="fp16")


def test_a_checkpoint_without_its_configurations_ends_the_run_before_it_prepares(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    file = single_files.write(tiny_models("sdxl"), tmp_path / "model.safetensors")
    (tmp_path / "run.yaml").write_text(
        f"run: x\nworkspace: {tmp_path / 'work'}\nmodel: {{family: sdxl, path: {file}}}\n"
        f"data: {{sources: [{{path: {tmp_path}}}]}}\n"
    )
    with pytest.raises(EnvironmentFault, match=r"model\.config, by default stabilityai/stable-diffusion-xl-base-1\.0"):
        run_command.run_all(load_run(tmp_path / "run.yaml"))
    assert not (tmp_path / "work" / "prepared").exists()


@pytest.mark.parametrize("family", ["qwen-image", "sdxl"])
def test_a_folder_with_one_variant_alone_is_read_as_if_it_had_plain_names(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    tiny, found = tiny_models(family), models.get(family)
    folder = copied(tiny, tmp_path / "model")
    for name in components(family):
        rename_weights(folder / name, "fp16")
    directory = locate(family, folder, tmp_path / "made")
    for name in components(family):
        assert weights_digest(directory / name) == weights_digest(tiny / name)
    found.load_denoiser(directory, torch.float32, CPU)
    found.load_vae(directory, torch.float32, CPU)
    found.pipeline(directory, torch.float32, CPU)
    config = ModelConfig(family=family, path=str(folder))
    assert model_folder.local_components(found, config, found.denoiser_components, tmp_path / "made") == directory


def test_sharded_variants_and_those_of_some_components_are_read(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    tiny, found = tiny_models("sdxl"), models.get("sdxl")
    folder = copied(tiny, tmp_path / "model")
    shard(folder / "unet", "fp16")
    shard(folder / "text_encoder_2", "fp16")
    directory = locate("sdxl", folder, tmp_path / "made")
    assert weights_digest(directory / "vae") == weights_digest(tiny / "vae")
    expected, actual = (found.load_denoiser(each, torch.float32, CPU).state_dict() for each in (tiny, directory))
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    texts = [found.encode_texts(found.load_text_encoder(each, torch.float32, CPU), ["a"])[0] for each in (tiny, directory)]
    assert torch.equal(texts[0]["pooled"], texts[1]["pooled"])
    assert {path.name for path in weights.weight_files(directory / "unet", "diffusion_pytorch_model.safetensors")} == {
        f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)
    }


def test_of_several_variants_the_setting_chooses(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    tiny = tiny_models("stable-diffusion")
    folder = copied(tiny, tmp_path / "model")
    names = ["unet", "scheduler"]
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(plain)
    for variant, factor in (("fp16", 2), ("ema", 3)):
        changed = {name: factor * tensor for name, tensor in tensors.items()}
        save_file(changed, plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"), {"format": "pt"})

    def bias(**settings: str) -> torch.Tensor:
        directory = locate("stable-diffusion", folder, tmp_path / "made", names, **settings)
        return models.get("stable-diffusion").load_denoiser(directory, torch.float32, CPU).conv_in.bias

    assert locate("stable-diffusion", folder, tmp_path / "made", names) == folder
    assert torch.equal(bias(), tensors["conv_in.bias"])
    assert torch.equal(bias(variant="fp16"), 2 * tensors["conv_in.bias"])
    assert torch.equal(bias(variant="ema"), 3 * tensors["conv_in.bias"])
    with pytest.raises(ModelError, match=r"model\.variant: fp15: .* Variants found: ema, fp16. Did you mean `fp16`"):
        bias(variant="fp15")
    plain.unlink()
    with pytest.raises(ModelError, match=r"several variants and no plain weights. Set model\.variant to one of: ema, fp16"):
        bias()


def test_a_component_without_safetensors_is_named(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(tiny_models("stable-diffusion"), tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"vae has no weights as safetensors. Found: diffusion_pytorch_model\.bin"):
        locate("stable-diffusion", folder, tmp_path / "made")
    config = ModelConfig(family="stable-diffusion", path=str(folder))
    assert model_folder.local_components(models.get("stable-diffusion"), config, ["vae"], tmp_path / "made") == folder


def test_only_full_weights_of_the_named_components_are_downloaded(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(_: str, **arguments: Any) -> str:
        asked.update(arguments)
        return str(tiny_models("sdxl"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = ModelConfig(family="sdxl", path="somebody/some-sdxl")
    assert model_folder.locate(models.get("sdxl"), config, ("unet", "tokenizer_2"), tmp_path) == tiny_models("sdxl")
    wanted = [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer_2/merges.txt"),
        *("unet/diffusion_pytorch_model-00001-of-00009.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json"),
    ]
    others = [
        *("vae/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/model.onnx", "unet/model.onnx_data"),
        *("unet/openvino_model.bin", "unet/openvino_model.xml", "unet/diffusion_flax_model.msgpack", "sd_xl_base.safetensors"),
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


class Repository:
    """A Hub repository: `snapshot_download` copies what the patterns ask for out of a folder."""

    def __init__(self, files: Path, copy: Path) -> None:
        self.files, self.copy = files, copy

    def __call__(self, _: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files / name, self.copy / name)
        return str(self.copy)


def test_of_a_hub_repository_the_variant_is_downloaded_where_it_is_set_or_the_only_one(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = copied(tiny_models("sdxl"), tmp_path / "files")
    shard(files / "unet", "fp16")
    shutil.copyfile(files / "vae/diffusion_pytorch_model.safetensors", files / "vae/diffusion_pytorch_model.fp16.safetensors")
    (files / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"")

    def downloaded(number: int, **settings: str) -> list[str]:
        copy = tmp_path / f"copy{number}"
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Repository(files, copy))
        directory = locate("sdxl", Path("somebody/some-sdxl"), tmp_path / "made", ["unet", "vae"], **settings)
        assert (directory / "vae" / "diffusion_pytorch_model.safetensors").exists()
        models.get("sdxl").load_denoiser(directory, torch.float32, CPU)
        return sorted(path.name for path in copy.rglob("*") if path.suffix in (".safetensors", ".bin"))

    shards = [f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert downloaded(1) == [*shards, "diffusion_pytorch_model.safetensors"]
    assert downloaded(2, variant="fp16") == [*shards, "diffusion_pytorch_model.fp16.safetensors"]


def test_configurations_of_a_checkpoint_are_downloaded_without_the_weights_that_it_has(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_models("stable-diffusion")
    copy = tmp_path / "copy"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Repository(tiny, copy))
    file = single_files.write(tiny, tmp_path / "model.safetensors")
    directory = locate("stable-diffusion", file, tmp_path / "made")
    assert not list(copy.rglob("*.safetensors"))
    assert (copy / "unet" / "config.json").is_file()
    assert torch.equal(prediction("stable-diffusion", directory), prediction("stable-diffusion", tiny))
