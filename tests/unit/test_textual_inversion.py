"""Textual inversion: what is trained, what is written, and that diffusers' own code agrees with both."""

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ftk.cache import stage as cache
from ftk.cache.store import CacheStore
from ftk.configs import load
from ftk.configs.load import validate
from ftk.configs.schema import MethodConfig, RunConfig
from ftk.deliver import export, sample
from ftk.deliver.run_delivery import RunDelivery
from ftk.deliver.words import load_words
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import trained_words
from ftk.methods.base import Export
from ftk.models import base as families
from ftk.models.base import Conditions, Model
from ftk.pipeline import stage as prepare
from ftk.run import Run, load_run, resolve
from ftk.train import drawing
from ftk.train import stage as train
from ftk.train.drawing import generate
from ftk.train.loop import Trainer

CPU = torch.device("cpu")
WORD = {"<cat>": {"vectors": 2, "start": "a"}}


def parsed(**settings: Any) -> tuple[Any, Any]:
    return methods.parse(MethodConfig(name="textual-inversion", **{"tokens": WORD, **settings}))


def attached(name: str, directory: Path, **settings: Any) -> tuple[Any, Any, Model, dict[str, torch.nn.Parameter]]:
    """The method, its settings, and a tiny model with its vectors."""
    method, values = parsed(**settings)
    family = families.get(name)
    model = families.load_model(family, directory, method.encoders(family, values), torch.float32, CPU)
    parameters = method.attach(model, values, 0)
    return method, values, model, parameters


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four small pictures of `<cat>`."""
    draw = random.Random(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo {number} of <cat>")
    return folder


@pytest.fixture
def make_run(tiny_models: Callable[[str], Path], pictures: Path, tmp_path: Path) -> Callable[..., Run]:
    """A resolved run over the pictures."""

    def make(family: str, name: str = "test", **settings: Any) -> Run:
        tree: dict[str, Any] = {
            "run": name, "workspace": str(tmp_path / "work"), "card": {"title": "test"},
            "model": {"family": family, "path": str(tiny_models(family))},
            "data": {"sources": [{"path": str(pictures)}], "resolutions": [64], "workers": 1},
            "cache": {"device": "cpu", "text_dtype": "float32", "latents_dtype": "float32"},
            "method": {"name": "textual-inversion", "tokens": WORD, **settings},
            "sample": {
                "prompts": ["<cat> asleep"], "every": 4, "num_inference_steps": 2, "guidance_scale": 2.0, "device": "cpu",
            },
            "train": {
                "steps": 4, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
                "checkpoint_every": 2, "seed": 1, "device": "cpu", "trackers": [],
                "validation": {"share": 0.25, "every": 2}, "optimizer": {"weight_decay": 0.0},
            },
        }  # fmt: skip
        return resolve(validate(RunConfig, tree, "the test"))

    return make


def delivered(run: Run) -> dict[str, bytes]:
    """The trained weights in a run's folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(run.paths.adapter.glob("*.safetensors"))}


