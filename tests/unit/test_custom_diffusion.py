"""Custom Diffusion against diffusers: predictions and gradients of its attention processors, and the files that it loads."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file

from ftk.configs import load
from ftk.configs.schema import MethodConfig, RunConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import attention_files, injection, trained_words
from ftk.methods.base import Export
from ftk.methods.custom_diffusion import compressed
from ftk.models import base as families
from ftk.models.base import Conditions
from ftk.train import placement

CPU = torch.device("cpu")
UNETS = ("stable-diffusion", "sdxl")
each_unet = pytest.mark.parametrize("family_name", UNETS)


class Case:
    """The method on a tiny model, with noise on what it trains; and what is needed to predict with it."""

    def __init__(self, family_name: str, directory: Path, text: Any, noise: float = 0.1, **settings: Any) -> None:
        self.family = families.get(family_name)
        self.directory = directory
        self.method, self.settings = methods.parse(MethodConfig(name="custom-diffusion", **settings))
        self.model = families.load_model(self.family, directory, (), torch.float32, CPU)
        self.base = {name: weight.clone() for name, weight in self.model.denoiser.state_dict().items()}
        self.parameters = self.method.attach(self.model, self.settings, 1)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += noise * torch.randn(parameter.shape, generator=draw)
        self.texts = self.family.collate_texts([text])
        self.texts["embeds"].requires_grad_()

    def predict(self, denoiser: Any = None) -> torch.Tensor:
        noisy_BCHW = torch.randn(1, self.family.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(3))
        model = self.model if denoiser is None else dataclasses.replace(self.model, denoiser=denoiser)
        return self.method.predict(model, noisy_BCHW, self.model.schedule.sigmas[[500]], Conditions(texts=self.texts))

    def gradients(self, denoiser: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction, and the gradient of the text; those of the weights are with them."""
        self.texts["embeds"].grad = None
        prediction = self.predict(denoiser)
        prediction.square().sum().backward()
        return prediction, self.texts["embeds"].grad.clone()

    def export(self, directory: Path, form: str | None = None) -> Path:
        form = form or methods.formats(self.method, self.settings)[0]
        (path,) = (
            path
            for path in self.method.export(self.model, self.settings, Export(directory=directory, form=form, metadata={}))
            if path.suffix == ".safetensors"
        )
        return path

    def pipeline(self) -> Any:
        absent = dict.fromkeys((*self.family.text_components, *self.family.latent_components))
        return self.family.pipeline(self.directory, torch.float32, CPU, **absent)


@pytest.fixture(scope="module")
def case(tiny_models: Callable[[str], Path]) -> Callable[..., Case]:
    """Attach the method to a family's tiny model: takes the family and the settings."""
    texts: dict[str, Any] = {}

    def make(family_name: str = "stable-diffusion", **settings: Any) -> Case:
        directory = tiny_models(family_name)
        if family_name not in texts:
            family = families.get(family_name)
            encoder = family.load_text_encoder(directory, torch.float32, CPU)
            texts[family_name] = family.encode_texts(encoder, ["a cat on a chair"])[0]
        text = {name: tensor.clone() for name, tensor in texts[family_name].items()}
        return Case(family_name, directory, text, **settings)

    return make


def with_processors(denoiser: Any, *, trains_queries: bool) -> Any:
    """Put diffusers' processors into a U-Net, as its training script does, with the U-Net's own weights."""
    processors = {}
    for name in denoiser.attn_processors:
        attention = denoiser.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn1.processor"):
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        made = CustomDiffusionAttnProcessor(
            train_q_out=trains_queries,
            hidden_size=attention.to_q.in_features,
            cross_attention_dim=attention.to_k.in_features,
        )
        weights = {f"{layer}_custom_diffusion.weight": getattr(attention, layer).weight for layer in ("to_k", "to_v")}
        if trains_queries:
            weights["to_q_custom_diffusion.weight"] = attention.to_q.weight
            weights |= {f"to_out_custom_diffusion.0.{key}": each for key, each in attention.to_out[0].named_parameters()}
        made.load_state_dict(weights)
        processors[name] = made
    denoiser.set_attn_processor(processors)
    return denoiser


