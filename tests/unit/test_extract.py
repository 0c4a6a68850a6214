"""`ftk extract`: the factors against a direct decomposition, and the files in the pipelines that load them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ftk.deliver import extract, low_rank
from ftk.deliver.extract import ExtractConfig
from ftk.errors import CheckpointError, ConfigError, ModelError
from ftk.methods import base as methods
from ftk.models import base as families
from ftk.models.base import Conditions, Model

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_OF = {
    "diffusers": "pytorch_lora_weights.safetensors", "peft": "adapter_model.safetensors", "comfyui": "comfyui.safetensors",
}  # fmt: skip
RANK = 3
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]


def folder(family: Any, model: Path) -> Path:
    return model / family.denoiser_attribute


def add_low_rank(tensors: Tensors, ends: tuple[str, ...]) -> None:
    """Noise of rank `RANK` on the layers whose names end so."""
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(tuple(f"{end}.weight" for end in ends))]:
        weight = tensors[name]
        left, right = torch.randn(len(weight), RANK, generator=draw), torch.randn(RANK, weight[0].numel(), generator=draw)
        tensors[name] = weight + 0.02 * (left @ right).reshape(weight.shape)


@pytest.fixture
def tuned(tiny_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """(base, tuned) of a family: `change` is called with the denoiser's tensors, which it may change in place."""

    def make(name: str, change: Change) -> tuple[Path, Path]:
        family, base, path = families.get(name), tiny_models(name), tmp_path / f"tuned-{name}"
        shutil.copytree(base, path)
        file = folder(family, path) / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return base, path

    return make


def settings(pair: tuple[Path, Path], out: Path, **others: Any) -> ExtractConfig:
    base, path = pair
    return ExtractConfig(**{"family": "qwen-image", "base": str(base), "tuned": str(path), "out": out, "rank": RANK, **others})


