"""What an item depends on: every change of the encoder is another fingerprint, of its own kind alone, and nothing else is."""

import importlib.metadata
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftk.cache import fingerprint
from ftk.cache.fingerprint import encoder_parts, of_parts, weights_digest, with_libraries
from ftk.cache.shards import KINDS
from ftk.configs.schema import RunConfig
from ftk.errors import ModelError
from ftk.models import base as families
from ftk.run import Run, resolve

FAMILY = families.get("qwen-image")
COMPONENTS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny model that may be changed."""
    for name in COMPONENTS:
        shutil.copytree(tiny_model / name, tmp_path / "model" / name)
    return tmp_path / "model"


@pytest.fixture
def _all_weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are sampled."""
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", -1)


def _run(**settings: Any) -> Run:
    """A run with these settings of the cache."""
    model = {"family": "qwen-image", "path": "unused"}
    tree = {"run": "test", "model": model, "data": {"sources": [{"path": "unused"}]}, "cache": settings}
    return resolve(RunConfig.model_validate(tree))


def _fingerprints(model: Path | None, **settings: Any) -> dict[str, str]:
    run = _run(**settings)
    return {kind: of_parts(with_libraries(kind, encoder_parts(kind, run, model))) for kind in KINDS}


def _changed(model: Path, change: Callable[[], Any], **settings: Any) -> set[str]:
    """Which kinds' fingerprints a change of the model's files, and the settings, change."""
    before = _fingerprints(model)
    change()
    after = _fingerprints(model, **settings)
    return {kind for kind in KINDS if after[kind] != before[kind]}


def _offsets(path: Path) -> tuple[int, dict[str, list[int]]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return 8 + length, {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}


def _flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def _weights(model: Path, component: str) -> Path:
    (path,) = (model / component).glob("*.safetensors")
    return path


def _component(directory: Path, **tensors: torch.Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "weights.safetensors")
    return directory


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("component", "kind"), [("vae", "latents"), ("text_encoder", "texts")])
def test_a_change_of_any_tensor_changes_the_one_kind(
    model: Path, component: str, kind: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", -1 if sampled else 1 << 30)
    path = _weights(model, component)
    start, offsets = _offsets(path)
    ordered = sorted(offsets.values())
    assert len(ordered) > 20
    for begin, end in (ordered[0], ordered[len(ordered) // 2], ordered[-1]):
        for place in (begin, (begin + end) // 2, end - 1):
            assert _changed(model, lambda place=place: _flip(path, start + place)) == {kind}


@pytest.mark.parametrize(
    ("file", "kind"),
    [("vae/config.json", "latents"), ("text_encoder/config.json", "texts"), ("tokenizer/tokenizer_config.json", "texts")],
)
def test_a_change_of_a_configuration_changes_the_one_kind(model: Path, file: str, kind: str) -> None:
    path = model / file
    assert _changed(model, lambda: path.write_text(path.read_text() + " ")) == {kind}


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"vae_dtype": "bfloat16"}, {"latents"}),
        ({"latents_dtype": "bfloat16"}, {"latents"}),
        ({"latents_dtype": "float32"}, {"latents"}),
        ({"text_dtype": "float32"}, {"texts"}),
        ({"text_stored": "float32"}, {"texts"}),
        ({"text_stored": "bfloat16"}, set()),
        ({"device": "cpu", "memory_gib": 0.1, "image_batch": 3, "text_batch": 5, "shard_bytes": 1 << 20}, set()),
        ({"engine": "ray", "processes": 3, "path": "elsewhere", "download_gib": 1, "download_dir": "there"}, set()),
    ],
)
def test_only_settings_that_shape_the_items_count(model: Path, settings: dict[str, Any], kinds: set[str]) -> None:
    assert _changed(model, lambda: None, **settings) == kinds


def test_the_template_changes_the_texts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**FAMILY.text_options(), "template": "another {}"}
    assert _changed(model, lambda: monkeypatch.setattr(type(FAMILY), "text_options", lambda _: options)) == {"texts"}


