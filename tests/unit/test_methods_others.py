"""OFT, BOFT, LoHa, LoKr, any other adapter of PEFT, and full fine-tuning, against their formulas and their readers' rules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ftk.configs.schema import MethodConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods import full
from ftk.methods.adapters import injection
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import Conditions, Model

CPU = torch.device("cpu")
LAYER = "transformer_blocks.0.attn.to_q"


class Case:
    """A method on a fresh tiny model, with seeded noise of some size in what it trains."""

    def __init__(self, family_name: str, directory: Path, name: str, noise: float = 0.1, **settings: Any) -> None:
        self.family = families.get(family_name)
        self.directory = directory
        self.method, self.config = methods.parse(MethodConfig(name=name, **settings))
        self.model = families.load_model(self.family, directory, (), torch.float32, CPU)
        self.denoiser = self.model.denoiser.eval()
        self.before = {name: value.clone() for name, value in self.denoiser.state_dict().items()}
        self.parameters = self.method.attach(self.model, self.config, 0)
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += noise * torch.randn(parameter.shape, generator=draw)
        self.denoiser.eval()

    def export(self, directory: Path, form: str) -> list[Path]:
        export = Export(directory=directory, form=form, metadata={"run": "test"})
        return self.method.export(self.model, self.config, export)

    def merged(self, layer: str = LAYER) -> torch.Tensor:
        self.method.merge(self.model)
        weight: torch.Tensor = self.denoiser.get_submodule(layer).weight.detach()
        return weight


@pytest.fixture
def case(tiny_models: Callable[[str], Path]) -> Callable[..., Case]:
    """Makes one; takes the method's name and settings."""

    def make(name: str, family: str = "qwen-image", noise: float = 0.1, **settings: Any) -> Case:
        return Case(family, tiny_models(family), name, noise, **settings)

    return make


# --- OFT ----------------------------------------------------------------------------------------------------------------