def predict(name: str, denoiser: Any, directory: Path) -> torch.Tensor:
    family = families.get(name)
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    model = Model(family=family, schedule=family.load_schedule(directory), denoiser=denoiser.eval())
    texts = family.collate_texts(family.encode_texts(encoder, ["a red cat"]))
    noisy = torch.randn(1, family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.predict(model, noisy, torch.tensor([0.7]), Conditions(texts=texts))


def pipeline_of(name: str, model: Path) -> Any:
    family = families.get(name)
    return family.pipeline(model, torch.float32, CPU, **dict.fromkeys((*family.text_components, *family.latent_components)))


def denoiser_of(name: str, pipeline: Any) -> Any:
    return getattr(pipeline, families.get(name).denoiser_attribute)


def energies(before: torch.Tensor, after: torch.Tensor, rank: int) -> tuple[float, float]:
    """(squared norm of the change, of what a direct SVD of this rank leaves)."""
    values = torch.linalg.svdvals((after.double() - before.double()).flatten(1)).square()
    return float(values.sum()), float(values[rank:].sum())


CASES = [
    ("qwen-image", ("attn.to_q", "img_mlp.net.2", "proj_out")),
    ("stable-diffusion", ("to_k", "conv1", "conv_shortcut", "proj_in", "conv_out", "downsamplers.0.conv")),
]


@pytest.mark.parametrize(("name", "ends"), CASES)
@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui", "kohya"])
def test_a_change_of_low_rank_is_extracted_whole_in_every_format(
    tuned: Callable[..., tuple[Path, Path]], tmp_path: Path, name: str, ends: tuple[str, ...], form: str
) -> None:
    base, path = pair = tuned(name, lambda tensors: add_low_rank(tensors, ends))
    out = tmp_path / "lora"
    asked = settings(pair, out, family=name, form=form)
    report = extract.run(asked)
    assert report.energy > 1 - 1e-6
    assert report.left_out == []
    pipeline = pipeline_of(name, base)
    untouched = predict(name, denoiser_of(name, pipeline), base)
    if form == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(denoiser_of(name, pipeline), out)
    else:
        pipeline.load_lora_weights(out, weight_name=report.files[0])
    wanted = predict(name, denoiser_of(name, pipeline_of(name, path)), base)
    torch.testing.assert_close(predict(name, denoiser_of(name, pipeline), base), wanted, atol=1e-5, rtol=0)
    assert (untouched - wanted).abs().max() > 1e-2


def test_the_extract_of_a_merged_lora_is_that_lora(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Its own loader finds it, and each layer has the product that was merged."""
    base, _ = pair = tuned("qwen-image", lambda tensors: add_low_rank(tensors, ("attn.to_v",)))
    extract.run(settings(pair, tmp_path / "lora"))
    pipeline = pipeline_of("qwen-image", base)
    methods.get("lora").load_into(families.get("qwen-image"), pipeline, tmp_path / "lora")
    before, after = (load_file(one / "transformer" / WEIGHTS) for one in pair)
    layers = {name: module for name, module in pipeline.transformer.named_modules() if hasattr(module, "lora_A")}
    assert sorted(layers) == [f"transformer_blocks.{number}.attn.to_v" for number in (0, 1)]
    for name, layer in layers.items():
        (adapter,) = layer.lora_A
        product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(product.detach(), change, atol=1e-6, rtol=0)


def test_the_energy_is_that_of_a_direct_decomposition(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    name = "stable-diffusion"
    pair = tuned(name, lambda tensors: add_low_rank(tensors, ("to_q", "conv1", "time_emb_proj")))
    report = extract.run(settings(pair, tmp_path / "lora", family=name, rank=2))
    before, after = (load_file(folder(families.get(name), one) / WEIGHTS) for one in pair)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    direct = {key.removesuffix(".weight"): energies(before[key], after[key], 2) for key in changed}
    assert report.num_layers == len(direct)
    assert report.rank == "2"
    total, rest = (sum(one[place] for one in direct.values()) for place in (0, 1))
    assert report.energy == pytest.approx(1 - rest / total, abs=1e-5)
    assert 0.3 < report.energy < 0.99
    convolutions = [one for layer, one in direct.items() if layer.endswith("conv1")]
    (group,) = (one for one in report.groups if one.name == "conv1")
    alone = [one for layer, one in direct.items() if layer.endswith("conv1") and not layer.startswith("mid")]
    assert group.num_layers == len(alone) < len(convolutions)
    assert group.energy == pytest.approx(1 - sum(one[1] for one in alone) / sum(one[0] for one in alone), abs=1e-5)
    losses = [direct[one.name][1] for one in report.worst]
    assert losses == sorted((one[1] for one in direct.values()), reverse=True)[: len(losses)]


def test_a_convolution_has_its_kernel_in_a(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    pair = tuned("stable-diffusion", lambda tensors: add_low_rank(tensors, ("conv_in",)))
    extract.run(settings(pair, tmp_path / "lora", family="stable-diffusion"))
    tensors = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    weight = load_file(pair[0] / "unet" / WEIGHTS)["conv_in.weight"]
    assert tensors["unet.conv_in.lora_A.weight"].shape == (RANK, *weight.shape[1:])
    assert tensors["unet.conv_in.lora_B.weight"].shape == (len(weight), RANK, 1, 1)


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "peft"])
def test_energy_chooses_the_lowest_rank_of_each_layer(
    tuned: Callable[..., tuple[Path, Path]], tmp_path: Path, form: str
) -> None:
    def change(tensors: Tensors) -> None:
        add_low_rank(tensors, ("attn.to_q", "proj_out"))
        key = "transformer_blocks.1.attn.to_k.weight"
        tensors[key] = tensors[key] + torch.ones_like(tensors[key]) * 0.01

    base, _ = pair = tuned("qwen-image", change)
    out = tmp_path / "lora"
    report = extract.run(settings(pair, out, rank=8, energy=0.9, form=form))
    ranks = {one.name: int(one.rank) for one in report.worst}
    before, after = (load_file(one / "transformer" / WEIGHTS) for one in pair)
    for layer, rank in ranks.items():
        total, rest = energies(before[f"{layer}.weight"], after[f"{layer}.weight"], rank)
        assert rest <= 0.1 * total
        assert rank == 1 or energies(before[f"{layer}.weight"], after[f"{layer}.weight"], rank - 1)[1] > 0.1 * total
    assert ranks["transformer_blocks.1.attn.to_k"] == 1
    assert set(ranks.values()) == {1, 2, 3} or set(ranks.values()) == {1, 3}
    assert report.rank == "1 to 3"
    pipeline = pipeline_of("qwen-image", base)
    if form == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(pipeline.transformer, out)
    else:
        pipeline.load_lora_weights(out, weight_name=report.files[0])
    # Each layer at its own rank and strength: as the base with the products added.
    stored = load_file(out / WEIGHTS_OF[form])
    expected = pipeline_of("qwen-image", base).transformer
    prefix = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "peft": "base_model.model."}[form]
    with torch.no_grad():
        for layer in ranks:
            down, up = stored[f"{prefix}{layer}.lora_A.weight"], stored[f"{prefix}{layer}.lora_B.weight"]
            scale = float(stored[f"{prefix}{layer}.alpha"]) / len(down) if form == "comfyui" else 1.0
            expected.get_submodule(layer).weight += scale * up @ down
    torch.testing.assert_close(
        predict("qwen-image", pipeline.transformer, base), predict("qwen-image", expected, base), atol=1e-5, rtol=0
    )


def test_what_a_lora_cannot_hold_is_named_with_its_size(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        add_low_rank(tensors, ("attn.to_q", "attn.to_k"))
        for key in ("transformer_blocks.0.attn.norm_q.weight", "proj_out.bias", "transformer_blocks.1.attn.to_k.bias"):
            tensors[key] = tensors[key] * 1.5 + 0.1

    pair = tuned("qwen-image", change)
    report = extract.run(settings(pair, tmp_path / "lora", targets="[to_q]"))
    before, after = (load_file(one / "transformer" / WEIGHTS) for one in pair)
    found = {one.name: one for one in report.left_out}
    assert {name: one.num_tensors for name, one in found.items()} == {
        "attn.norm_q.weight": 1, "proj_out.bias": 1, "attn.to_k.bias": 1, "attn.to_k.weight": 2,
    }  # fmt: skip
    assert "RMSNorm's weight" in found["attn.norm_q.weight"].reason
    assert "bias" in found["proj_out.bias"].reason
    assert found["attn.to_k.weight"].reason == "not among --targets"
    key = "transformer_blocks.0.attn.norm_q.weight"
    assert found["attn.norm_q.weight"].change == pytest.approx(float((after[key] - before[key]).norm() / before[key].norm()))
    total = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    inside = sum(float((after[name] - before[name]).double().square().sum()) for name in before if "to_q.weight" in name)
    assert report.left_out_share == pytest.approx(1 - inside / total, rel=1e-5)


def test_another_component_that_differs_is_named(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    pair = tuned("stable-diffusion", lambda tensors: add_low_rank(tensors, ("to_q",)))
    file = next((pair[1] / "vae").glob("*.safetensors"))
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, {"format": "pt"})
    report = extract.run(settings(pair, tmp_path / "lora", family="stable-diffusion"))
    assert [(one.name, one.change) for one in report.left_out] == [("vae", None)]


ENCODERS = {"stable-diffusion": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("with_denoiser", [True, False])
def test_text_encoders_are_extracted_too(
    tuned: Callable[..., tuple[Path, Path]], tmp_path: Path, name: str, form: str, with_denoiser: bool
) -> None:
    base, path = pair = tuned(name, lambda tensors: add_low_rank(tensors, ("to_q",) if with_denoiser else ()))
    for encoder in ENCODERS[name]:
        file = path / encoder / "model.safetensors"
        tensors = load_file(file)
        # diffusers infers the form of a kohya file from out_proj.
        add_low_rank(tensors, ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"))
        key = next(key for key in tensors if key.endswith("final_layer_norm.bias"))
        save_file({**tensors, key: tensors[key] + 1e-6}, file, {"format": "pt"})
    out = tmp_path / "lora"
    report = extract.run(settings(pair, out, family=name, form=form))
    assert report.energy > 1 - 1e-6
    left_out = {one.name.replace("text_model.", "") for one in report.left_out}
    assert left_out == {f"{encoder}.final_layer_norm.bias" for encoder in ENCODERS[name]}
    assert {f"{encoder}.encoder.{kind}" for encoder in ENCODERS[name] for kind in ("self_attn.v_proj", "mlp.fc2")} <= {
        one.name.replace("text_model.", "") for one in report.groups
    }
    family = families.get(name)
    made, theirs = (family.pipeline(model, torch.float32, CPU, vae=None) for model in (base, path))
    if form == "peft":
        from peft import PeftModel

        for encoder in ENCODERS[name]:
            PeftModel.from_pretrained(getattr(made, encoder), out / encoder)
        if with_denoiser:
            PeftModel.from_pretrained(made.unet, out)
    else:
        made.load_lora_weights(out, weight_name=report.files[0])
    embeds, wanted = (
        pipeline.encode_prompt("a red cat", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        for pipeline in (made, theirs)
    )
    torch.testing.assert_close(embeds, wanted, atol=2e-5, rtol=0)
    untouched = family.pipeline(base, torch.float32, CPU, vae=None).encode_prompt(
        "a red cat", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    assert (untouched - wanted).abs().max() > 1e-3
    assert ("unet" in (out / "README.md").read_text()) or form != "peft"


def test_an_adapter_of_another_kind_becomes_a_lora(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """A LoKr of LyCORIS; and a file of another base is refused as everywhere."""
    base, layer = tiny_models("qwen-image"), "transformer_blocks.0.attn.to_q"
    out, into = load_file(base / "transformer" / WEIGHTS)[f"{layer}.weight"].shape
    draw = torch.Generator().manual_seed(2)
    factors = {"lokr_w1": torch.randn(2, 2, generator=draw), "lokr_w2": torch.randn(out // 2, into // 2, generator=draw)}
    file = tmp_path / "lokr.safetensors"
    save_file({f"lycoris_{layer.replace('.', '_')}.{name}": tensor for name, tensor in factors.items()}, file)
    report = extract.run(settings((base, file), tmp_path / "lora", rank=min(out, into)))
    assert report.energy > 1 - 1e-6
    stored = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    product = stored[f"transformer.{layer}.lora_B.weight"] @ stored[f"transformer.{layer}.lora_A.weight"]
    torch.testing.assert_close(product, torch.kron(factors["lokr_w1"], factors["lokr_w2"]), atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        extract.run(settings((tiny_models("sdxl"), file), tmp_path / "other", family="sdxl"))


def test_models_with_nothing_to_extract_are_refused(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="All their tensors are equal"):
        extract.run(settings(tuned("qwen-image", lambda tensors: None), tmp_path / "lora"))
    shutil.rmtree(tmp_path / "tuned-qwen-image")

    def only_a_bias(tensors: Tensors) -> None:
        tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1

    with pytest.raises(ModelError, match=r"only in what was not to be extracted:\n  proj_out.bias: a bias"):
        extract.run(settings(tuned("qwen-image", only_a_bias), tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def test_models_of_other_architectures_are_refused(
    tuned: Callable[..., tuple[Path, Path]], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="not the QwenImagePipeline"):
        extract.run(settings((tiny_models("qwen-image"), tiny_models("sdxl")), tmp_path / "lora"))

    def other(tensors: Tensors) -> None:
        tensors["proj_out.bias"] = torch.zeros(3)
        del tensors["img_in.bias"]

    with pytest.raises(ModelError, match=r"2 of \d+ tensors differ(.|\n)*img_in.bias: \d+ in the base, none in(.|\n)*proj_out"):
        extract.run(settings(tuned("qwen-image", other), tmp_path / "lora"))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"energy": 1.5}, "--energy 1.5"),
        ({"form": "lycoris"}, "LoCon"),
        ({"form": "gguf"}, "no delivery format 'gguf'"),
        ({"targets": "atention"}, "--targets: qwen-image has no group 'atention'. Did you mean `attention`"),
        ({"targets": "[to_x]"}, "--targets: 'to_x' is the name of no linear layer"),
        ({"targets": "{regex: '('}"}, "is not a regular expression"),
        ({"targets": "[to_q"}, "not valid YAML"),
    ],
)
def test_wrong_settings_are_refused(
    tuned: Callable[..., tuple[Path, Path]], tmp_path: Path, others: dict[str, Any], message: str
) -> None:
    pair = tuned("qwen-image", lambda tensors: add_low_rank(tensors, ("to_q",)))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        extract.run(settings(pair, tmp_path / "lora", **others))
    assert not (tmp_path / "lora").exists()


def test_no_number_and_damage_are_refused(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["proj_out.bias"] = tensors["proj_out.bias"] / 0

    pair = tuned("qwen-image", spoil)
    with pytest.raises(ModelError, match=r"proj_out\.bias holds what is no finite number"):
        extract.run(settings(pair, tmp_path / "lora"))
    (pair[1] / "transformer" / WEIGHTS).write_bytes(b"no header")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        extract.run(settings(pair, tmp_path / "lora"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(ConfigError, match="holds something already"):
        extract.run(settings(pair, tmp_path / "full"))


def test_large_matrices_are_decomposed_by_projection_as_well_as_directly() -> None:
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(1500, 1500, generator=draw))[0] for _ in range(2))
    values = 0.9 ** torch.arange(1500.0)
    matrix = left * values @ right
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    U, S, V = low_rank.largest_directions(matrix, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(S, values[:16], rtol=1e-4, atol=1e-6)
    rest = float((matrix - U * S @ V).square().sum())
    assert rest == pytest.approx(float(values[16:].square().sum()), rel=1e-3)
    assert torch.equal(low_rank.largest_directions(matrix, 16)[0], U)


def test_sharded_weights_and_a_folder_with_the_denoiser_alone(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, path = pair = tuned("qwen-image", lambda tensors: add_low_rank(tensors, ("to_q",)))
    extract.run(settings(pair, tmp_path / "one/lora"))
    tensors = load_file(path / "transformer" / WEIGHTS)
    (path / "transformer" / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, path / "transformer" / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (path / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (path / "model_index.json").unlink()
    report = extract.run(settings((base, path), tmp_path / "two/lora"))
    assert report.num_layers == 2
    files = [(tmp_path / name / "lora/pytorch_lora_weights.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_the_dtype_is_that_of_the_file(tuned: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    pair = tuned("qwen-image", lambda tensors: add_low_rank(tensors, ("to_q",)))
    report = extract.run(settings(pair, tmp_path / "lora", dtype="bfloat16"))
    with safe_open(tmp_path / "lora" / report.files[0], "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    # Measured on what was written: rounding costs a little.
    assert 1e-7 < 1 - report.energy < 1e-3
