"""Edit models through every stage: what is stored of references and of the texts that see them, and what is trained on it."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ftk.cache.store import CacheStore
from ftk.models import base as models
from ftk.pipeline.dataset import PreparedDataset
from ftk.train import sheet

CPU = torch.device("cpu")
FAMILY = "qwen-image-edit-plus"
AREA = 64 * 64
"""In place of a megapixel."""
REFERENCE_SIZES = [(100, 60), (64, 90)]
CAPTIONS = ["make it red", "remove the hat, keep the rest", "make it red", "larger"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of four edits: with one reference, two, the same two, and none."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)

    def write(name: str, width: int, height: int) -> None:
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(root / name)

    for number, size in enumerate(REFERENCE_SIZES):
        write(f"before{number}.png", *size)
    rows = []
    for number, (caption, references) in enumerate(zip(CAPTIONS, ([0], [0, 1], [0, 1], []), strict=True)):
        write(f"after{number}.png", 64, 64)
        names = [f"before{each}.png" for each in references]
        rows.append({"file_name": f"after{number}.png", "text": caption, "before": names})
    (root / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def workspace(ftk: Callable[..., Any], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file, its model, and what `ftk run` has made of them."""
    root = tmp_path_factory.mktemp("edit")
    models.get(FAMILY).tiny(root / "model")
    references = [str(pictures / f"before{number}.png") for number in (0, 1)]
    tree = {
        "run": "edit", "workspace": str(root / "work"),
        "model": {"family": FAMILY, "path": str(root / "model"), "reference_area": AREA},
        "data": {
            "sources": [{"path": str(pictures / "rows.jsonl"), "references": ["before"], "optional": True}],
            "resolutions": [64], "workers": 1,
        },
        "cache": {"device": "cpu", "text_dtype": "float32", "latents_dtype": "float32"},
        "method": {"name": "lora", "rank": 2},
        "train": {
            "steps": 4, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
            "checkpoint_every": 2, "caption_dropout": 0.3, "device": "cpu", "trackers": [],
        },
        "sample": {
            "prompts": [{"prompt": "make it blue", "references": references}, "a dog"], "every": 4, "num_inference_steps": 2,
            "guidance_scale": 2.0, "device": "cpu",
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    result = ftk("run", root / "run.yaml", "--json")
    assert result.code == 0, result.err
    return root


def pixels(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def test_a_reference_is_stored_at_both_sizes(workspace: Path) -> None:
    dataset = PreparedDataset.open(workspace / "work" / "prepared")
    rule = models.get(FAMILY).references
    assert rule is not None
    for row in dataset.rows():
        originals = REFERENCE_SIZES[: len(row.seen_ids)]
        assert list(zip(row.seen_widths, row.seen_heights, strict=True)) == [rule.seen_size(*size) for size in originals]
        for number, size in enumerate(originals):
            seen = pixels(dataset.span(row.shard, row.key, f"seen{number}").read())
            assert tuple(seen.shape[:0:-1]) == rule.seen_size(*size)
            assert row.reference_widths[number] * row.reference_heights[number] <= 1.6 * AREA


@torch.no_grad()
def test_cached_texts_are_the_familys_and_what_they_share_is_stored_once(workspace: Path) -> None:
    family, dataset = models.get(FAMILY), PreparedDataset.open(workspace / "work" / "prepared")
    encoder = family.load_text_encoder(workspace / "model", torch.float32, CPU)
    rows = {row.key: row for row in dataset.rows()}
    with closing(CacheStore.open(workspace / "work" / "cache")) as store:
        for number in range(len(store)):
            row = rows[store.sample(number).key]
            count = len(row.seen_ids)
            seen = [pixels(dataset.span(row.shard, row.key, f"seen{each}").read()) for each in range(count)]
            expected, empty = family.encode_texts(encoder, [*row.captions, " "], [seen, seen])
            torch.testing.assert_close(store.text(number)["embeds"], expected["embeds"], atol=2e-5, rtol=0)
            torch.testing.assert_close(store.empty_text(number)["embeds"], empty["embeds"], atol=2e-5, rtol=0)
            assert store.sample(number).text_lengths == [len(expected["embeds"])]
        # Captions with an empty one for each of three lists of references; two lists that are not empty; two prompts with an
        # empty one for the first; and the list of that one's references.
        assert store.index("texts").num_rows == (4 + 3) + 2 + (2 + 1) + 1
        shared = [store.sample(number).shared_text for number in range(len(store))]
        assert len(set(shared)) == 3
        lengths = dict(zip(*(store.index("texts")[name].to_pylist() for name in ("id", "length")), strict=True))
        assert min(lengths[each] for each in shared if each) > 10 * max(lengths[store.sample(0).texts[0]], 1)


def test_one_edited_caption_encodes_its_own_tokens_alone(workspace: Path, pictures: Path, ftk, tmp_path: Path) -> None:
    shutil.copytree(workspace / "work", tmp_path / "work")
    rows = (pictures / "rows.jsonl").read_text()
    (pictures / "rows.jsonl").write_text(rows.replace("remove the hat", "take the hat off"))
    try:
        ftk("prepare", workspace / "run.yaml", "--workspace", tmp_path / "work")
        cached = ftk("cache", workspace / "run.yaml", "--workspace", tmp_path / "work", "--json")
    finally:
        (pictures / "rows.jsonl").write_text(rows)
    report = json.loads(cached.out)
    assert (report["num_latents_encoded"], report["num_texts_encoded"]) == (0, 1)


def test_training_sees_references_and_their_texts(workspace: Path) -> None:
    report = json.loads((workspace / "work" / "runs" / "edit" / "report.json").read_text())
    assert report["step"] == 4
    assert (workspace / "work" / "runs" / "edit" / "samples" / "step-00000004.png").is_file()


def test_drawing_with_the_adapter_shows_what_training_showed_last(workspace: Path, ftk) -> None:
    result = ftk("sample", workspace / "run.yaml", "--json")
    assert result.code == 0, result.err
    samples = workspace / "work" / "runs" / "edit" / "samples"
    drawn = {prompt: [] for prompt in ("make it blue", "a dog")}
    for picture, prompt in sheet.cells(samples / "base-and-adapter.png"):
        drawn[prompt].append(np.asarray(picture).astype(int))
    trained = {prompt: np.asarray(picture) for picture, prompt in sheet.cells(samples / "step-00000004.png")}
    for prompt, pictures in drawn.items():
        assert len(pictures) >= 2
        assert np.abs(pictures[-1] - trained[prompt]).max() <= 2
    assert "prompt_embeds_mask" not in result.err


def test_kill_and_resume_give_the_same_bytes(workspace: Path, ftk, tmp_path: Path) -> None:
    shutil.copytree(workspace / "work", tmp_path / "work")
    run = tmp_path / "work" / "runs" / "edit"
    whole = (run / "checkpoints" / "00000004" / "adapter.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "00000004")
    resumed = ftk("train", workspace / "run.yaml", "--workspace", tmp_path / "work", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["num_steps_now"] == 2
    assert (run / "checkpoints" / "00000004" / "adapter.safetensors").read_bytes() == whole


def test_more_references_than_the_model_takes_are_rejected(workspace: Path, pictures: Path, ftk, tmp_path: Path) -> None:
    row = {"file_name": "after0.png", "text": "mix", "before": ["before0.png"] * 4}
    (pictures / "many.jsonl").write_text(f"{json.dumps(row)}\n")
    settings = ["--set", f"data.sources.0.path={pictures / 'many.jsonl'}", "--workspace", tmp_path / "work", "--json"]
    prepared = ftk("prepare", workspace / "run.yaml", *settings)
    assert "after0.png: too_many_references (it has 4 references, and the model takes 3 at most)" in prepared.err
    prompt = [{"prompt": "mix", "references": [str(pictures / "before0.png")] * 4}]
    refused = ftk("cache", workspace / "run.yaml", "--set", f"sample.prompts={json.dumps(prompt)}")
    assert refused.code == 2
    assert "sample.prompts.0.references: 4 input images, and the model takes 3 at most" in refused.err