def _rotation(weight: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """R of `rotated = weight R`, from a weight with as many rows as columns."""
    return torch.linalg.solve(weight.double(), rotated.double())


@pytest.mark.parametrize(
    ("settings", "noise", "atol"),
    [
        ({"use_cayley_neumann": False}, 0.5, 1e-4),
        ({}, 0.02, 1e-4),
        ({"use_cayley_neumann": False, "block_share": True}, 0.5, 1e-4),
    ],
)
def test_the_learned_rotation_is_orthogonal_and_keeps_the_angles_of_rows(
    case: Callable[..., Case], settings: dict[str, Any], noise: float, atol: float
) -> None:
    made = case("oft", noise=noise, block_size=4, **settings)
    weight, rotated = made.before[f"{LAYER}.weight"], made.merged()
    R = _rotation(weight, rotated)
    assert (R - torch.eye(len(R))).abs().max() > noise / 2, "something was learned"
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=R.dtype), atol=atol, rtol=0)
    outside = torch.block_diag(*[torch.ones(4, 4)] * (len(R) // 4)) == 0
    assert R[outside].abs().max() < 1e-3
    angles = [rows.double() @ rows.double().T for rows in (weight, rotated)]
    torch.testing.assert_close(angles[0], angles[1], atol=atol, rtol=1e-3)


def test_the_cut_off_series_is_less_orthogonal_than_the_exact_transform(case: Callable[..., Case]) -> None:
    errors = []
    for settings in ({"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 8}, {"num_cayley_neumann_terms": 3}):
        made = case("oft", noise=0.2, block_size=4, **settings)
        weight, rotated = made.before[f"{LAYER}.weight"], made.merged()
        errors.append((weight @ weight.T - rotated @ rotated.T).abs().max().item())
    assert errors[0] < errors[1] < errors[2]


def test_the_rotation_is_the_cayley_transform_of_a_skew_symmetric_matrix(case: Callable[..., Case]) -> None:
    made = case("oft", noise=0.3, block_size=4, use_cayley_neumann=False)
    upper = made.parameters[f"{LAYER}.oft_R.default.weight"].detach().double()
    rows, columns = torch.triu_indices(4, 4, 1)
    blocks = []
    for vector in upper:
        Q = torch.zeros(4, 4, dtype=torch.float64)
        Q[rows, columns] = vector
        Q = Q - Q.T
        blocks.append((torch.eye(4) - Q) @ torch.linalg.inv(torch.eye(4) + Q))
    weight, rotated = made.before[f"{LAYER}.weight"].double(), made.merged().double()
    expected = torch.block_diag(*blocks)
    torch.testing.assert_close(rotated, weight @ expected.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("eps", [0.5, 0.01])
def test_coft_keeps_each_block_within_its_radius(case: Callable[..., Case], eps: float) -> None:
    made = case("oft", noise=1.0, block_size=4, coft=True, eps=eps)
    made.merged()
    upper = {name: value.detach() for name, value in made.parameters.items() if "oft_R" in name}
    for value in upper.values():
        # The norm of Q counts each element of its upper triangle twice.
        norms = value.square().sum(1).mul(2).sqrt()
        assert (norms <= eps / len(value) ** 0.5 * (1 + 1e-5)).all()
        assert norms.max() > 0.9 * eps / len(value) ** 0.5, "noise of size 1 is outside, and is projected onto the sphere"


def test_r_is_the_number_of_blocks_and_block_size_their_side(case: Callable[..., Case]) -> None:
    shapes = {
        name: case("oft", **settings).parameters[f"{LAYER}.oft_R.default.weight"].shape
        for name, settings in (("r", {"r": 4}), ("size", {"block_size": 4}), ("shared", {"block_size": 4, "block_share": True}))
    }
    # 32 inputs
    assert shapes == {"r": (4, 28), "size": (8, 6), "shared": (1, 6)}


def test_block_size_is_32_where_neither_is_given(case: Callable[..., Case]) -> None:
    assert case("oft").parameters[f"{LAYER}.oft_R.default.weight"].shape == (1, 32 * 31 // 2)


def test_module_dropout_leaves_whole_blocks_unrotated_while_training(case: Callable[..., Case]) -> None:
    made = case("oft", noise=0.5, block_size=4, module_dropout=0.5)
    layer = made.denoiser.get_submodule(LAYER)
    rotation = layer.oft_R["default"]
    inputs = torch.randn(3, 5, 32)
    with torch.no_grad():
        rotated = rotation(inputs)
        assert torch.equal(rotated, rotation(inputs))
        rotation.train()
        seen = set()
        for _ in range(8):
            dropped = rotation(inputs).unflatten(-1, (8, 4))
            is_plain = (dropped == inputs.unflatten(-1, (8, 4))).all(-1).all(0).all(0)
            is_rotated = (dropped == rotated.unflatten(-1, (8, 4))).all(-1).all(0).all(0)
            assert (is_plain ^ is_rotated).all()
            seen.add(tuple(is_plain.tolist()))
    assert len(seen) > 4


def test_pointwise_convolutions_rotate_and_merge(tiny_models: Callable[[str], Path]) -> None:
    made = Case("stable-diffusion", tiny_models("stable-diffusion"), "oft", 0.2, block_size=4, targets=("proj_in",))
    layers = {name: module for name, module in made.denoiser.named_modules() if name.endswith("proj_in")}
    name, layer = next(iter(layers.items()))
    assert isinstance(layer.get_base_layer(), torch.nn.Conv2d)
    inputs = torch.randn(2, layer.get_base_layer().in_channels, 5, 6)
    with torch.no_grad():
        expected, base = layer(inputs), layer.get_base_layer()(inputs)
        assert (expected - base).abs().max() > 1e-2
        made.merged(name)
        torch.testing.assert_close(made.denoiser.get_submodule(name)(inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8, "block_size": 4}, "exclude each other"),
        ({"eps": 0.1}, "`eps` has no effect without `coft: true`"),
        ({"use_cayley_neumann": False, "num_cayley_neumann_terms": 3}, "no effect without `use_cayley_neumann"),
        ({"block_share": True, "module_dropout": 0.1}, "no effect with `block_share`"),
        ({"layers_pattern": "transformer_blocks"}, "no effect without `layers`"),
    ],
)
def test_settings_of_oft_that_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(MethodConfig(name="oft", **settings))


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_layers_are_the_numbers_of_blocks(case: Callable[..., Case], name: str) -> None:
    made = case(name, block_size=4, layers=[1], layers_pattern="transformer_blocks")
    assert made.parameters
    assert all(key.startswith("transformer_blocks.1.") for key in made.parameters)


def test_a_block_size_that_does_not_divide_the_inputs_names_those_that_do(case: Callable[..., Case]) -> None:
    with pytest.raises(ConfigError, match=rf"block_size: 5 does not divide the 32 inputs of {LAYER}. .* 4"):
        case("oft", block_size=5)
    with pytest.raises(ConfigError, match=r"r: 3 does not divide the 32 inputs"):
        case("oft", r=3)


def test_more_butterfly_factors_than_peft_can_compute_are_refused(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    with pytest.raises(ConfigError, match="butterfly_factors: 2 need PEFT's CUDA extension"):
        case("boft", butterfly_factors=2)


def test_boft_rotates_orthogonally_and_scales_outputs(case: Callable[..., Case]) -> None:
    made = case("boft", noise=0.3, block_size=4)
    scale = made.parameters[f"{LAYER}.boft_s.default"].detach().clone()
    weight, merged = made.before[f"{LAYER}.weight"], made.merged()
    R = _rotation(weight, merged / scale)
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=R.dtype), atol=1e-4, rtol=0)


# --- LoHa and LoKr ------------------------------------------------------------------------------------------------------


def _kernel(tensors: dict[str, torch.Tensor], factor: str, first: str, second: str) -> torch.Tensor:
    """A factored kernel, as LyCORIS and ComfyUI rebuild it."""
    return torch.einsum("ijkl,jr,ip->prkl", tensors[factor], tensors[second], tensors[first]).contiguous()


def _loha(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """As ComfyUI has it (comfy/weight_adapter/loha.py)."""
    scale = tensors["alpha"] / len(tensors["hada_w1_b"])
    if "hada_t1" in tensors:
        return _kernel(tensors, "hada_t1", "hada_w1_a", "hada_w1_b") * _kernel(
            tensors, "hada_t2", "hada_w2_a", "hada_w2_b"
        ) * scale  # fmt: skip
    return (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"]) * scale


def _lokr(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """As ComfyUI has it (comfy/weight_adapter/lokr.py): alpha counts only where a factor is of low rank.

    It multiplies kernels out without making them contiguous, which `torch.kron` refuses.
    """
    scale, factors = torch.tensor(1.0), []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(tensors[name])
            continue
        scale = tensors["alpha"] / len(tensors[f"{name}_b"])
        is_kernel = name == "lokr_w2" and "lokr_t2" in tensors
        factors.append(
            torch.einsum("ijkl,jr,ip->prkl", tensors["lokr_t2"], tensors["lokr_w2_b"], tensors["lokr_w2_a"])
            if is_kernel
            else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        )
    first, second = factors
    return torch.kron(first[..., None, None] if second.ndim == 4 else first, second) * scale


def _lokr_of_musubi(tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """As musubi-tuner has it (networks/lokr.py), None for what it passes over: no whole small factor, or a kernel."""
    if "lokr_w1" not in tensors:
        return None
    if "lokr_w2_a" in tensors:
        second, divisor = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"], tensors["lokr_w2_a"].shape[1]
    else:
        second, divisor = tensors["lokr_w2"], max(tensors["lokr_w2"].shape)
    first = tensors["lokr_w1"]
    return torch.kron(first[..., None, None] if second.ndim == 4 else first, second) * tensors["alpha"] / divisor


@pytest.mark.parametrize("form", ["comfyui", "lycoris", "kohya"])
@pytest.mark.parametrize("family", ["qwen-image", "sdxl"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("loha", {"rank": 2, "alpha": 6.0}),
        ("loha", {"rank": 2, "alpha": 6.0, "effective_convolution": True, "targets": "all"}),
        ("lokr", {"rank": 2, "alpha": 6.0}),
        ("lokr", {"rank": 100, "alpha": 50.0}),
        ("lokr", {"rank": 2, "alpha": 6.0, "decompose_both": True, "effective_convolution": True, "targets": "all"}),
    ],
)
def test_readers_of_lycoris_names_rebuild_what_was_trained(
    case: Callable[..., Case], tmp_path: Path, name: str, settings: dict[str, Any], family: str, form: str
) -> None:
    made = case(name, family, noise=0.3, **settings)
    (file,) = made.export(tmp_path, form)
    by_stem: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(file).items():
        stem, _, part = key.rpartition(".")
        by_stem.setdefault(stem, {})[part] = value
    adapted = sorted({key.split(".hada_")[0].split(".lokr_")[0] for key in made.parameters})
    made.method.merge(made.model)
    assert len(by_stem) == len(adapted)
    for module in adapted:
        flat = module.replace(".", "_").replace("add_embedding_linear_1", "label_emb_0_0").replace(
            "add_embedding_linear_2", "label_emb_0_2"
        )  # fmt: skip
        original = families.original_names(made.model.family, made.denoiser).get(module, module).replace(".", "_")
        stems = {"lycoris": "lycoris_" + module.replace(".", "_"), "kohya": f"lora_unet_{original}"}
        stems["comfyui"] = f"diffusion_model.{module}" if family == "qwen-image" else f"lora_unet_{flat}"
        rebuilt = _loha(by_stem[stems[form]]) if name == "loha" else _lokr(by_stem[stems[form]])
        weight = made.before[f"{module}.weight"]
        merged = made.denoiser.get_submodule(module).weight.detach()
        assert (merged - weight).abs().max() > 1e-4
        torch.testing.assert_close(weight + rebuilt.reshape(weight.shape), merged, atol=2e-6, rtol=1e-4)
        if name == "lokr":
            theirs = _lokr_of_musubi(by_stem[stems[form]])
            assert theirs is not None
            torch.testing.assert_close(theirs, rebuilt.reshape(theirs.shape), atol=2e-6, rtol=1e-4)


def test_lokr_computes_its_formula(case: Callable[..., Case]) -> None:
    made = case("lokr", rank=2, alpha=3.0, decompose_factor=4, noise=0.5)
    tensors = {
        key.removeprefix(f"{LAYER}.").partition(".")[0]: value.detach()
        for key, value in made.parameters.items()
        if key.startswith(LAYER)
    }
    assert tensors["lokr_w1"].shape == (4, 4)
    inputs = torch.randn(3, 32)
    layer = made.denoiser.get_submodule(LAYER)
    expected = made.before[f"{LAYER}.weight"] + 1.5 * torch.kron(
        tensors["lokr_w1"], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), F.linear(inputs, expected, layer.base_layer.bias), atol=1e-5, rtol=1e-4)


# --- any type of PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "MIS"}, "PEFT has no type 'MIS'. Did you mean `MISS`"),
        ({"type": "MISS", "rr": 4}, "`rr` is not a setting of PEFT's MISS. Did you mean `r`"),
        ({"type": "MISS", "target_modules": ["to_q"]}, "is called `targets` here"),
        ({"type": "POLY"}, "needs a task's number with every sample"),
        ({"type": "vera"}, "share one state"),
        ({"type": "LORA"}, "it is a method of its own: write `name: lora`"),
        ({"type": "ADALORA"}, "update_and_allocate"),
        ({"type": "PREFIX_TUNING"}, "language model"),
        ({}, "`method.type` is missing"),
    ],
)
def test_what_peft_cannot_do_here_is_refused_by_its_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(MethodConfig(name="peft", **settings))


def test_what_peft_itself_refuses_is_a_config_error(case: Callable[..., Case]) -> None:
    with pytest.raises(ConfigError, match=r"PEFT refuses MISS: `r` \(64\) must be less"):
        case("peft", type="MISS")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BEFT", {}), ("C3A", {"block_size": 8}), ("DEFT", {}), ("DELORA", {}), ("FOURIERFT", {"n_frequency": 50}),
        ("GLORA", {}), ("GRALORA", {}), ("HIRA", {}), ("IA3", {}), ("LN_TUNING", {}), ("OSF", {}), ("PEANUT", {}),
        ("PSOFT", {}), ("RANDLORA", {}), ("ROAD", {"group_size": 8}), ("SHIRA", {"r": 4}), ("SUPERTUNING", {}),
        ("WAVEFT", {"n_frequency": 50}), ("hra", {}),
    ],
)  # fmt: skip
def test_every_type_that_is_not_refused_trains_reloads_and_merges(
    case: Callable[..., Case], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    made = case("peft", noise=0.05, type=kind, **settings)
    family, noisy = made.family, torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    texts = family.collate_texts([{"embeds": torch.ones(5, made.denoiser.config.joint_attention_dim)}])

    def predict(denoiser: Any) -> torch.Tensor:
        model = Model(family=family, schedule=made.model.schedule, denoiser=denoiser)
        with torch.no_grad():
            return made.method.predict(model, noisy, torch.tensor([0.5]), Conditions(texts=texts))

    trained = predict(made.denoiser)
    assert (trained - predict(family.load_denoiser(made.directory, torch.float32, CPU).eval())).abs().max() > 1e-4
    made.export(tmp_path, "peft")
    pipeline = family.pipeline(made.directory, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    made.method.load_into(made.family, pipeline, tmp_path)
    torch.testing.assert_close(predict(pipeline.transformer), trained, atol=1e-6, rtol=1e-6)
    made.method.merge(made.model)
    torch.testing.assert_close(predict(made.denoiser), trained, atol=1e-5, rtol=1e-5)


def test_a_type_without_merging_says_so(case: Callable[..., Case]) -> None:
    made = case("peft", type="LILY")
    with pytest.raises(ConfigError, match="LILY cannot be merged"):
        made.method.merge(made.model)


# --- full ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "first", "is_all"),
    [
        ("all", "time_text_embed.timestep_embedder.linear_1.weight", True),
        (("to_q",), f"{LAYER}.weight", False),
        (("transformer_blocks.1",), "transformer_blocks.1.", False),
        (("norm_q.weight", "proj_out.bias"), "transformer_blocks.0.attn.norm_q.weight", False),
        ({"regex": r"transformer_blocks\.0\.attn\.to_q"}, f"{LAYER}.weight", False),
        ({"regex": r".*\.norm_k\.weight"}, "transformer_blocks.0.attn.norm_k.weight", False),
    ],
)
def test_full_trains_what_its_targets_name(case: Callable[..., Case], targets: Any, first: str, is_all: bool) -> None:
    made = case("full", targets=targets)
    names = [name for name, parameter in made.denoiser.named_parameters() if parameter.requires_grad]
    assert names == list(made.parameters)
    assert names[0].startswith(first)
    assert (len(names) == len(list(made.denoiser.parameters()))) == is_all


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_z",), "'to_z' is the name of no module or parameter.* Did you mean `to_"),
        ({"regex": "to_q"}, "'to_q' matches the whole name of no module"),
        ("atention", "no group 'atention'"),
    ],
)
def test_targets_of_full_that_name_nothing_are_refused(case: Callable[..., Case], targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        case("full", targets=targets)


def test_the_folder_of_full_is_what_diffusers_loads(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("full", noise=0.02)
    files = made.export(tmp_path, "diffusers")
    assert [file.name for file in files] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert str(made.directory) not in files[0].read_text()
    loaded = type(made.denoiser).from_pretrained(tmp_path, subfolder="transformer")
    assert loaded.config.num_layers == made.denoiser.config.num_layers
    for name, value in made.denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_large_model_is_written_in_shards_with_an_index(
    case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD_SIZE", "100KB")
    made = case("full", noise=0.02)
    files = made.export(tmp_path, "diffusers")
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(file.stat().st_size < 120_000 for file in shards)
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.denoiser.state_dict().keys()
    loaded = type(made.denoiser).from_pretrained(tmp_path, subfolder="transformer")
    pipeline = made.family.pipeline(made.directory, torch.float32, CPU, text_encoder=None, tokenizer=None, vae=None)
    made.method.load_into(made.family, pipeline, tmp_path)
    for name, value in made.denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(pipeline.transformer.state_dict()[name], value)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        made.method.load_into(made.family, pipeline, tmp_path)


def test_an_export_of_full_replaces_the_one_before_as_a_whole(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("full", noise=0.02)
    made.export(tmp_path, "diffusers")
    (tmp_path / "transformer" / "stale.safetensors").write_bytes(b"")
    files = made.export(tmp_path, "diffusers")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    assert all(file.is_file() for file in files)


# --- all ----------------------------------------------------------------------------------------------------------------


def test_the_folder_of_shared_parts_is_not_a_method() -> None:
    names = set(methods.available())
    assert {"controlnet", "custom-diffusion", "full", "lora", "peft", "textual-inversion"} <= names
    assert not {"adapters", "base"} & names


@pytest.mark.parametrize("name", ["lora", "oft", "boft", "loha", "lokr"])
def test_taking_the_adapter_out_restores_the_base(case: Callable[..., Case], name: str) -> None:
    made = case(name, **({"block_size": 4} if name in ("oft", "boft") else {"rank": 2}))
    injection.unload(made.denoiser)
    after = made.denoiser.state_dict()
    assert after.keys() == made.before.keys()
    assert all(torch.equal(after[key], value) for key, value in made.before.items())