CASES = {
    "pivotal": ("sdxl", {"norm": "keep", "lora": {"rank": 2}, "rate": 5.0}),
    "output": ("qwen-image", {"train": "output"}),
    "input": ("qwen-image", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_to_the_same_bytes_and_its_pictures_are_those_of_a_pipeline_that_has_learned_the_word(
    make_run: Callable[..., Run], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, settings = CASES[case]
    whole, killed = (make_run(family, name, **settings) for name in ("whole", "killed"))
    prepare.run(whole)
    cache.run(whole)
    drawn_in_training: list[Image.Image] = []
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "generate", lambda *given: drawn_in_training.append(generate(*given)) or drawn_in_training[-1])
        report = train.run(whole, RunDelivery)
    assert report is not None
    assert report.num_bad_steps == 0

    with monkeypatch.context() as patch:
        update = Trainer.update

        def fail_late(trainer: Trainer, *arguments: Any) -> Any:
            if trainer.step == 3:
                raise KeyboardInterrupt
            return update(trainer, *arguments)

        patch.setattr(Trainer, "update", fail_late)
        with pytest.raises(KeyboardInterrupt):
            train.run(killed, RunDelivery)
    train.run(killed, RunDelivery)
    assert delivered(killed) == delivered(whole)
    assert len(delivered(whole)) == {"pivotal": 3, "output": 1, "input": 1}[case]

    pipeline = whole.family.pipeline(Path(whole.config.model.path), torch.float32, CPU)
    exec(
        whole.method.usage(whole.family, whole.settings).replace("path/to/this/folder", str(whole.paths.adapter)),
        {"pipeline": pipeline},
    )
    arguments = {"prompt": "<cat> asleep", "negative_prompt": whole.negative_prompt(Path(whole.config.model.path))}
    drawn = generate(pipeline, whole, {name: text for name, text in arguments.items() if text is not None}, 0)
    assert_like(drawn_in_training[-1], drawn)
    sampled = sample.run(whole)
    assert sampled.mean_difference > 0


def assert_like(first: Image.Image, second: Image.Image) -> None:
    """Equal to a level of 8 bits or two."""
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int() for image in (first, second)]
    assert (pixels[0] - pixels[1]).abs().max() <= 2


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
def test_a_step_is_that_of_the_script_of_diffusers(tiny_models: Callable[[str], Path], name: str) -> None:
    """`examples/textual_inversion` trains the whole table and puts all rows but the new ones back after each step."""
    method, _, model, parameters = attached(name, tiny_models(name))
    family: Any = model.family
    encoder = family.load_text_encoder(tiny_models(name), torch.float32, CPU)
    family.add_tokens(encoder, parsed()[1].words)
    texts = family.collate_texts(
        [
            {key: value.clone() for key, value in item.items()}
            for item in family.encode_texts(encoder, ["a <cat>", "<cat> on x"])
        ]
    )
    draw = torch.Generator().manual_seed(2)
    noisy, target = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    sigma_B = model.schedule.sigmas[[700, 200]]
    conditions = Conditions(texts=texts)

    official = families.load_model(family, tiny_models(name), family.trainable_encoders, torch.float32, CPU)
    tables = []
    for number, module in enumerate(official.encoders.values()):
        grown = encoder.model if name == "stable-diffusion" else encoder.models[number]
        module.resize_token_embeddings(len(grown.get_input_embeddings().weight), mean_resizing=False)
        table = module.get_input_embeddings().weight
        with torch.no_grad():
            table.copy_(grown.get_input_embeddings().weight)
        tables.append(table.requires_grad_(True))
    before = [table.detach().clone() for table in tables]

    ours = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW(tables, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        (method.predict(model, noisy, sigma_B, conditions) - target).square().mean().backward()
        (family.predict(official, noisy, sigma_B, conditions) - target).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for table, old in zip(tables, before, strict=True):
                table[:-2] = old[:-2]
    for parameter, table, old, module in zip(parameters.values(), tables, before, model.encoders.values(), strict=True):
        torch.testing.assert_close(parameter, table[-2:], atol=1e-6, rtol=0)
        assert (parameter - old[-2:]).abs().max() > 1e-2
        assert torch.equal(module.get_input_embeddings().table.weight, old[:-2]), "all other rows stay, to the bit"
        assert not module.get_input_embeddings().table.weight.requires_grad


def test_rows_that_keep_their_norm_do_so_and_learn_all_the_same(tiny_models: Callable[[str], Path]) -> None:
    _, _, model, parameters = attached("stable-diffusion", tiny_models("stable-diffusion"), norm="keep")
    module = model.encoders["text_encoder"].get_input_embeddings()
    start = module.values().detach().clone()
    (rows,) = parameters.values()
    torch.testing.assert_close(rows.detach(), start)
    with torch.no_grad():
        rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.values().norm(dim=1), start.norm(dim=1))
    assert (module.values() - start).abs().max() > 1e-2
    module.values().square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() < 1e-5, "no gradient changes a length"


@pytest.mark.parametrize(("name", "keys"), [("stable-diffusion", {"emb_params"}), ("sdxl", {"clip_l", "clip_g"})])
@pytest.mark.parametrize("form", ["a1111", "comfyui"])
def test_other_programs_find_a_file_named_after_each_word_with_their_keys(
    tiny_models: Callable[[str], Path], name: str, keys: set[str], form: str, tmp_path: Path
) -> None:
    tokens = {"<cat>": {"vectors": 3, "start": "abc"}, "my-toy": "x"}
    method, settings, model, parameters = attached(name, tiny_models(name), tokens=tokens, lora={"rank": 2})
    files = method.export(model, settings, Export(directory=tmp_path, form=form, metadata={}))
    lora = {"a1111": "kohya.safetensors", "comfyui": "comfyui.safetensors"}[form]
    assert sorted(path.name for path in files) == sorted(["cat.safetensors", "my-toy.safetensors", lora])
    cat, toy = (load_file(tmp_path / f"{word}.safetensors") for word in ("cat", "my-toy"))
    assert cat.keys() == toy.keys() == keys
    assert all(len(tensor) == 3 for tensor in cat.values())
    rows = parameters["text_encoder.word_vectors"]
    first = "emb_params" if name == "stable-diffusion" else "clip_l"
    assert torch.equal(torch.cat([cat[first], toy[first]]), rows)


def test_several_words_load_from_files_of_their_own(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = {"<cat>": {"vectors": 3, "start": "abc"}, "my-toy_2": "x"}
    directory = tiny_models("sdxl")
    method, settings, model, parameters = attached("sdxl", directory, tokens=tokens)
    files = method.export(model, settings, Export(directory=tmp_path, form="diffusers", metadata={"run": "x"}))
    assert sorted(path.name for path in files) == [
        "learned_embeds-cat.safetensors", "learned_embeds-my-toy_2.safetensors",
        "learned_embeds_2-cat.safetensors", "learned_embeds_2-my-toy_2.safetensors",
    ]  # fmt: skip
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata().items() >= {"run": "x", "ftk_word": "<cat>", "ftk_start": "abc", "ftk_vectors": "3"}.items()
    pipelines = [model.family.pipeline(directory, torch.float32, CPU) for _ in range(2)]
    exec(method.usage(model.family, settings).replace("path/to/this/folder", str(tmp_path)), {"pipeline": pipelines[0]})
    assert load_words(pipelines[1], tmp_path) is pipelines[1]
    for pipeline in pipelines:
        for tokenizer, encoder, name in (
            (pipeline.tokenizer, pipeline.text_encoder, "text_encoder"),
            (pipeline.tokenizer_2, pipeline.text_encoder_2, "text_encoder_2"),
        ):
            ids = tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2", "my-toy_2"])
            assert torch.equal(encoder.get_input_embeddings().weight[ids], parameters[f"{name}.word_vectors"])
    with pytest.raises(CheckpointError, match=r"learned_embeds\S*-cat\S* does not fit this model: .*already in tokenizer"):
        load_words(pipelines[0], tmp_path)


def test_output_states_start_from_the_mean_of_what_the_cache_holds(tiny_model: Path) -> None:
    method, _, model, parameters = attached(
        "qwen-image", tiny_model, train="output", tokens={"<cat>": {"vectors": 2}, "<dog>": "the"}
    )
    assert not model.encoders
    (rows,) = parameters.values()
    family: Any = model.family
    encoder = family.load_text_encoder(tiny_model, torch.float32, CPU)
    family.add_tokens(encoder, parsed(tokens={"<cat>": {"vectors": 2}, "<dog>": "the"})[1].words)
    items = [
        {k: v.clone() for k, v in each.items()}
        for each in family.encode_texts(encoder, ["the <cat>", "<cat> in background", "x"])
    ]
    first = encoder.tokenizer.convert_tokens_to_ids("<cat>")
    sigma_B = model.schedule.sigmas[[500]].expand(3)
    conditions = Conditions(texts=family.collate_texts(items))
    noisy = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    method.start_from(model, [lambda: method.predict(model, noisy, sigma_B, conditions)])
    for number in (0, 1):
        held = [item["embeds"][item["input_ids"] == first + number] for item in items]
        torch.testing.assert_close(rows[number].detach(), torch.cat(held).mean(0))
    torch.testing.assert_close(rows[2].detach(), torch.cat([item["embeds"] for item in items]).mean(0))

    changed = method.texts(model, conditions.texts)
    ids_BL = conditions.texts["input_ids"]
    assert torch.equal(changed["embeds"][ids_BL == first], rows[:1].expand(2, -1))
    is_old = items[1]["input_ids"] < first
    assert torch.equal(changed["embeds"][1][: len(is_old)][is_old], items[1]["embeds"][is_old])
    method.predict(model, noisy, sigma_B, conditions).square().mean().backward()
    assert rows.grad is not None
    assert rows.grad[:2].abs().max() > 0
    assert not rows.grad[2].any(), "<dog> is in no text"


def test_output_states_are_written_and_read_as_they_were_trained(tiny_model: Path, tmp_path: Path) -> None:
    method, settings, model, parameters = attached("qwen-image", tiny_model, train="output")
    (rows,) = parameters.values()
    torch.nn.init.normal_(rows, generator=torch.Generator().manual_seed(4))
    (file,) = method.export(model, settings, Export(directory=tmp_path, form="diffusers", metadata={}))
    assert load_file(file).keys() == {"output"}
    pipeline = model.family.pipeline(tiny_model, torch.float32, CPU, vae=None)
    plain = pipeline.encode_prompt("the background", device=CPU)[0]
    load_words(pipeline, tmp_path)
    assert torch.equal(pipeline.encode_prompt("the background", device=CPU)[0], plain), "texts without it stay"
    embeds, mask = pipeline.encode_prompt(["describe <cat> in the objects", "x"], device=CPU)
    ids = pipeline.tokenizer("describe<cat><cat>_1")["input_ids"]
    place = len(ids) - 2
    torch.testing.assert_close(embeds[0, place : place + 2], rows.detach())
    assert mask is not None
    with pytest.raises(
        ConfigError, match=r"a1111: it is not known how these programs read new words of qwen-image\. Write diff"
    ):
        method.export(model, settings, Export(directory=tmp_path, form="a1111", metadata={}))


def test_a_file_that_is_not_of_this_kind_is_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_models("stable-diffusion")
    method, settings, model, _ = attached("stable-diffusion", directory)
    (file,) = method.export(model, settings, Export(directory=tmp_path, form="a1111", metadata={}))
    file.rename(tmp_path / "learned_embeds.safetensors")
    pipeline = model.family.pipeline(directory, torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"was trained on another base model: it holds .*emb_params"):
        load_words(pipeline, tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        load_words(pipeline, tmp_path / "elsewhere")


def test_the_recipe_runs_and_its_weights_are_exported_for_every_program(
    tiny_models: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    for path in pictures.glob("*.txt"):
        path.write_text("in the garden")
    overrides = {
        "workspace": tmp_path / "work", "model.path": tiny_models("stable-diffusion"), "data.sources.0.path": pictures,
        "data.resolutions": "[64]", "data.workers": 1, "train.steps": 4, "train.checkpoint_every": 2, "sample.every": "null",
        "train.device": "cpu", "cache.device": "cpu",
    }  # fmt: skip
    run = load_run(load.RECIPES / "textual-inversion.yaml", [f"{name}={value}" for name, value in overrides.items()])
    prepare.run(run)
    cache.run(run)
    with closing(CacheStore.open(run.paths.cache)) as store:
        assert store.text(0)["input_ids"][1:5].tolist() == [514, 515, 516, 517], "four tokens stand for the trigger"
    train.run(run, RunDelivery)
    choice = export.Choice(step=2, dtype="float16")
    export.export(run, "diffusers", tmp_path / "half", choice)
    (tensor,) = load_file(tmp_path / "half" / "learned_embeds.safetensors").values()
    assert tensor.dtype == torch.float16
    later = load_file(run.paths.adapter / "learned_embeds.safetensors")["<my-cat>"]
    assert 1e-5 < (tensor.float() - later).abs().max() < 1
    card = (run.paths.adapter / "README.md").read_text()
    assert 'pipeline.load_textual_inversion("path/to/this/folder")' in card
    for form, said in (("a1111", "write `my-cat` in"), ("comfyui", "write `embedding:my-cat` in")):
        export.export(run, form, tmp_path / form)
        assert said in (tmp_path / form / "README.md").read_text()
    strong = run.config.model_copy(update={"sample": run.config.sample.model_copy(update={"strength": 0.5})})
    with pytest.raises(ConfigError, match="of type NEW WORDS: only LoRA, LoHa and LoKr have a strength"):
        sample.run(run.with_config(strong))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("sdxl", {"train": "output"}, "method.train: output is for families whose text encoder is a language model"),
        ("sdxl", {"tokens": {}}, "method.tokens"),
        ("sdxl", {"tokens": {"<cat>": "a", "cat!": "a"}}, "files are named after the letters and digits"),
        ("sdxl", {"tokens": {"< cat >": "a"}}, "'< cat >' is not a new word"),
        ("sdxl", {"tokens": {"<cat>": {"vector": 2}}}, "method.tokens.<cat>.vector.*Did you mean `vectors`"),
        ("sdxl", {"lora": {"text_encoder": {}}}, "`lora.text_encoder` does not go with new words"),
        ("sdxl", {"lora": {"targets": "atention"}}, "no group 'atention'. Did you mean `attention`"),
        ("qwen-image", {"train": "output", "norm": "keep"}, "`norm: keep` has no effect with `train: output`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    make_run: Callable[..., Run], family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(family, **settings)


def test_merged_words_are_those_of_the_pipeline_and_qwens_are_refused_with_what_works(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    method, _, model, parameters = attached("qwen-image", tiny_models("qwen-image"))
    with pytest.raises(ConfigError, match=r"the new words of qwen-image cannot be merged.*Use `ftk export`"):
        method.merge(model)
    assert trained_words.values(model).keys() == {"text_encoder"}
    method, _, model, parameters = attached("sdxl", tiny_models("sdxl"), lora={"rank": 2})
    rows = [parameter.detach().clone() for name, parameter in parameters.items() if name.endswith("word_vectors")]
    method.merge(model)
    for module, rows_ND in zip(model.encoders.values(), rows, strict=True):
        module.save_pretrained(tmp_path)
        table = type(module).from_pretrained(tmp_path).get_input_embeddings().weight
        assert torch.equal(table[514:], rows_ND)
