"""A new family and a new method are one file each: those of tests/foreign go through every stage, and nothing else knows them.

The judge is diffusers' own Kontext pipeline.
"""

import gc as garbage
import io
import itertools
import json
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ftk.cache import gc
from ftk.cache import stage as cache
from ftk.cache.plan import ImageItem, TextItem
from ftk.cache.store import CacheStore
from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.deliver import export, merge, sample
from ftk.deliver.run_delivery import RunDelivery
from ftk.errors import CacheError, CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import adapter_files, targets
from ftk.models import base as models
from ftk.models.base import DENOISER, Conditions, load_model
from ftk.models.components import loading
from ftk.pipeline import stage as prepare
from ftk.pipeline.dataset import PreparedDataset
from ftk.run import Run, resolve
from ftk.train import inputs, memory, placement
from ftk.train import stage as train
from ftk.train.build import build_trainer
from ftk.train.hooks.recorder import read_metrics
from ftk.train.sheet import cells, cells_with_inputs

CPU = torch.device("cpu")
FAMILY = "foreign-edit"
SIZES = [(64, 64), (64, 64), (80, 48), (64, 64), (48, 80), (64, 64)]
"""Each the size of a bucket."""
READING = ("pixel-hint", "control-lora", "t2i-adapter")
"""Methods that read control images."""
REFERENCE_SIZES = [(50, 48), (81, 33), (50, 48)]

pytestmark = pytest.mark.usefixtures("foreign")