@each_unet
@pytest.mark.parametrize("targets", ["text-kv", "cross-attention"])
def test_predictions_and_gradients_are_those_of_diffusers_processors(
    case: Callable[..., Case], family_name: str, targets: str
) -> None:
    ours = case(family_name, targets=targets)
    theirs = ours.family.load_denoiser(ours.directory, torch.float32, CPU)
    theirs.load_state_dict(ours.model.denoiser.state_dict())
    with_processors(theirs, trains_queries=targets == "cross-attention")
    prediction, text_gradient = ours.gradients()
    expected, expected_text_gradient = ours.gradients(theirs)
    torch.testing.assert_close(prediction, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(text_gradient, expected_text_gradient, atol=1e-4, rtol=1e-4)
    trained = {
        name.replace(".processor.", ".").replace("_custom_diffusion", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "custom_diffusion" in name
    }
    assert trained.keys() == ours.parameters.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(ours.parameters[name].grad, gradient, atol=1e-4, rtol=1e-4, msg=name)


@each_unet
def test_a_new_words_vectors_get_the_gradient_that_diffusers_script_gives_them(
    tiny_models: Callable[[str], Path], family_name: str
) -> None:
    """`examples/custom_diffusion` trains the embedding table through the processors, and puts all other rows to zero."""
    family: Any = families.get(family_name)
    directory = tiny_models(family_name)
    words = {"tokens": {"<new1>": "!", "<new2>": {"start": "a b", "vectors": 2}}}
    method, settings = methods.parse(MethodConfig(name="custom-diffusion", words=words))
    model = families.load_model(family, directory, method.encoders(family, settings), torch.float32, CPU)
    parameters = method.attach(model, settings, 0)
    encoder = family.load_text_encoder(directory, torch.float32, CPU)
    family.add_tokens(encoder, settings.words.words)
    item = family.encode_texts(encoder, ["a photo of <new1> beside <new2>"])[0]
    conditions = Conditions(texts=family.collate_texts([{name: tensor.clone() for name, tensor in item.items()}]))
    noisy_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sigma_B = model.schedule.sigmas[[500]]
    ours = method.predict(model, noisy_BCHW, sigma_B, conditions)
    ours.square().sum().backward()

    unet = with_processors(family.load_denoiser(directory, torch.float32, CPU), trains_queries=False)
    encoders = dict(zip(family.token_encoders, getattr(encoder, "models", None) or (encoder.model,), strict=True))
    for each in encoders.values():
        each.get_input_embeddings().weight.requires_grad_()
    theirs = family.predict(dataclasses.replace(model, denoiser=unet, encoders=encoders), noisy_BCHW, sigma_B, conditions)
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    for name, each in encoders.items():
        gradient = parameters[f"{name}.{trained_words.ROWS}"].grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, each.get_input_embeddings().weight.grad[-3:], atol=1e-5, rtol=1e-3)


def test_a_merged_encoder_finds_the_end_of_a_text_by_its_number(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    family = families.get("sdxl")
    method, settings = methods.parse(MethodConfig(name="custom-diffusion", words={"tokens": {"<new1>": "!"}}))
    model = families.load_model(family, tiny_models("sdxl"), method.encoders(family, settings), torch.float32, CPU)
    encoder = model.encoders["text_encoder_2"]
    expected, encoder.config.eos_token_id = encoder.config.eos_token_id, 2
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2  # as published: the highest token is taken for the end, and a new one is higher
    rows = method.attach(model, settings, 0)[f"text_encoder_2.{trained_words.ROWS}"]
    torch.nn.init.ones_(rows)
    method.merge(model)
    encoder.save_pretrained(tmp_path)
    merged = type(encoder).from_pretrained(tmp_path)
    assert merged.config.eos_token_id == expected
    assert torch.equal(merged.get_input_embeddings().weight[-1], rows[0])


def test_the_first_tokens_keys_and_values_pass_no_gradient(case: Callable[..., Case]) -> None:
    trained = case()
    _, gradient = trained.gradients()
    # What is not held would have passed one to the first token too.
    for name in injection.trained(trained.model.denoiser):
        trained.model.denoiser.get_submodule(name.removesuffix(".weight"))._forward_hooks.clear()
    _, without = trained.gradients()
    assert gradient[0, 0].abs().max() == 0 < without[0, 0].abs().max()
    assert gradient[0, 1:].abs().max() > 0


def test_a_low_rank_change_gets_the_gradient_of_the_whole_matrix(case: Callable[..., Case]) -> None:
    low, whole = case(rank=2), case(noise=0.0)
    with torch.no_grad():
        for name, parameter in whole.parameters.items():
            parameter += low.model.denoiser.get_submodule(name.removesuffix(".weight")).get_delta_weight(injection.ADAPTER)
    torch.testing.assert_close(low.gradients()[1], whole.gradients()[1], atol=1e-5, rtol=1e-4)
    for name, parameter in whole.parameters.items():
        layer = low.model.denoiser.get_submodule(name.removesuffix(".weight"))
        A, B = layer.lora_A[injection.ADAPTER].weight, layer.lora_B[injection.ADAPTER].weight
        torch.testing.assert_close(B.grad, parameter.grad @ A.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(A.grad, B.T @ parameter.grad, atol=1e-5, rtol=1e-4)


def test_of_a_transformer_the_matrices_of_the_text_are_trained_for_every_token(case: Callable[..., Case]) -> None:
    trained = case("qwen-image")
    assert all(name.endswith(("add_k_proj.weight", "add_v_proj.weight")) for name in trained.parameters)
    _, gradient = trained.gradients()
    assert gradient[0, 0].abs().max() > 0


@each_unet
@pytest.mark.parametrize("targets", ["text-kv", "cross-attention"])
def test_the_file_is_loaded_by_diffusers_and_draws_the_same(
    case: Callable[..., Case], family_name: str, targets: str, tmp_path: Path
) -> None:
    trained = case(family_name, targets=targets)
    path = trained.export(tmp_path)
    assert path.name == "pytorch_custom_diffusion_weights.safetensors"
    pipeline, loaded = trained.pipeline(), trained.pipeline()
    pipeline.unet.load_attn_procs(tmp_path, weight_name=path.name, _pipeline=pipeline)
    assert {type(each) for each in pipeline.unet.attn_processors.values()} == {CustomDiffusionAttnProcessor}
    trained.method.load_into(trained.family, loaded, tmp_path)
    embeds = trained.texts["embeds"].detach()
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
    if family_name == "sdxl":
        pooled = trained.texts["pooled"]
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
    latents = [
        each(**given, latents=torch.ones(1, 4, 8, 8), num_inference_steps=3, height=64, width=64, output_type="latent").images
        for each in (pipeline, loaded, trained.pipeline())
    ]
    torch.testing.assert_close(latents[0], latents[1], atol=2e-5, rtol=1e-5)
    assert (latents[0] - latents[2]).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(trained.predict(pipeline.unet), trained.predict(), atol=2e-5, rtol=1e-5)


def test_without_its_hidden_argument_diffusers_changes_nothing(case: Callable[..., Case], tmp_path: Path) -> None:
    trained = case()
    path = trained.export(tmp_path)
    pipeline = trained.pipeline()
    pipeline.unet.load_attn_procs(tmp_path, weight_name=path.name)
    assert CustomDiffusionAttnProcessor not in {type(each) for each in pipeline.unet.attn_processors.values()}, (
        "diffusers has mended it: the model card and docs/methods.md need not name `_pipeline` any more"
    )


def test_the_file_of_a_transformer_holds_its_own_tensors(case: Callable[..., Case], tmp_path: Path) -> None:
    trained = case("qwen-image")
    tensors = load_file(trained.export(tmp_path))
    assert tensors.keys() == trained.parameters.keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in trained.parameters.items())


@pytest.mark.parametrize("settings", [{}, {"energy": 0.6}, {"rank": 2, "energy": 0.6}])
def test_what_sharding_makes_of_the_blocks_does_not_matter(
    case: Callable[..., Case], settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, wrapped = case("qwen-image", **settings), case("qwen-image", **settings)
    for block in wrapped.model.denoiser.transformer_blocks:
        # As fully_shard does.
        block.__class__ = type("FSDPBlock", (type(block),), {})
    assert wrapped.export(tmp_path / "wrapped").read_bytes() == plain.export(tmp_path / "plain").read_bytes()


def reference(change_OI: torch.Tensor, share: float) -> torch.Tensor:
    """What is left of a compressed change by the reference code, which adds up values until their share is passed."""
    u, s, v = torch.linalg.svd(change_OI)
    explained = 0.0
    for number, value in enumerate(s):  # noqa: B007
        explained += float(value / s.sum())
        if explained > share:
            break
    return u[:, :number] @ torch.diag(s)[:number, :number] @ v[:number]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_change_is_compressed_as_the_reference_code_does(share: float, shape: tuple[int, int]) -> None:
    change_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = compressed(change_OI, share)
    torch.testing.assert_close(factors.B @ factors.A, reference(change_OI, share), atol=1e-5, rtol=1e-5)


def test_of_a_change_at_least_one_singular_value_remains() -> None:
    # The reference code would deliver nothing of the first.
    one = torch.outer(torch.arange(1.0, 4.0), torch.ones(5))
    torch.testing.assert_close(compressed(one, 0.5).B @ compressed(one, 0.5).A, one)
    none = compressed(torch.zeros(3, 5), 0.5)
    assert torch.equal(none.B @ none.A, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("family_name", "settings", "form"),
    [
        ("stable-diffusion", {}, "diffusers"),
        ("sdxl", {"rank": 4}, "peft"),
        ("sdxl", {"rank": 4, "targets": "cross-attention"}, "diffusers"),
        ("qwen-image", {}, "peft"),
    ],
)
def test_compressed_changes_are_a_lora_that_diffusers_and_peft_load(
    case: Callable[..., Case], family_name: str, settings: dict[str, Any], form: str, tmp_path: Path
) -> None:
    trained = case(family_name, **settings, energy=0.6)
    trained.export(tmp_path, form)
    pipeline = trained.pipeline()
    if form == "diffusers":
        trained.method.load_into(trained.family, pipeline, tmp_path)
    else:
        methods.get("lora").load_into(trained.family, pipeline, tmp_path)
    denoiser = getattr(pipeline, trained.family.denoiser_attribute)
    layers = injection.adapted(denoiser)
    for name in [key.partition(".lora_")[0].removesuffix(".weight") for key in trained.parameters]:
        layer = trained.model.denoiser.get_submodule(name)
        change = (
            layer.get_delta_weight(injection.ADAPTER) if settings.get("rank") else layer.weight - trained.base[f"{name}.weight"]
        )
        delivered = layers[name].get_delta_weight(injection.ADAPTER)
        torch.testing.assert_close(delivered, reference(change.detach(), 0.6), atol=1e-5, rtol=1e-4)
    assert len(layers) == len({key.partition(".lora_")[0] for key in trained.parameters})


def test_comfyui_gets_the_changes_of_whole_matrices(case: Callable[..., Case], tmp_path: Path) -> None:
    trained = case("sdxl", targets="cross-attention")
    tensors = load_file(trained.export(tmp_path, "comfyui"))
    assert len(tensors) == len(trained.parameters)
    for name, parameter in trained.parameters.items():
        layer, _, kind = name.rpartition(".")
        key = f"lora_unet_{layer.replace('.', '_')}.{'diff' if kind == 'weight' else 'diff_b'}"
        torch.testing.assert_close(trained.base[name] + tensors[key], parameter.detach())


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_formats_of_adapters_need_a_low_rank(case: Callable[..., Case], form: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Write diffusers or comfyui; or export with `--set method.energy=0.9`"):
        case().export(tmp_path, form)
    assert case(rank=2).export(tmp_path / "low", form).is_file()


def test_an_8_bit_base_keeps_the_matrices_in_full(case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchao rounds, which need not be installed.
    monkeypatch.setattr(placement, "_rounded", lambda weight: (weight.to(torch.int8), torch.ones(len(weight), 1)))
    trained = case("qwen-image")
    model = families.load_model(trained.family, trained.directory, (), torch.float32, CPU)
    trained.method.thaw(model, trained.settings)
    placement.quantise_base(model.denoiser, trained.family, CPU)
    kinds = {name: type(module).__name__ for name, module in model.denoiser.named_modules()}
    assert kinds["transformer_blocks.0.attn.add_q_proj"] == "Int8Linear"
    assert kinds["transformer_blocks.0.attn.add_k_proj"] == "Linear"
    assert trained.method.attach(model, trained.settings, 0).keys() == trained.parameters.keys()
    model = families.load_model(trained.family, trained.directory, (), torch.float32, CPU)
    placement.quantise_base(model.denoiser, trained.family, CPU)
    with pytest.raises(ConfigError, match=r"method\.targets needs the base weights in full"):
        trained.method.attach(model, trained.settings, 0)


def test_a_file_of_another_model_is_refused(case: Callable[..., Case], tmp_path: Path) -> None:
    trained, other = case(), case("sdxl")
    trained.export(tmp_path)
    with pytest.raises(CheckpointError, match=r"another base model: it holds .*attn2.to_k.weight .*Load it into the model"):
        other.method.load_into(other.family, other.pipeline(), tmp_path)
    with pytest.raises(CheckpointError, match=f"{attention_files.OTHER_FILE} does not exist"):
        other.method.load_into(families.get("qwen-image"), case("qwen-image").pipeline(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "attention"}, r"method\.targets.*text-kv.*cross-attention"),
        ({"rank": 0}, r"method\.rank"),
        ({"energy": 1}, r"method\.energy"),
        ({"energy": 0.6, "targets": "cross-attention"}, r"biases are trained too. Leave out one of them, or set `rank`"),
        ({"words": {"tokens": {"<new1>": "cat"}, "lora": {}}}, r"`words.lora` does not go with this method"),
        ({"words": {"tokens": {"a b": "cat"}}}, r"'a b' is not a new word"),
        ({"words": {"tokens": {}}}, r"method\.words\.tokens"),
        ({"rnk": 2}, r"`method\.rnk` is not a setting. Did you mean `rank`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(MethodConfig(name="custom-diffusion", **settings))


def test_a_model_without_cross_attention_says_what_is_trained() -> None:
    method, settings = methods.parse(MethodConfig(name="custom-diffusion", targets="cross-attention"))
    with pytest.raises(ConfigError, match=r"qwen-image has no cross-attention: .* Leave it out"):
        method.encoders(families.get("qwen-image"), settings)


def test_a_family_whose_tokenizer_takes_no_new_words_is_told_to_use_a_rare_one() -> None:
    method, settings = methods.parse(MethodConfig(name="custom-diffusion", words={"tokens": {"<new1>": "cat"}}))
    family: Any = SimpleNamespace(name="plain", target_groups={"text-kv": None})
    with pytest.raises(ConfigError, match=r"method\.words: the tokenizer of plain takes no new words here. Leave it out"):
        method.encoders(family, settings)


def test_the_run_file_of_the_guide_is_the_recipe_in_short() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "methods.md").read_text().partition("## custom-diffusion\n")[2]
    shown = load.validate(RunConfig, yaml.safe_load(guide.partition("```yaml\n")[2].partition("```")[0]), "docs/methods.md")
    recipe = load.load(load.RECIPES / "custom-diffusion.yaml")
    assert "--recipe custom-diffusion" in guide
    assert shown.method == recipe.method
    for config in (shown, recipe):
        assert [source.role for source in config.data.sources] == ["instance", "instance", "class", "class"]
        assert [source.trigger for source in config.data.sources] == ["<new1> dog", "<new2> mug", None, None]
        assert (config.train.learning_rate, config.train.class_ratio, config.train.steps) == (4e-5, 1.0, 500)