def test_our_own_encoding_changes_both(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = FAMILY.encoder_version + 1
    assert _changed(model, lambda: monkeypatch.setattr(type(FAMILY), "encoder_version", version)) == {"latents", "texts"}


@pytest.mark.parametrize(
    ("library", "kinds"),
    [
        ("torch", {"latents", "texts"}),
        ("diffusers", {"latents"}),
        ("transformers", {"texts"}),
        ("tokenizers", {"texts"}),
        ("pillow", set()),
    ],
)
def test_a_library_that_computes_a_kind_changes_it(
    model: Path, library: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def upgrade() -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == library else version(name))

    assert _changed(model, upgrade) == kinds


@pytest.mark.parametrize("name", ["README.md", "flax_model.msgpack", ".gitattributes", "model.onnx", "model.safetensors.lock"])
def test_a_file_that_no_encoder_reads_changes_nothing(model: Path, name: str) -> None:
    def add() -> None:
        for component in COMPONENTS:
            (model / component / name).write_bytes(b"something")

    assert _changed(model, add) == set()


def test_weights_under_another_name_are_others(model: Path) -> None:
    path = _weights(model, "vae")
    assert _changed(model, lambda: path.rename(path.with_name("other.safetensors"))) == {"latents"}


def test_pickled_weights_are_not_loaded(model: Path) -> None:
    """diffusers would load `diffusion_pytorch_model.bin` where there is no safetensors file; the digest leaves it out."""
    path = _weights(model, "vae")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        families.get("qwen-image").load_vae(model, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("_all_weights_are_large")
def test_a_copy_elsewhere_has_the_same_digest(model: Path, tmp_path: Path, full: bool) -> None:
    shutil.copytree(model, tmp_path / "copy" / "of it")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (model / "vae").iterdir():
        (linked / path.name).symlink_to(path)
    digest = weights_digest(model / "vae", full)
    assert weights_digest(tmp_path / "copy" / "of it" / "vae", full) == digest
    assert weights_digest(linked, full) == digest


@pytest.mark.usefixtures("_all_weights_are_large")
def test_full_sees_a_byte_between_the_samples(tmp_path: Path) -> None:
    directory = _component(tmp_path / "one", big=torch.randn(1 << 16), small=torch.randn(10))
    path = directory / "weights.safetensors"
    start, offsets = _offsets(path)
    sampled, full = weights_digest(directory), weights_digest(directory, full=True)
    _flip(path, start + offsets["big"][0] + 50_000)
    assert weights_digest(directory) == sampled
    assert weights_digest(directory, full=True) != full
    assert (sampled.split(":")[0], full.split(":")[0]) == ("sampled", "full")


@pytest.mark.usefixtures("_all_weights_are_large")
@pytest.mark.parametrize("name", ["big", "odd", "small", "tiny"])
def test_samples_see_any_tensor_that_was_trained(tmp_path: Path, name: str) -> None:
    tensors = {"big": torch.randn(1 << 15), "odd": torch.randn(1025), "small": torch.randn(10), "tiny": torch.randn(1)}
    before = weights_digest(_component(tmp_path / "one", **tensors))
    assert weights_digest(_component(tmp_path / "one", **tensors)) == before
    assert weights_digest(_component(tmp_path / "one", **{**tensors, name: tensors[name] * 1.001})) != before


@pytest.mark.usefixtures("_all_weights_are_large")
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_samples_see_the_first_middle_and_last_byte_of_a_tensor(tmp_path: Path, where: str) -> None:
    directory = _component(tmp_path / "one", a=torch.randn(1 << 15), b=torch.randn(1 << 15), c=torch.zeros(0))
    start, offsets = _offsets(directory / "weights.safetensors")
    before = weights_digest(directory)
    begin, end = offsets["b"]
    _flip(directory / "weights.safetensors", start + {"first": begin, "middle": (begin + end) // 2, "last": end - 1}[where])
    assert weights_digest(directory) != before


def test_small_weights_are_hashed_whole(tmp_path: Path) -> None:
    directory = _component(tmp_path / "one", big=torch.randn(1 << 16))
    start, _ = _offsets(directory / "weights.safetensors")
    before = weights_digest(directory)
    _flip(directory / "weights.safetensors", start + 50_000)
    assert weights_digest(directory) != before


def test_whether_weights_were_digested_whole_can_be_told(model: Path) -> None:
    for kind in KINDS:
        for full in (False, True):
            by_argument = encoder_parts(kind, _run(), model, full=full)
            assert encoder_parts(kind, _run(full_hash=full), model) == by_argument
            assert fingerprint.is_full(by_argument) == full
    assert not fingerprint.is_full(encoder_parts("latents", _run(), None))


def test_without_the_weights_the_other_parts_can_be_compared(model: Path) -> None:
    for kind in KINDS:
        parts, without = (encoder_parts(kind, _run(), place) for place in (model, None))
        assert set(parts) - set(without) == {"weights"}
        assert fingerprint.differences(without, parts) == []


def test_an_empty_file_among_the_weights_is_no_error(model: Path) -> None:
    (model / "tokenizer" / "added.txt").write_bytes(b"")
    assert weights_digest(model / "tokenizer", full=True)


@pytest.mark.usefixtures("_all_weights_are_large")
@pytest.mark.parametrize(
    "header",
    [
        *(
            "",
            "none",
            "[]",
            "null",
            '{"a":',
            '{"a":1}',
            '{"a":{}}',
            '{"a":{"data_offsets":null}}',
            '{"a":{"data_offsets":[0]}}',
        ),
        *('{"a":{"data_offsets":[0,1,2]}}', '{"a":{"data_offsets":["0","1"]}}', '{"a":{"data_offsets":[0.5]}}'),
        *('{"a":{"data_offsets":[16,0]}}', '{"a":{"data_offsets":[1,0]}}', '{"a":{"data_offsets":[-900,0]}}'),
    ],
)
def test_what_is_no_safetensors_file_is_a_model_error_that_names_it(tmp_path: Path, header: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)
    with pytest.raises(ModelError, match=rf"{path} is no safetensors file.*Download the model again"):
        weights_digest(tmp_path)


@pytest.mark.usefixtures("_all_weights_are_large")
@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\1\2\3", struct.pack("<Q", 8) + b"\xff" * 8),
        *(struct.pack("<Q", length) + b'{"a"' for length in (5, 2**31, 2**63, 2**64 - 1)),
    ],
    ids=["empty", "short", "no text", "cut", "2 GiB", "2^63", "2^64 - 1"],
)
def test_a_cut_safetensors_file_is_a_model_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="is no safetensors file"):
        weights_digest(tmp_path)


@pytest.mark.usefixtures("_all_weights_are_large")
def test_a_flipped_bit_of_a_header_is_another_digest_or_a_model_error(tmp_path: Path) -> None:
    directory = _component(tmp_path / "one", a=torch.randn(64), b=torch.randn(64))
    path = directory / "weights.safetensors"
    data, before = path.read_bytes(), weights_digest(directory)
    start, _ = _offsets(path)
    for place in range(start):
        for bit in range(8):
            _flip(path, place, bit)
            try:
                assert weights_digest(directory) != before
            except ModelError:
                pass
            finally:
                path.write_bytes(data)


def test_differences_are_shown_part_by_part() -> None:
    expected = {"dtype": "float32", "version": 2, "weights": {"vae": "a" * 50, "same": 1}, "new": "x", "nested": {"a": 1}}
    found = {"dtype": "bfloat16", "version": 2, "weights": {"vae": "b", "same": 1}, "old": "y", "nested": None}
    rows = fingerprint.differences(expected, found)
    assert rows == [
        ("dtype", "float32", "bfloat16"),
        ("weights.vae", "a" * 37 + "...", "b"),
        ("new", "x", "nothing"),
        ("nested", "{'a': 1}", "nothing"),
    ]
    assert fingerprint.differences(expected, expected) == []
    assert fingerprint.table(rows[:2], "cache.").splitlines() == [
        "  cache.dtype: expected float32, found bfloat16",
        f"  cache.weights.vae: expected {'a' * 37}..., found b",
    ]


def test_a_fingerprint_never_changes_between_versions() -> None:
    import blake3

    parts = {"family": "x", "weights": {"vae": "sampled:ab"}}
    assert of_parts(parts) == blake3.blake3(b'{"family":"x","weights":{"vae":"sampled:ab"}}').hexdigest()[:16]
    assert of_parts(dict(reversed(parts.items()))) == of_parts(parts)