@pytest.fixture(scope="module")
def model(foreign: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Kontext."""
    directory = tmp_path_factory.mktemp("foreign") / "model"
    models.get(FAMILY).tiny(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a reference of another size for each, and a control image of the same size."""
    root, draw = tmp_path_factory.mktemp("pictures"), random.Random(0)

    def write(path: Path, width: int, height: int) -> None:
        path.parent.mkdir(exist_ok=True)
        Image.frombytes("RGB", (width, height), draw.randbytes(width * height * 3)).save(path)

    for number, size in enumerate(SIZES):
        write(root / "images" / f"{number}.png", *size)
        (root / "images" / f"{number}.txt").write_text(f"make it {number}")
        write(root / "references" / f"{number}.png", *REFERENCE_SIZES[number % 3])
        write(root / "controls" / f"{number}.png", *size)
    # The first and the fourth share a reference.
    (root / "references" / "3.png").write_bytes((root / "references" / "0.png").read_bytes())
    return root


@pytest.fixture
def make_run(model: Path, pictures: Path, tmp_path: Path) -> Callable[..., Run]:
    """A resolved run over the pictures; `beside` is `references` or `controls`."""

    def make(beside: str = "references", method: Any = None, name: str = "test", **sections: Any) -> Run:
        method = method or {"name": "lora", "rank": 2}
        takes_images = beside == "references" or method["name"] in READING
        shown = {"prompt": "make it blue", **({beside: [str(pictures / beside / "1.png")]} if takes_images else {})}
        tree: dict[str, Any] = {
            "run": name,
            "workspace": str(tmp_path / f"work-{beside}"),
            "model": {"family": FAMILY, "path": str(model), **sections.get("model", {})},
            "data": {
                "sources": [
                    {"path": str(pictures / "images"), beside: [str(pictures / beside)], **sections.get("source", {})}
                ],
                "resolutions": [64], "workers": 1,
            },
            "cache": {"device": "cpu", "text_dtype": "float32", "latents_dtype": "float32"},
            "method": method,
            "sample": {"prompts": [shown], "every": 2, "num_inference_steps": 2, "guidance_scale": 2.0, "device": "cpu"},
            "train": {
                "steps": 4, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
                "checkpoint_every": 2, "seed": 1, "device": "cpu", "trackers": [], "caption_dropout": 0.3,
                "validation": {"share": 0.2, "every": 2}, **sections.get("train", {}),
            },
        }  # fmt: skip
        return resolve(validate(RunConfig, tree, "the test"))

    return make


def encode(run: Run) -> CacheStore:
    """Prepare and cache; the open cache."""
    prepare.run(run)
    cache.run(run)
    return CacheStore.open(run.paths.cache)


def official(run: Run, **components: Any) -> Any:
    """diffusers' pipeline as it is, in fp32."""
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(run.config.model.path, dtype=torch.float32, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_captions_and_places_of_pictures_leave_memory_once_they_are_encoded(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large dataset has millions of them; only ids stay, and what the prompts name."""
    look_again, living = cache._look_again, set()

    def look(work: Any, part: Any) -> int:
        garbage.collect()
        objects = [each for each in garbage.get_objects() if type(each) in (TextItem, ImageItem)]
        prompts = {*work.prompts.items, *work.prompts.images}
        ids = {item for kind in work.kinds.values() for unit in kind.unit_ids for item in unit} - {each.id for each in prompts}
        assert len(ids) > len(SIZES)
        living.update(ids & {each.id for each in objects})
        return look_again(work, part)

    monkeypatch.setattr(cache, "_look_again", look)
    encode(make_run())
    assert not living


@pytest.mark.parametrize("family", ["foreign-edit", "foreign-seen"])
def test_each_sample_may_have_another_number_of_references(
    make_run: Callable[..., Run], pictures: Path, tmp_path: Path, family: str
) -> None:
    given: list[Any] = [None, [], ["0.png"], ["1.png", "2.png"], "0.png", ["2.png", "1.png", "0.png"]]
    rows = [
        {
            "image": str(pictures / "images" / f"{number}.png"),
            "text": f"make it {number}",
            "before": [str(pictures / "references" / name) for name in names] if isinstance(names, list) else names,
        }
        for number, names in enumerate(given)
    ]
    rows[4]["before"] = str(pictures / "references" / "0.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl"), "references": ["before"], "optional": True}
    run = make_run(source=source, model={"family": family}, train={"steps": 6})
    store = encode(run)
    counts = [0, 0, 1, 2, 1, 3]
    dataset = PreparedDataset.open(run.paths.prepared)
    assert [len(row.reference_ids) for row in dataset.rows()] == counts
    assert [len(dataset.reference_bytes(row)) for row in dataset.rows()] == counts
    assert [len(store.references(number)) for number in range(len(store))] == counts
    assert train.run(run, RunDelivery).step == 6


def test_a_method_that_reads_control_images_refuses_samples_without_any(
    make_run: Callable[..., Run], pictures: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "image": str(pictures / "images" / f"{number}.png"),
            "text": "x",
            "edge": [str(pictures / "controls" / f"{number}.png")] * number,
        }
        for number in (0, 1, 3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl"), "controls": ["edge"], "optional": True}
    run = make_run("controls", {"name": "pixel-hint"}, source=source)
    encode(run)
    with pytest.raises(CacheError, match=r"reads control images, and 1 of 3 samples have none. Name them under `controls`"):
        train.run(run, RunDelivery)


def test_fused_layers_of_another_program_are_split_by_the_pipelines_own_loader(model: Path, tmp_path: Path) -> None:
    """Names of Flux in sd-scripts, where one layer has queries, keys and values: no key map knows them, diffusers does."""
    family = models.get(FAMILY)
    denoiser = family.load_denoiser(model, torch.float32, CPU)
    width = denoiser.transformer_blocks[0].attn.to_q.weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=draw), torch.randn(3 * width, 2, generator=draw)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = tmp_path / "theirs.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}, path)
    file = adapter_files.read(path, family, {DENOISER: denoiser}, "--add", loading.pipeline_class(model))
    layers = file.layers[DENOISER]
    assert layers.keys() == {f"transformer_blocks.0.attn.to_{each}" for each in "qkv"}
    for number, name in enumerate("qkv"):
        change = layers[f"transformer_blocks.0.attn.to_{name}"].delta(torch.Size((width, width)))
        torch.testing.assert_close(change, 0.5 * up[number * width : (number + 1) * width] @ down, atol=1e-6, rtol=1e-5)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, "lora_unet_x.lora_up.weight": up.clone()}, path)
    with pytest.raises(CheckpointError, match="fit nothing"):
        adapter_files.read(path, family, {DENOISER: denoiser}, "--add", loading.pipeline_class(model))


def test_prepare_keeps_the_own_size_of_references(make_run: Callable[..., Run], pictures: Path) -> None:
    run = make_run()
    report = prepare.run(run)
    assert report.num_samples == len(SIZES)
    dataset = PreparedDataset.open(run.paths.prepared)
    rows = {row.key.split("-")[0]: row for row in dataset.rows()}
    for number, (width, height) in enumerate(SIZES):
        row = rows[str(number)]
        assert (row.bucket_width, row.bucket_height) == (width, height)
        expected = (REFERENCE_SIZES[number % 3][0] // 16 * 16, REFERENCE_SIZES[number % 3][1] // 16 * 16)
        assert (row.reference_widths, row.reference_heights) == ([expected[0]], [expected[1]])
        (data,) = dataset.reference_bytes(row)
        with Image.open(io.BytesIO(data)) as stored, Image.open(pictures / "references" / f"{number}.png") as original:
            assert stored.size == expected
            resized = original.resize(expected, Image.Resampling.LANCZOS)
            # libvips and Pillow round in other places.
            assert np.abs(np.asarray(stored).astype(int) - np.asarray(resized).astype(int)).mean() < 1
    assert rows["0"].reference_ids == rows["3"].reference_ids
    again = prepare.run(run)
    assert again.num_shards_reused == again.num_shards


def test_a_family_without_references_refuses_them(make_run: Callable[..., Run], tiny_model: Path) -> None:
    run = make_run(model={"family": "qwen-image", "path": str(tiny_model)})
    with pytest.raises(ConfigError, match=r"source images has `references`, and qwen-image takes no input images"):
        prepare.run(run)


@torch.no_grad()
def test_cached_items_equal_the_official_pipelines(make_run: Callable[..., Run]) -> None:
    run = make_run()
    with closing(encode(run)) as store:
        pipeline, dataset = official(run), PreparedDataset.open(run.paths.prepared)
        prepared = {row.key: dataset.reference_bytes(row) for row in dataset.rows()}
        assert store.manifest.normalisation["latents_mean"] == [pytest.approx(0.1159)] * 16
        for number in range(len(store)):
            text = store.text(number)
            embeds, pooled, _ = pipeline.encode_prompt(
                f"make it {store.sample(number).key[0]}", max_sequence_length=24, device=CPU
            )
            torch.testing.assert_close(text["embeds"], embeds[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(text["pooled"], pooled[0], atol=1e-6, rtol=0)
            (data,) = prepared[store.sample(number).key]
            with Image.open(io.BytesIO(data)) as reference:
                pixels = pipeline.image_processor.preprocess(reference)
            theirs = pipeline._encode_vae_image(image=pixels, generator=None)
            (ours,) = store.references(number)
            # GroupNorm sums in another order by memory layout.
            torch.testing.assert_close(ours, theirs[0], atol=1e-3, rtol=0)
        # Four images share three references, and each is stored once.
        references = {reference for number in range(len(store)) for reference in store.sample(number).references}
        assert len(references) == len(SIZES) - 1


def test_a_second_run_encodes_nothing_and_a_new_reference_alone(make_run: Callable[..., Run], pictures: Path) -> None:
    run = make_run()
    encode(run).close()
    again = cache.run(run)
    assert (again.num_latents_encoded, again.num_texts_encoded) == (0, 0)
    reference = pictures / "references" / "5.png"
    before = reference.read_bytes()
    try:
        Image.new("RGB", (48, 48), "red").save(reference)
        prepare.run(run)
        changed = cache.run(run)
    finally:
        reference.write_bytes(before)
    assert (changed.num_latents_encoded, changed.num_texts_encoded) == (1, 0)


def test_texts_that_see_references_are_encoded_beside_each_samples_own(make_run: Callable[..., Run], pictures: Path) -> None:
    preserved = {"preservation": {"replace": {"make it 0": "leave it", "make it": "turn it"}}}
    run = make_run(model={"family": "foreign-seen"}, train={"steps": 2, "loss": preserved})
    with torch.no_grad(), closing(encode(run)) as store:
        pipeline, dataset = official(run), PreparedDataset.open(run.paths.prepared)
        prepared = {row.key: dataset.reference_bytes(row) for row in dataset.rows()}

        def rise(text: dict[str, torch.Tensor], caption: str) -> float:
            embeds = pipeline.encode_prompt(caption, max_sequence_length=24, device=CPU)[0][0]
            rises = text["embeds"] - embeds
            assert rises.std() < 1e-5
            return float(rises.mean())

        def mean(file: Any) -> float:
            with Image.open(file) as image:
                return float(np.asarray(image).mean() / 127.5 - 1)

        for number in range(len(store)):
            key = store.sample(number).key
            expected = pytest.approx(mean(io.BytesIO(prepared[key][0])), abs=1e-4)
            assert rise(store.text(number), f"make it {key[0]}") == expected
            assert rise(store.empty_text(number), "") == expected
            kept = store.preserved_text(number, 0)
            assert kept is not None
            assert rise(kept, "leave it" if key[0] == "0" else f"turn it {key[0]}") == expected
        # Six captions and what is preserved beside each, an empty one beside each of the five references, the prompt with its
        # empty one, and the empty one alone.
        assert store.index("texts").num_rows == 6 + 6 + 5 + 2 + 1
        (prompt,) = run.config.sample.entries
        expected = mean(pictures / "references/1.png")
        assert rise(store.prompt(prompt.key()), "make it blue") == pytest.approx(expected, abs=0.02)
    train.run(run, RunDelivery)
    assert (run.paths.run / "checkpoints").is_dir()
    again = cache.run(run)
    assert (again.num_latents_encoded, again.num_texts_encoded) == (0, 0)


@torch.no_grad()
def test_predictions_with_references_equal_the_official_pipelines(make_run: Callable[..., Run]) -> None:
    run = make_run(model={"guidance": 2.5})
    with closing(encode(run)) as store:
        (reference,), text = store.references(1), store.text(1)
    pipeline = official(run)
    calls: list[tuple[Any, torch.Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _module, _arguments, options, output: calls.append((options, output[0])), with_kwargs=True
    )
    latents = pipeline(
        image=reference[None], **run.family.pipeline_texts(text), height=64, width=96, max_area=64 * 96, _auto_resize=False,
        num_inference_steps=3, guidance_scale=2.5, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip

    loaded = load_model(run.family, Path(run.config.model.path), (), torch.float32, CPU)
    noisy = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(texts=run.family.collate_texts([text]), references=(reference[None],))
    sigmas = pipeline.scheduler.sigmas
    for (now, following), (_, output) in zip(itertools.pairwise(sigmas), calls, strict=True):
        velocity = run.family.predict(loaded, noisy, now[None], conditions)
        theirs = pipeline._unpack_latents(output[:, :24], 64, 96, pipeline.vae_scale_factor)
        torch.testing.assert_close(velocity, theirs, atol=1e-5, rtol=0)
        noisy = noisy + (following - now) * velocity
    torch.testing.assert_close(noisy, pipeline._unpack_latents(latents, 64, 96, 8), atol=1e-4, rtol=0)


def test_garbage_of_a_cache_with_references_is_collected(make_run: Callable[..., Run]) -> None:
    encode(make_run()).close()
    run = make_run(source={"suffix": ", please"})
    with closing(encode(run)) as store:
        before = store.table
    report = gc.run(Path(run.paths.cache), remove=True)
    assert report.garbage
    with closing(CacheStore.open(run.paths.cache)) as store:
        assert store.table.to_pylist() == before.to_pylist()
        assert store.references(0)


def test_a_micro_batch_has_one_size_and_one_list_of_reference_sizes(make_run: Callable[..., Run]) -> None:
    run = make_run(train={"validation": {"share": 0.0}, "micro_batch_size": 2, "global_batch_size": 2})
    with closing(encode(run)) as store:
        order = inputs.build_order(run.config, store)
        shapes = []
        for micro_batch in itertools.chain.from_iterable(map(order.step, range(3 * order.steps_an_epoch))):
            rows = [store.sample(draw.sample) for draw in micro_batch]
            one = {(r.bucket_width, r.bucket_height, *r.reference_widths, *r.reference_heights) for r in rows}
            assert len(one) == 1
            shapes.append((len(rows), *one.pop()))
        # Of the squares two share the size of their references, and one has another.
        assert {(2, 64, 64, 48, 48), (1, 64, 64, 80, 32)} <= set(shapes)


def test_the_memory_plan_counts_every_block_references_and_extra_networks(make_run: Callable[..., Run]) -> None:
    run, hinted = make_run(), make_run("controls", {"name": "pixel-hint"})
    for each in (run, hinted):
        encode(each).close()
    planned = inputs.open_inputs(run, CPU)
    with closing(planned.store):
        assert planned.sizes.plan.num_blocks == 4
        assert planned.workload.reference_tokens in (9, 10)
        without = memory.Workload(
            **{name: getattr(planned.workload, name) for name in ("height", "width", "text_tokens", "micro_batch_size")}
        )
        assert planned.workload.image_tokens(run.family) == without.image_tokens(run.family) + planned.workload.reference_tokens
        less = inputs.plan_sizes(run, planned.model, without, CPU).plan
        assert less.parts["activations"] < planned.sizes.plan.parts["activations"]
    other = inputs.open_inputs(hinted, CPU)
    with closing(other.store):
        network = other.sizes.num_trainable_parameters
        # Weights, gradients, two moments: 16 bytes per fp32 parameter, and its activations.
        assert other.sizes.plan.parts["extra networks"] > 16 * network > 0


def test_all_blocks_of_both_classes_can_be_checkpointed(make_run: Callable[..., Run]) -> None:
    loss_settings = {"preservation": {"prompt": "something else"}}
    run = make_run(train={"loss": loss_settings})
    encode(run).close()
    losses = []
    for settings in ({"checkpointing": "none"}, {"checkpointing": "all"}):
        made = make_run(name=f"run-{settings['checkpointing']}", train={"memory": settings, "loss": loss_settings})
        build = build_trainer(made, RunDelivery, device=CPU)
        with closing(build.inputs.store), closing(build.recorder):
            blocks = memory.blocks(build.trainer.model.denoiser, run.family)
            wrapped = [block for block in blocks if "forward" in vars(block)]
            assert len(wrapped) == (4 if settings["checkpointing"] == "all" else 0)
            batch = build.loader.step(0).batches[0][1]
            with torch.no_grad():
                for parameter in build.trainer.optimizer.parameters.values():
                    parameter += 0.1
            # The base's prediction is computed without a checkpoint, the other one with.
            loss = build.trainer.losses(batch).sum() + build.trainer.preservation_losses(batch).sum()
            loss.backward()
            gradients = [p.grad.clone() for p in build.trainer.optimizer.parameters.values()]
            losses.append((loss.detach(), gradients))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(*pair) for pair in zip(losses[0][1], losses[1][1], strict=True))
    assert placement.spread(2, 3) == [0, 1]


def test_target_groups_reach_their_own_blocks_alone(model: Path) -> None:
    family = models.get(FAMILY)
    denoiser = family.load_denoiser(model, torch.float32, torch.device("meta"))

    def chosen(group: str) -> list[str]:
        return targets.select(targets.denoiser_component(family, denoiser, group, "targets"), targets.linear_or_convolution)

    everything = set(chosen("all-linear"))
    assert everything == {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    attention = chosen("attention")
    assert "transformer_blocks.0.attn.to_out.0" in attention
    assert "single_transformer_blocks.1.attn.to_q" in attention
    assert not any("proj_out" in name or "embedder" in name for name in attention)


def finished(run: Run) -> train.TrainReport:
    report = train.run(run, RunDelivery)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("beside", "method"),
    [
        ("references", {"name": "lora", "rank": 2, "text_encoder": {}}),
        ("references", {"name": "full", "targets": "attention"}),
        ("controls", {"name": "pixel-hint"}),
        ("controls", {"name": "control-lora", "rank": 2, "targets": "attention"}),
        ("controls", {"name": "t2i-adapter", "width": 8}),
    ],
    ids=["lora-and-one-encoder", "full", "pixel-hint", "control-lora", "t2i-adapter"],
)
def test_a_run_resumes_to_the_same_bytes_samples_and_delivers(
    make_run: Callable[..., Run], beside: str, method: dict[str, Any]
) -> None:
    loss = {} if method["name"] == "full" else {"loss": {"preservation": {"replace": {"make": "do"}}}}
    whole = make_run(beside, method, name="whole", train=loss)
    encode(whole).close()
    report = finished(whole)
    assert report.step == 4
    assert report.best_step is not None, "validation has run"
    finished(make_run(beside, method, name="part", train={"steps": 2, **loss}))
    resumed = make_run(beside, method, name="part", train=loss)
    if loss:
        first, *others = (row["preservation_loss"] for row in read_metrics(whole.paths.run))
        assert first == 0
        assert max(value or 0 for value in others) > 0
    assert finished(resumed).num_steps_now == 2
    for file in sorted(whole.paths.checkpoints.glob("00000004/*.safetensors")):
        assert file.read_bytes() == (resumed.paths.checkpoints / "00000004" / file.name).read_bytes(), file.name

    # The pictures of training are those of `ftk sample`, which loads what was delivered and encodes the images itself.
    drawn = sample.run(whole)
    assert drawn.mean_difference > 0
    ((while_training, prompt),) = cells(whole.paths.run / "samples" / "step-00000004.png")
    assert prompt == "make it blue"
    _, (afterwards, _) = cells(Path(drawn.grid))
    difference = np.asarray(while_training).astype(int) - np.asarray(afterwards).astype(int)
    assert np.abs(difference).max() <= 1
    exported = export.export(whole)
    assert exported.step == 4
    assert all((Path(exported.directory) / name).is_file() for name in exported.files)


def test_an_exported_lora_loads_in_the_official_pipeline(make_run: Callable[..., Run]) -> None:
    run = make_run(
        method={"name": "lora", "rank": 2, "text_encoder": {}, "targets": "all-linear"}, train={"learning_rate": 0.05}
    )
    with closing(encode(run)) as store:
        text, (reference,) = store.text(0), store.references(0)
    finished(run)
    pipeline = official(run)
    before = pipeline.text_encoder(text["input_ids"][None]).pooler_output
    pipeline.load_lora_weights(run.paths.adapter)
    checkpoint = export.find_checkpoint(run, export.Choice())
    with export.trained(run, Path(run.config.model.path), checkpoint) as model, torch.no_grad():
        noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        conditions = Conditions(texts=run.family.collate_texts([text]), references=(reference[None],))
        ours = run.family.predict(model, noisy, torch.tensor([0.6]), conditions)
        pooled = model.encoders["text_encoder"](text["input_ids"][None]).pooler_output
        loaded = models.Model(family=run.family, schedule=model.schedule, denoiser=pipeline.transformer,
                              encoders={"text_encoder": pipeline.text_encoder})  # fmt: skip
        theirs = run.family.predict(loaded, noisy, torch.tensor([0.6]), conditions)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipeline.text_encoder(text["input_ids"][None]).pooler_output, pooled, atol=1e-5, rtol=1e-5)
    assert (pooled - before).abs().max() > 1e-4


def test_an_export_has_the_names_that_the_family_gives(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    encode(run).close()
    finished(run)
    report = export.export(run, "comfyui", tmp_path / "out")
    names = load_file(Path(report.directory) / report.files[0])
    assert all(name.startswith("transformer.") for name in names)
    assert "transformer.single_transformer_blocks.1.attn.to_k.alpha" in names
    with pytest.raises(ConfigError, match="has no kohya format here"):
        export.export(run, "kohya", tmp_path / "kohya")


def test_merging_agrees_for_an_edit_and_is_refused_where_there_is_nothing_to_merge(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, hinted = make_run(), make_run("controls", {"name": "pixel-hint"})
    for each in (run, hinted):
        encode(each).close()
        finished(each)
    assert merge.merge(run, tmp_path / "merged").difference < 1e-5
    with pytest.raises(ConfigError, match="nothing of it can be merged"):
        merge.merge(hinted, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_control_images_are_cached_as_the_pixels_of_their_bucket(make_run: Callable[..., Run], pictures: Path) -> None:
    run = make_run("controls", {"name": "pixel-hint"})
    with closing(encode(run)) as store:
        for number in range(len(store)):
            (item,) = store.control_items(number)
            assert item.keys() == {"pixels"}
            with Image.open(pictures / "controls" / f"{store.sample(number).key[0]}.png") as original:
                assert np.array_equal(item["pixels"].permute(1, 2, 0).numpy(), np.asarray(original))
        assert store.controls(0) == []


def prompted(make_run: Callable[..., Run], *prompts: dict[str, Any], **train: Any) -> Run:
    """A run of the method that reads pixels, with these prompts."""
    run = make_run("controls", {"name": "pixel-hint"}, train=train)
    return run.with_config(
        run.config.model_copy(
            update={"sample": validate(type(run.config.sample), {**run.config.sample.model_dump(), "prompts": prompts}, "test")}
        )
    )


def test_each_prompt_has_its_control_image_at_its_own_size_and_strength(
    make_run: Callable[..., Run], pictures: Path, tmp_path: Path
) -> None:
    control = str(pictures / "controls/2.png")  # 80x48
    shared = {"prompt": "make it blue", "controls": [control], "seed": 5}
    gray = {"make": "grayscale", "from": control}
    run = prompted(
        make_run, shared, {**shared, "size": "80x48"}, {**shared, "size": "80x48", "control_strength": 0, "controls": [gray]},
        steps=2, learning_rate=0.1, checkpoint_every=2,
    )  # fmt: skip
    with closing(encode(run)) as store:
        sizes = [tuple(store.prompt_images(each.key(), "controls")[0]["pixels"].shape) for each in run.config.sample.entries]
        assert sizes == [(3, 64, 64), (3, 48, 80), (3, 48, 80)]
    finished(run)
    report = sample.run(run)
    rows = cells_with_inputs(Path(report.grid))
    while_training = cells_with_inputs(run.paths.run / "samples/step-00000002.png")
    for number, size in enumerate([(64, 64), (80, 48), (80, 48)]):
        (base, prompt, shown), (drawn, _, _) = rows[2 * number : 2 * number + 2]
        (early, _, cached), scale = while_training[number], 192 // size[0] + bool(192 % size[0])
        assert prompt == "make it blue"
        # The sheets show the control images, those of the files and those of the cache alike.
        assert {image.size for image in (base, drawn, early, *shown, *cached)} == {(size[0] * scale, size[1] * scale)}
        assert np.array_equal(np.asarray(shown[0]), np.asarray(cached[0]))
        assert np.abs(np.asarray(early).astype(int) - np.asarray(drawn).astype(int)).max() <= 1
        # Without strength it is the base model, which is drawn without any control image.
        is_base = np.abs(np.asarray(drawn).astype(int) - np.asarray(base).astype(int)).max() <= 1
        assert is_base == (number == 2)
    with Image.open(control) as original:
        assert np.array_equal(np.asarray(rows[2][2][0].resize(original.size, Image.Resampling.NEAREST)), np.asarray(original))
    luma = np.asarray(rows[4][2][0])
    assert (luma == luma[..., :1]).all()
    assert np.ptp(luma) > 0
    # The card shows what its pictures were drawn from.
    card = (run.paths.adapter / "README.md").read_text()
    assert "| ![from](images/1-from-0.png) | ![1](images/1.png) | make it blue |" in card
    with Image.open(run.paths.adapter / "images/1-from-0.png") as picture:
        assert picture.size == while_training[1][2][0].size


def test_control_images_that_are_made_are_cached_as_those_that_are_given(make_run: Callable[..., Run], pictures: Path) -> None:
    blocks, photo = {"make": "blocks", "size": 16}, str(pictures / "controls/2.png")
    prompts = [{"prompt": "x", "controls": [{**blocks, "from": photo}]}, {"prompt": "x", "controls": [photo]}]
    config = make_run("controls", {"name": "pixel-hint"}, source={"controls": [blocks]}).config
    tree = {**config.model_dump(), "sample": {**config.sample.model_dump(), "prompts": prompts}}
    run = resolve(validate(RunConfig, tree, "the test"))
    with closing(encode(run)) as store:
        dataset = PreparedDataset.open(run.paths.prepared)
        made = {row.key: dataset.control_bytes(row) for row in dataset.rows()}
        for number in range(len(store)):
            (item,), (data,) = store.control_items(number), made[store.sample(number).key]
            assert np.array_equal(item["pixels"].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(data))))
        of_prompt, plain = (
            store.prompt_images(entry.key(), "controls")[0]["pixels"].permute(1, 2, 0).numpy()
            for entry in run.config.sample.entries
        )
    means = plain.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))
    assert np.abs(of_prompt.reshape(4, 16, 4, 16, 3) - means[:, None, :, None]).max() <= 0.5


def test_a_prompt_without_its_control_image_or_at_another_size_is_refused_before_weights_are_read(
    make_run: Callable[..., Run], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "build_trainer", lambda run, *_, **__: inputs.open_inputs(run, CPU))
    one = str(pictures / "controls/1.png")
    encode(prompted(make_run, {"prompt": "x", "controls": [one], "width": 80})).close()

    run = prompted(make_run, {"prompt": "x", "controls": [one]})
    with pytest.raises(CacheError, match=r"sample.prompts.0: 'x' is not in the cache with these images at this size. Run `ftk"):
        train.run(run, RunDelivery)
    with pytest.raises(ConfigError, match=r"sample.prompts.0: 'x' has no control image"):
        resolve(prompted(make_run, {"prompt": "x"}).config)
    encode(run).close()
    other = run.config.sample.model_copy(update={"width": 96})
    with pytest.raises(CacheError, match=r"controls.0 is in the cache at 64x64 px, and its picture is to have 96x64 px. Run"):
        train.run(run.with_config(run.config.model_copy(update={"sample": other})), RunDelivery)


def test_a_method_that_reads_controls_says_what_is_missing(make_run: Callable[..., Run]) -> None:
    latents = make_run("controls")
    encode(latents).close()
    run = make_run("controls", {"name": "pixel-hint"})
    with pytest.raises(CacheError, match=r"reads control images as pixels, and .* holds them as latents. Run `ftk cache"):
        inputs.open_inputs(run, CPU)
    encoded = cache.run(run)
    assert (encoded.num_latents_encoded, encoded.num_texts_encoded) == (len(SIZES) + 1, 0)
    inputs.open_inputs(run, CPU).store.close()
    without = make_run("controls", {"name": "pixel-hint"}, source={"controls": []})
    encode(without).close()
    with pytest.raises(CacheError, match="6 of 6 samples have none"):
        inputs.open_inputs(without, CPU)


def test_the_familys_own_settings_are_validated_and_part_of_what_a_run_is(make_run: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"`model.guidence` is not a setting. Did you mean `guidance`"):
        make_run(model={"guidence": 2.0})
    with pytest.raises(ConfigError, match=r"`model.guidance`: Input should be greater than 0"):
        make_run(model={"guidance": 0})
    assert make_run(model={"guidance": 2.0}).family.config.guidance == 2.0
    encode(make_run()).close()
    finished(make_run(train={"steps": 2}))
    with pytest.raises(CheckpointError, match=r"model.guidance: checkpoint None, now 1.0"):
        train.run(make_run(model={"guidance": 1.0}), RunDelivery)
    # Where texts are cut is part of the cache.
    with pytest.raises(CacheError, match=r"texts.max_text_tokens: expected 12, found 24"):
        train.run(make_run(model={"max_text_tokens": 12}), RunDelivery)


def test_sigmas_are_drawn_as_the_family_draws_them_unless_the_run_says_otherwise(make_run: Callable[..., Run]) -> None:
    plain = make_run().config.train.sigma
    assert (plain.sampling, plain.logit_mean, plain.shift) == ("logit_normal", 0.5, 3.0)
    own = make_run(train={"sigma": {"sampling": "uniform"}}).config.train.sigma
    assert (own.sampling, own.logit_mean, own.shift) == ("uniform", 0.0, 3.0)
    assert make_run(train={"sigma": {"shift": 1.5}}).config.train.sigma.shift == 1.5


@pytest.fixture
def run_with_words(make_run: Callable[..., Run], tiny_models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Run]:
    """A run over one picture, whose caption is `x <thing> x`, of a method that asks for new words."""
    folder = tmp_path / "words"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("x <thing> x")

    def make(family_name: str, words: dict[str, str | None], **settings: Any) -> Run:
        base = {"family": family_name, "path": str(tiny_models(family_name))}
        method = {"name": "new-words", "words": words, "rank": 2, **settings} if words else {"name": "lora", "rank": 2}
        run = make_run("controls", method, model=base, source={"path": str(folder), "controls": []})
        return resolve(run.config.model_copy(update={"sample": run.config.sample.model_copy(update={"prompts": ()})}))

    return make


@torch.no_grad()
@pytest.mark.parametrize(("family_name", "vectors"), [("stable-diffusion", 1), ("sdxl", 3)])
def test_new_words_are_encoded_as_textual_inversion_encodes_them(
    run_with_words: Callable[..., Run], family_name: str, vectors: int
) -> None:
    run = run_with_words(family_name, {"<thing>": "!"}, vectors=vectors)
    with closing(encode(run)) as store:
        ours = store.text(0)
    pipeline = models.get(family_name).pipeline(Path(run.config.model.path), torch.float32, CPU)
    for end in ("", "_2") if family_name == "sdxl" else ("",):
        tokenizer, encoder = (getattr(pipeline, f"{name}{end}") for name in ("tokenizer", "text_encoder"))
        start = tokenizer("!", add_special_tokens=False)["input_ids"][0]
        vector = encoder.get_input_embeddings().weight[start].clone()
        learned = {"<thing>": vector.expand(vectors, -1)}
        pipeline.load_textual_inversion(learned, tokenizer=tokenizer, text_encoder=encoder)
        first = tokenizer.convert_tokens_to_ids("<thing>")
        assert ours[f"input_ids{end}"].tolist()[2 : 2 + vectors] == list(range(first, first + vectors))
    theirs = pipeline.encode_prompt("x <thing> x", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["embeds"], theirs[0][0], atol=1e-5, rtol=0)
    if family_name == "sdxl":
        torch.testing.assert_close(ours["pooled"], theirs[2][0], atol=1e-5, rtol=0)


def test_a_cache_with_new_words_is_another_than_one_without(run_with_words: Callable[..., Run]) -> None:
    plain, words = run_with_words("qwen-image", {}), run_with_words("qwen-image", {"<thing>": None})
    encode(plain).close()
    with closing(inputs.open_cache(plain)) as store:
        assert store.text(0).keys() == {"embeds"}
    with pytest.raises(CacheError, match=r"texts.placeholder_tokens: expected .*<thing>.*, found nothing"):
        inputs.open_cache(words)
    assert cache.run(words).num_texts_encoded > 0, "other words are other texts"
    with closing(inputs.open_cache(words)) as store:
        text = store.text(0)
        assert text["input_ids"].shape == text["embeds"].shape[:1]
    for other in (
        plain,
        run_with_words("qwen-image", {"<thing>": "the"}),
        run_with_words("qwen-image", {"<thing>": None}, vectors=2),
    ):
        with pytest.raises(CacheError, match=r"texts.placeholder_tokens.*expected .*, found "):
            inputs.open_cache(other)
    assert cache.run(plain).num_texts_encoded == 0, "the texts without are still there"


@pytest.mark.parametrize(
    ("family_name", "words", "message"),
    [
        ("sdxl", {"<thing>": "!", "x": "!"}, r"the model's tokenizer has the word 'x' already"),
        ("qwen-image", {"<thing>": None, "background": None}, r"the model's tokenizer has the word 'background' already"),
        ("qwen-image", {"<|im_end|>": None}, r"the model's tokenizer has the word '<\|im_end\|>' already"),
        ("stable-diffusion", {"<thing>": "ab"}, r"'<thing>' has 1 vector and starts from 'ab', .* 2 tokens. Give it 2 vectors"),
        ("stable-diffusion", {"<thing>": None, "<thing>s": None}, r"'<thing>' is part of '<thing>s'"),
        ("stable-diffusion", {"<Thing>": None}, r"'<Thing>' has capital letters.* Write '<thing>'"),
        ("stable-diffusion", {"<thing>": "no <thing>"}, r"'<thing>' starts from 'no <thing>', which holds a new word"),
        ("stable-diffusion", {"a thing": None}, r"'a thing' is not a new word: .* no spaces"),
        ("stable-diffusion", {"<thing>": None, "<other>": None}, r"the new word '<other>' stands in no caption of"),
        (FAMILY, {"<thing>": None}, r"foreign-edit: its text encoder cannot be given new words, such as '<thing>'"),
    ],
)  # fmt: skip
def test_new_words_that_cannot_be_learned_are_refused_before_any_weights_are_read(
    run_with_words: Callable[..., Run], model: Path, family_name: str, words: dict[str, str | None], message: str,
    monkeypatch: pytest.MonkeyPatch, tiny_models: Callable[[str], Path],
) -> None:  # fmt: skip
    run = run_with_words(family_name if family_name != FAMILY else "sdxl", words)
    if family_name == FAMILY:
        tree = run.config.model_dump() | {"model": {"family": FAMILY, "path": str(model)}, "sample": {}}
        run = resolve(validate(RunConfig, tree, "the test"))
    prepare.run(run)
    monkeypatch.setattr("ftk.cache.fingerprint.weights_digest", lambda *_: pytest.fail("weights are read"))
    for stage in (cache.run, cache.dry_run):
        with pytest.raises((ConfigError, CacheError), match=message):
            stage(run)


def test_an_offloaded_text_encoder_takes_no_new_words(run_with_words: Callable[..., Run]) -> None:
    run = run_with_words("qwen-image", {"<thing>": None})
    config = run.config.model_copy(update={"cache": run.config.cache.model_copy(update={"offload": "layers"})})
    prepare.run(run)
    with pytest.raises(ConfigError, match=r"cache.offload: layers does not go with new words"):
        cache.run(run.with_config(config))


def test_class_images_that_a_method_needs_are_asked_for(
    make_run: Callable[..., Run], tiny_models: Callable[[str], Path]
) -> None:
    base = {"family": "sdxl", "path": str(tiny_models("sdxl"))}
    method = {"name": "new-words", "words": {}, "class_images": True}
    run = make_run("controls", method, model=base)
    prepare.run(run)
    with pytest.raises(CacheError, match=r"new-words needs class images, and .* has none. Add a source with `role: class`"):
        cache.run(run)


def test_neither_is_named_anywhere_in_the_package() -> None:
    import ftk

    names = ("foreign-edit", "foreign_edit", "pixel-hint", "pixel_hint", "new-words", "new_words")
    sources = list(Path(ftk.__file__).parent.rglob("*.py"))
    assert [path for path in sources for name in names if name in path.read_text().lower()] == []
    assert FAMILY in models.available()
    assert {"pixel-hint", "new-words"} <= set(methods.available())
