"""docs/cache.md must be true: its commands and programs run, its tables are complete, its outputs and messages are real."""

import contextlib
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ftk import storage
from ftk.cache import cache_summary, encode, fetch, fingerprint, plan, shards, stage, verify, view
from ftk.cache import gc as garbage
from ftk.cache.fetch import Download
from ftk.cache.store import CacheStore
from ftk.cli.app import app
from ftk.configs.schema import CacheConfig, TrainConfig
from ftk.contracts import CACHE_SCHEMA, CacheManifest
from ftk.errors import ConfigError
from ftk.models import base as families
from ftk.pipeline import stage as prepare
from ftk.run import load_run
from ftk.train import data

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "cache.md").read_text()
FAMILY = families.get("qwen-image")
MEASURED = ("estimated latents seconds", "estimated texts seconds", "images per second", "texts per second")
MEASURED += ("peak memory bytes", "device")
SUFFIXES = (shards.SHARD, shards.RECEIPT)


def _blocks(kind: str) -> dict[str, str]:
    """The code blocks marked `<!-- kind: NAME -->`."""
    found = re.findall(rf"<!-- {kind}: ([\w ]+) -->\n```\w+\n(.*?)```", GUIDE, re.DOTALL)
    assert found, kind
    return dict(found)


def _table(marker: str, nth: int = 0) -> list[list[str]]:
    """The cells of the Markdown table under a marker; without the header."""
    lines = GUIDE.split(f"<!-- {marker} -->\n")[nth + 1].split("\n")
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def _code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _plain(text: str) -> list[str]:
    """The lines of an output or message, with what differs from machine to machine and from picture to picture taken out."""
    text = re.sub(r"\b[0-9a-f]{16,}\b", "DIGEST", text.removeprefix("ftk: "))
    text = re.sub(r"\bprocess \d+ on \S+(?=\. )", "PROCESS", text)
    text = re.sub(r"\d\d:\d\d:\d\d", "CLOCK", text)
    text = re.sub(r"[\d,]+ bytes", "N bytes", text)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return [next((label for label in MEASURED if line.startswith(label)), line) for line in lines]


# The example, from the first command to the edited caption.


@dataclass(frozen=True)
class Walk:
    """What the commands of the guide's two blocks printed."""

    place: Path
    first: list[tuple[str, Any]]
    edit: list[tuple[str, Any]]


def _photos(place: Path) -> None:
    """The photos that the guide lists."""
    listing = re.search(r"```text\nphotos/\n(.*?)```", GUIDE, re.DOTALL)[1]
    for name, note in re.findall(r"^  (\S+) +(.+)$", listing, re.MULTILINE):
        path = place / "photos" / name
        path.parent.mkdir(exist_ok=True)
        if size := re.fullmatch(r"(\d+) x (\d+)", note):
            Image.effect_noise((int(size[1]), int(size[2])), 60).convert("RGB").save(path)
        else:
            path.write_text(f"{note}\n")


def _run(ftk: Callable[..., Any], block: str) -> list[tuple[str, Any]]:
    results = []
    for line in block.splitlines():
        command = line.partition("#")[0].strip()
        if echo := re.fullmatch(r'echo "(.*)" > (\S+)', command):
            Path(echo[2]).write_text(f"{echo[1]}\n")
            continue
        program, *arguments = command.split()
        assert program == "ftk"
        result = ftk(*arguments)
        assert result.code == 0, result.err
        results.append((command, result))
    return results


@pytest.fixture(scope="module", autouse=True)
def _hurry() -> Iterator[None]:
    """Leave out what takes most of the time of a small run: processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_pool", lambda *_: _InThisProcess())
        yield


class _InThisProcess(contextlib.nullcontext):
    def __enter__(self) -> Any:
        return SimpleNamespace(map=lambda function, tasks, size: map(function, tasks))


@pytest.fixture(scope="module")
def walk(ftk, tmp_path_factory) -> Walk:
    place = tmp_path_factory.mktemp("walk")
    _photos(place)
    commands = _blocks("run")
    with contextlib.chdir(place):
        return Walk(place=place, first=_run(ftk, commands["first"]), edit=_run(ftk, commands["edit"]))


def test_the_example_prints_what_the_guide_says(walk):
    (*_, (dry_command, dry), (_, first)), (_, (_, edited)) = walk.first, walk.edit
    assert dry_command.endswith("--dry-run")
    outputs = _blocks("output")
    assert _plain(outputs["dry run"]) == _plain(dry.out)
    assert _plain(outputs["plan"]) == _plain(first.err)
    assert _plain(outputs["report"]) == _plain(first.out)
    assert _plain(outputs["edited"]) == _plain(edited.err)


def test_the_commands_of_the_guide_exist_with_their_options():
    commands = typer.main.get_command(app).commands
    lines = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(ftk \w+[^`]*)`", GUIDE)
    found = [line.partition("#")[0].split("ftk ", 1)[1].split() for line in lines if re.search(r"(^|other )ftk ", line)]
    assert len(found) > 20
    for name, *arguments in found:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {one for one in arguments if one.startswith("--")} <= options, (name, arguments)
    configured = {setting for line in lines for setting in re.findall(r"--set ([\w.]+)=", line)}
    assert configured == {"model.path", "cache.path"}


# A dataset with masks and control images, and what changes encode again.

RUN = """
run: pets
workspace: work
model: {family: qwen-image, path: model}
data:
  sources: [{path: photos, masks: masks, controls: [depth]}]
  resolutions: [64]
  workers: 1
train: {steps: 2, precision: fp32}
sample: {prompts: [a red circle], num_inference_steps: 1}
"""
NUM_LATENTS, NUM_TEXTS = 9, 5


def _add(place: Path, name: str, caption: str) -> None:
    # Each its own colour, and no side that a bucket has: other settings give other pixels.
    colour = tuple(storage.digest(name).encode()[:3])
    for folder in ("photos", "masks", "depth"):
        (place / folder).mkdir(exist_ok=True)
        Image.new("RGB", (100, 70), colour).save(place / folder / f"{name}.png")
    (place / "photos" / f"{name}.txt").write_text(caption)


@pytest.fixture(scope="module")
def pets(walk, tmp_path_factory) -> Path:
    """A folder with a run file, its inputs, and their finished cache; to be copied, not changed. The model is a link."""
    place = tmp_path_factory.mktemp("pets")
    for name in ("cat", "dog", "owl"):
        _add(place, name, f"a {name}")
    (place / "run.yaml").write_text(RUN)
    (place / "model").symlink_to(walk.place / "tiny-model")
    with contextlib.chdir(place):
        run = load_run(Path("run.yaml"))
        prepare.run(run)
        written: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "committing", _noting(storage.committing, written))
            report = stage.run(run)
        (place / "written.json").write_text(json.dumps(written))
    assert (report.num_latents_encoded, report.num_texts_encoded) == (NUM_LATENTS, NUM_TEXTS)
    return place


def _noting(committing: Callable[..., Any], written: list[str]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def wrapped(path: Path) -> Iterator[Any]:
        with committing(path) as file:
            yield file
        written.append(str(path.resolve()))

    return wrapped


@pytest.fixture
def copy(pets, tmp_path, monkeypatch) -> Path:
    """A copy of the folder to change, which is the working directory too."""
    shutil.copytree(pets, tmp_path / "pets", symlinks=True)
    monkeypatch.chdir(tmp_path / "pets")
    return tmp_path / "pets"


def _edit(caption: str) -> Callable[[Path], Any]:
    return lambda place: (place / "photos/cat.txt").write_text(caption)


def _redraw(folder: str, name: str = "cat") -> Callable[[Path], Any]:
    return lambda place: Image.new("RGB", (100, 70), (1, 2, 3)).save(place / folder / f"{name}.png")


def _take_away_and_rename(place: Path) -> None:
    for folder, suffix in (("photos", "png"), ("photos", "txt"), ("masks", "png"), ("depth", "png")):
        (place / folder / f"owl.{suffix}").unlink()
        (place / folder / "below").mkdir(exist_ok=True)
        (place / folder / f"cat.{suffix}").rename(place / folder / "below" / f"tiger.{suffix}")


def _touch_model(*files: str) -> Callable[[Path], None]:
    """Another byte in each of these files, in a model folder of one's own."""

    def change(place: Path) -> None:
        _move_model(place)
        for file in files:
            path = next((place / "model").glob(file))
            data = bytearray(path.read_bytes())
            # In the last tensor's values, or in the white space at a JSON file's end.
            data[-1:] = bytes([data[-1] ^ 1]) if path.suffix == ".safetensors" else b"\n "
            path.write_bytes(data)

    return change


def _move_model(place: Path) -> None:
    model = (place / "model").resolve()
    (place / "model").unlink()
    shutil.copytree(model, place / "model")


def _upgrade(library: str) -> Callable[[pytest.MonkeyPatch], None]:
    version = importlib.metadata.version
    return lambda patch: patch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == library else version(name))


Change = Callable[[Path], Any] | Callable[[pytest.MonkeyPatch], Any] | dict[str, Any]
CHANGES: dict[str, list[Change]] = {
    "a caption": [_edit("a tabby cat")],
    "a caption, into one that another image has": [_edit("a dog")],
    "an image file": [_redraw("photos")],
    "a mask or control image": [_redraw("masks"), _redraw("depth")],
    "images are added": [lambda place: _add(place, "yak", "a yak")],
    "images are taken away, renamed, moved": [_take_away_and_rename],
    "`trigger`, `prefix`, `suffix`, `data.captions`": [
        {"data.sources.0.trigger": "cat"},
        {"data.sources.0.prefix": "photo: "},
        {"data.sources.0.suffix": ", 35 mm"},
    ],
    "`data.resolutions`, `crop`, `resize`, `background`, `image_format`": [
        {"data.resolutions": [96]},
        {"data.crop": "focus"},
        {"data.resize": "linear"},
        {"data.background": [0, 0, 0]},
        {"data.image_format": "jpeg"},
    ],
    "`data.flip`, more `crops` or resolutions": [{"data.flip": True}, {"data.resolutions": [64, 96]}],
    "`repeats`, `role`": [{"data.sources.0.repeats": 3}, {"data.sources.0.role": "class"}],
    "`sample.prompts`, `sample.negative_prompt`, `train.caption_dropout_text`": [
        {"sample.prompts": ["a red circle", "a blue square"]},
        {"sample.negative_prompt": "blurry"},
        {"train.caption_dropout": 0.1, "train.caption_dropout_text": "a picture"},
    ],
    "weights or configuration of the VAE": [_touch_model("vae/*.safetensors"), _touch_model("vae/config.json")],
    "weights or configuration of the text encoder or tokenizer": [
        _touch_model("text_encoder/*.safetensors"),
        _touch_model("text_encoder/config.json"),
        _touch_model("tokenizer/tokenizer_config.json"),
    ],
    "weights of the denoiser": [_touch_model("transformer/*.safetensors")],
    "the model's folder is moved or copied": [_move_model],
    "`cache.vae_dtype`, `cache.latents_dtype`": [{"cache.vae_dtype": "bfloat16"}, {"cache.latents_dtype": "float32"}],
    "`cache.text_dtype`, `cache.text_stored`": [{"cache.text_dtype": "float32"}, {"cache.text_stored": "float32"}],
    "`cache.full_hash`": [{"cache.full_hash": True}],
    "version of diffusers": [_upgrade("diffusers")],
    "version of transformers or tokenizers": [_upgrade("transformers"), _upgrade("tokenizers")],
    "version of torch": [_upgrade("torch")],
    "a version of ftk that encodes otherwise (`encoder_version`)": [
        lambda patch: patch.setattr(type(FAMILY), "encoder_version", FAMILY.encoder_version + 1)
    ],
    "every other setting of `cache` (but its `path`), `method` and `train`": [
        {
            "cache.device": "cpu", "cache.memory_gib": 0.5, "cache.image_batch": 3, "cache.text_batch": 2,
            "cache.shard_bytes": 5000, "cache.engine": "ray", "cache.processes": 2, "cache.download_gib": 1,
            "cache.download_dir": "elsewhere", "method.rank": 4, "train.seed": 3, "train.caption_dropout": 0.5,
        }
    ],
}  # fmt: skip


def test_every_change_of_the_table_is_tried():
    assert [row[0] for row in _table("encoded again")] == list(CHANGES)


@pytest.mark.parametrize(("what", "latents", "texts"), [tuple(row) for row in _table("encoded again")])
def test_a_change_encodes_again_what_the_guide_says(what, latents, texts, pets, tmp_path, monkeypatch):
    for number, change in enumerate(CHANGES[what]):
        place = tmp_path / str(number)
        shutil.copytree(pets, place, symlinks=True)
        monkeypatch.chdir(place)
        with pytest.MonkeyPatch.context() as patch:
            settings = change if isinstance(change, dict) else {}
            if not settings:
                change(patch if what.startswith(("version", "a version")) else place)
            run = load_run(Path("run.yaml"), [f"{name}={json.dumps(value)}" for name, value in settings.items()])
            prepare.run(run)
            planned = stage.dry_run(run)
        encoded = {"latents": planned["num_latents_to_encode"], "texts": planned["num_texts_to_encode"]}
        for kind, stated, number_of_all in (("latents", latents, NUM_LATENTS), ("texts", texts, NUM_TEXTS)):
            assert _meets(stated, encoded[kind], number_of_all), (change, kind, encoded[kind])


def _meets(stated: str, encoded: int, number_of_all: int) -> bool:
    if stated in ("-", "all"):
        return encoded == {"-": 0, "all": number_of_all}[stated]
    return encoded == 1 if stated.startswith("that ") else encoded > 0


def test_a_mask_and_a_picture_added_are_one_and_three_items(copy):
    _redraw("masks")(copy)
    _add(copy, "yak", "a yak")
    run = load_run(Path("run.yaml"))
    prepare.run(run)
    planned = stage.dry_run(run)
    assert (planned["num_latents_to_encode"], planned["num_texts_to_encode"]) == (1 + 3, 1)


def test_the_page_with_decoded_latents_is_written(copy, ftk):
    (command,) = re.findall(r"^ftk (inspect .*--html.*)$", GUIDE, re.MULTILINE)
    Path("tiny-model").symlink_to(Path("model").resolve())
    result = ftk(*command.split())
    assert result.code == 0, result.err
    assert Path("work/cache/inspect.html").stat().st_size > 10_000


# Settings.


def _default(name: str) -> str:
    value = CacheConfig.model_fields[name].default
    if value is None:
        return "-"
    return "`" + yaml.safe_dump(value).removesuffix("...\n").strip() + "`"


def test_every_setting_is_listed_with_its_default_and_none_that_is_not_there():
    listed = {_code(option)[0]: default for option, default, _ in _table("options: cache")}
    assert listed == {name: _default(name) for name in CacheConfig.model_fields}


def test_what_is_said_of_choices_is_so():
    for option, _, meaning in _table("options: cache"):
        choices = {one for one in get_args(CacheConfig.model_fields[_code(option)[0]].annotation) if isinstance(one, str)}
        assert choices <= {*_code(meaning), *_code(_default(_code(option)[0]))}, option
    posteriors = re.findall(
        r"^\| `(\w+)`(?: \(the default\))? \| [^|]+ \|$", GUIDE.split("| `train.posterior` |")[1], re.MULTILINE
    )
    assert tuple(posteriors[:3]) == get_args(TrainConfig.model_fields["posterior"].annotation)
    assert f"`{TrainConfig().posterior}` (the default)" in GUIDE


def test_the_sizes_of_batches_are_as_the_family_counts_them():
    def vae(dtype: torch.dtype) -> Any:
        return SimpleNamespace(dtype=dtype, config=SimpleNamespace(base_dim=96, dim_mult=[1, 2, 4, 4], input_channels=3))

    whole, half = (FAMILY.image_memory(vae(dtype), 1024, 1024) / 2**30 for dtype in (torch.float32, torch.bfloat16))
    assert (f"{whole:.1f}", f"{half:.1f}") == ("1.9", "1.1")
    assert (int(8 // whole), int(8 // half)) == (4, 7)
    text = SimpleNamespace(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    encoder = SimpleNamespace(model=SimpleNamespace(dtype=torch.bfloat16, config=SimpleNamespace(text_config=text)))
    assert round(FAMILY.text_memory(encoder, 200) / 2**20, -1) == 40
    for said in (
        *("about 1.9 GiB", "1.1 GiB in bfloat16", "four or seven", "about 40 MiB"),
        *(f"at most {encode._MAX_BATCH} items", "8 GiB of a GPU hold"),
    ):
        assert said in " ".join(GUIDE.split()), said
    assert (encode._DEFAULT_GPU_MEMORY_GIB, encode._DEFAULT_MEMORY_GIB["cpu"]) == (8, 1)


SAID = {
    r"safetensors files above (\d+) MiB": fingerprint._WHOLE_BYTES >> 20,
    r"last (\d+) KiB of every tensor": fingerprint._BLOCK_BYTES >> 10,
    r"up to (\d+) steps ahead": 2 * data._ANNOUNCED_STEPS,
    r"ahead, and (\w+) threads": {4: "four"}[fetch._THREADS],
    r"up to (\w+) times in all": {3: "three"}[fetch._TRIES],
    r"from at most (\d+) images": cache_summary._LATENTS_READ,
    r"the largest \(at most (\d+) MiB\)": garbage._MAX_SHARD_BYTES >> 20,
    r"where they are cut: ([\d,]+) tokens": f"{FAMILY.max_text_tokens:,}",
    r"the (\d+) before the caption": FAMILY.text_options()["prefix_tokens"],
}


@pytest.mark.parametrize("pattern", SAID)
def test_a_number_in_the_text_is_that_of_the_code(pattern):
    assert re.findall(pattern, " ".join(GUIDE.split())) == [str(SAID[pattern])]


def test_the_files_that_a_digest_covers_are_named():
    (named,) = re.findall(r"of the files that end in (.*?)\. Of", " ".join(GUIDE.split()))
    assert set(_code(named)) == fingerprint._RELEVANT


def test_the_bytes_of_a_sample_are_as_the_limits_say():
    cells = (1024 // FAMILY.geometry.factor) ** 2
    for tokens, latents, text, both, million in _table("sizes"):
        stated = [int(one.replace(",", "")) for one in (tokens, latents, text, both)]
        picture, caption = 2 * FAMILY.geometry.channels * cells * 2, stated[0] * FAMILY.text_token_bytes
        assert stated[1:] == [picture, caption, picture + caption]
        assert million == f"{(picture + caption) / 1e6:.1f} TB"


# The format.

TYPES = {
    pa.string(): "string",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.bool_(): "bool",
    pa.binary(16): "16 bytes",
    pa.list_(pa.string()): "list of string",
    pa.list_(pa.int32()): "list of int32",
}


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("samples", view.SAMPLE_SCHEMA),
        ("references", pa.schema(view.REFERENCE_FIELDS)),
        ("items", view.INDEX_SCHEMA),
        ("shards", view.SHARD_SCHEMA),
    ],
)
def test_every_column_is_listed_in_order_with_its_type(name, schema):
    listed = [(_code(column)[0], kind) for column, kind, _ in _table(f"columns: {name}")]
    assert listed == [(column.name, TYPES[column.type]) for column in schema]


def test_every_key_of_the_manifest_is_listed_in_order():
    assert [_code(key)[0] for key, _ in _table("fields: manifest")] == [entry.name for entry in fields(CacheManifest)]
    assert f"| `schema_version` | {CACHE_SCHEMA} |" in GUIDE


def test_receipts_are_as_the_guide_says(pets):
    listed = [_code(key)[0] for key, _ in _table("metadata: receipt")]
    found = list((pets / "work/cache").glob(f"*/*/*{shards.RECEIPT}"))
    items = [_code(column)[0] for column, *_ in _table("columns: items")]
    for path in found:
        schema = pa.parquet.read_schema(path) if hasattr(pa, "parquet") else storage.read_table(path).schema
        assert [key.decode() for key in schema.metadata if not key.startswith(b"ARROW")] == listed
        assert [*schema.names, "shard"] == items


def test_every_part_of_the_fingerprints_is_listed_with_its_kind(pets):
    encoders = json.loads((pets / "work/cache/cache.json").read_bytes())["encoders"]
    of = {kind: {name for name, _ in cache_summary.flat_parts(encoders[kind])} for kind in shards.KINDS}
    both = of["latents"] & of["texts"]
    expected = {name: "both" if name in both else kind for kind in shards.KINDS for name in of[kind]}
    assert {_code(part)[0]: kind for part, kind, _ in _table("parts")} == expected


def test_every_tensor_is_listed(pets, tiny_models):
    # An SD 2.x text encoder may be told of its padding; the tiny model's is not.
    found = {("attention_mask", 1)}
    for name in families.available():
        family = families.get(name)
        encoder = family.load_text_encoder(tiny_models(name), torch.float32, torch.device("cpu"))
        (item,) = family.encode_texts(encoder, ["a cat"])
        found |= {(key, tensor.dim()) for key, tensor in item.items()}
    for path in (pets / "work/cache").glob(f"*/*/*{shards.SHARD}"):
        with safe_open(str(path), framework="pt") as file:
            found |= {(name.split(".")[1], file.get_tensor(name).dim()) for name in file.keys()}  # noqa: SIM118
    listed = {
        (name.removeprefix("ID."), shape.split("]")[0].count(",") + 1)
        for names, _, shape, _ in _table("tensors")
        for name in _code(names)
    }
    assert found == listed


def test_the_tree_shows_every_file(pets):
    tree = re.search(r"```text\nwork/cache/\n(.*?)```", GUIDE, re.DOTALL)[1]
    above: list[str] = []
    shown = []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        above[len(indent) // 2 - 1 :] = [name.rstrip("/")]
        if not name.endswith("/"):
            shown.append("/".join(above))
    patterns = [re.sub("DIGEST|FINGERPRINT|NAME", "[0-9a-f]{16}", re.escape(name)) for name in shown]
    cache = pets / "work/cache"
    files = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in files), pattern
    for name in files:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_files_are_written_in_the_order_that_the_guide_gives(pets):
    written = [Path(name).relative_to(pets / "work/cache") for name in json.loads((pets / "written.json").read_text())]
    items = [path for path in written if path.parts[0] in shards.KINDS]
    receipts = [path for path in items if path.suffix == shards.RECEIPT]
    assert receipts
    assert items == [path.with_suffix(suffix) for path in receipts for suffix in SUFFIXES]
    assert [path.parts[0] for path in written[len(items) :]] == [*["view"] * 4, "cache.json"]


def test_names_are_the_digests_that_the_guide_defines(pets):
    scope: dict[str, Any] = {}
    exec(_blocks("code")["digest"], scope)
    digest, cache = scope["digest"], pets / "work/cache"
    manifest = json.loads((cache / "cache.json").read_bytes())
    for caption in ("", "a cat", 'ein Bär, 熊 \\ "x"'):
        assert digest(["text", caption], 32) == plan.text_id(caption)
    assert f"`{plan.text_id('')}`" in GUIDE
    assert manifest["empty_text"] == plan.text_id(" ")
    for kind in shards.KINDS:
        assert digest(manifest["encoders"][kind], 16) == manifest[f"{kind}_fingerprint"]
    for receipt in cache.glob(f"*/*/*{shards.RECEIPT}"):
        assert digest(storage.read_table(receipt)["id"].to_pylist(), 16) == receipt.stem
    emptied = json.dumps({**manifest, "digest": ""}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert scope["blake3"].blake3(emptied.encode()).hexdigest() == manifest["digest"]
    for name, blake3 in manifest["tables"].items():
        assert scope["blake3"].blake3((cache / f"view/{name}-{blake3[:16]}.parquet").read_bytes()).hexdigest() == blake3


READ_AND_KEEP = """
import sys
for name in ("ftk", "torch", "safetensors"):
    sys.modules[name] = None
exec(open("reader.py").read())
control = controls[0]["mean"]
numpy.savez("found.npz", mean=image["mean"], std=image["std"], embeds=text["embeds"], mask=mask["mask"], control=control)
"""


def test_the_reader_reads_what_ftk_reads_without_ftk_and_has_twenty_lines(copy):
    program = _blocks("code")["reader"]
    assert len([line for line in program.splitlines() if line.strip()]) == 20
    Path("reader.py").write_text(program)
    subprocess.run([sys.executable, "-c", READ_AND_KEEP], check=True, timeout=60)
    found = np.load("found.npz")
    store = CacheStore.open("work/cache")
    expected = dict(zip(("mean", "std"), store.latents(0), strict=True))
    expected |= {"embeds": store.text(0)["embeds"], "mask": store.mask(0), "control": store.controls(0)[0][0]}
    assert expected["embeds"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.array_equal(found[name].astype(np.float32), tensor.float().numpy()), name


@pytest.mark.parametrize("family", families.available())
def test_the_reader_reads_every_item_of_every_familys_cache(cached, tiny_models, tmp_path, monkeypatch, family):
    cached(model={"family": family, "path": str(tiny_models(family))})
    monkeypatch.chdir(tmp_path)
    reader: dict[str, Any] = {}
    exec(_blocks("code")["reader"], reader)
    stored = {}
    for path in Path("work/cache").glob("*/*/*.safetensors"):
        stored.update(load_file(path))
    tensors = {f"{item}.{name}": tensor for item in reader["items"] for name, tensor in reader["read"](item).items()}
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert np.array_equal(tensors[name].astype(np.float64), tensor.double().numpy()), name


# Trust.


def _shard(cache: Path, suffix: str = shards.SHARD) -> Path:
    return sorted(cache.glob(f"latents/*/*{suffix}"))[0]


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _table_file(cache: Path) -> Path:
    return next(cache.glob("view/samples-*"))


DAMAGES: dict[str, list[Callable[[Path], Any]]] = {
    "a shard is missing or has another size": [
        lambda cache: _shard(cache).unlink(),
        lambda cache: _shard(cache).write_bytes(_shard(cache).read_bytes()[:-1]),
    ],
    "a bit of a shard's header has flipped": [lambda cache: _flip(_shard(cache), 60)],
    "a bit of a tensor has flipped": [lambda cache: _flip(_shard(cache), -1)],
    "a receipt is missing or changed": [
        lambda cache: _shard(cache, shards.RECEIPT).unlink(),
        lambda cache: _flip(_shard(cache, shards.RECEIPT), 100),
    ],
    "`cache.json` or a table is changed": [
        lambda cache: _flip(cache / "cache.json", 100),
        lambda cache: _flip(_table_file(cache), 100),
    ],
}


def test_every_damage_of_the_table_is_tried():
    assert [row[0] for row in _table("damages")] == list(DAMAGES)


@pytest.mark.parametrize(("what", "quick", "deep", "again"), [tuple(row) for row in _table("damages")])
def test_a_damage_is_found_and_mended_as_the_guide_says(what, quick, deep, again, pets, tmp_path, monkeypatch):
    for number, damage in enumerate(DAMAGES[what]):
        place = tmp_path / str(number)
        shutil.copytree(pets, place, symlinks=True)
        monkeypatch.chdir(place)
        cache = Path("work/cache")
        damage(cache)
        for stated, found in ((quick, verify.run(cache)), (deep, verify.run(cache, deep=True))):
            assert bool(found.damages or found.set_aside) == (stated == "finds it"), what
        planned = stage.dry_run(load_run(Path("run.yaml")))
        # The photos' items of each kind fit into one shard.
        assert planned["num_latents_to_encode"] == (NUM_LATENTS if again == "its items" else 0)
        assert planned["num_texts_to_encode"] == 0


def test_a_cache_run_mends_what_the_quick_check_finds_and_verify_agrees(copy, ftk):
    before = {path: path.read_bytes() for path in Path("work/cache").rglob("*") if path.suffix in SUFFIXES}
    _shard(Path("work/cache")).write_bytes(b"")
    assert stage.run(load_run(Path("run.yaml"))).num_latents_encoded == NUM_LATENTS
    assert {path: path.read_bytes() for path in before} == before
    _flip(_shard(Path("work/cache")), -1)
    assert ftk("verify", "work", "--deep").code == 2
    assert [path.name for path in Path("work/cache").rglob("*.damaged")] == [_aside(before)]
    stage.run(load_run(Path("run.yaml")))
    assert {path: path.read_bytes() for path in before} == before
    assert ftk("gc", "work", "--yes").code == 0
    assert not list(Path("work/cache").rglob("*.damaged"))


def _aside(files: Mapping[Path, bytes]) -> str:
    (shard,) = (path.name for path in files if path.parts[2] == "latents" and path.suffix == shards.SHARD)
    return f"{shard}.damaged"


def _refused(ftk: Callable[..., Any], *arguments: str, code: int = 2) -> str:
    result = ftk(*arguments)
    assert result.code == code, result.out + result.err
    return result.err


def _unfinished(ftk: Callable[..., Any]) -> str:
    Path("work/cache/cache.json").unlink()
    return _refused(ftk, "train", "run.yaml", "--dry-run")


def _stale(ftk: Callable[..., Any]) -> str:
    settings = ["--set", "cache.latents_dtype=float32", "--set", "data.flip=true"]
    return _refused(ftk, "train", "run.yaml", "--dry-run", *settings)


def _prepared(ftk: Callable[..., Any]) -> str:
    Path("photos/cat.txt").write_text("a tabby cat")
    prepare.run(load_run(Path("run.yaml")))
    return _refused(ftk, "train", "run.yaml", "--dry-run")


def _prompt(ftk: Callable[..., Any]) -> str:
    settings = ["--set", "sample.every=1", "--set", "sample.prompts=[a dog on the moon]"]
    return _last_line(_refused(ftk, "train", "run.yaml", *settings))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _damaged(ftk: Callable[..., Any]) -> str:
    _shard(Path("work/cache")).unlink()
    return _refused(ftk, "train", "run.yaml", "--dry-run")


def _flipped(ftk: Callable[..., Any]) -> str:
    path = _shard(Path("work/cache"))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(byte ^ 1 for byte in data[start:]))
    return _last_line(_refused(ftk, "train", "run.yaml"))


def _newer(ftk: Callable[..., Any]) -> str:
    path = Path("work/cache/cache.json")
    path.write_text(path.read_text().replace(f'"schema_version": {CACHE_SCHEMA}', f'"schema_version": {CACHE_SCHEMA + 1}'))
    said = _refused(ftk, "train", "run.yaml", "--dry-run")
    assert _refused(ftk, "cache", "run.yaml") == said
    return said


def _part(ftk: Callable[..., Any]) -> str:
    shutil.rmtree("work/cache")
    result = ftk("cache", "run.yaml", "--part", "1/2", "--set", "cache.shard_bytes=5000")
    assert result.code == 0, result.err
    return re.sub(r"^\d+", "6", _last_line(result.err))


def _locked(ftk: Callable[..., Any]) -> str:
    with storage.lock(Path("work/cache")):
        assert ftk("verify", "work").code == 0
        said = {_refused(ftk, *command, code=4) for command in (("cache", "run.yaml"), ("gc", "work"))}
    (text,) = said
    return text


def _url(ftk: Callable[..., Any]) -> str:
    return _refused(ftk, "cache", "run.yaml", "--set", "cache.path=s3://bucket/dogs")


def _uploaded() -> Download:
    files = fsspec.filesystem("memory")
    for path in Path("work/cache").rglob("*"):
        if path.is_file():
            files.pipe(f"/bucket/dogs/{path.relative_to('work/cache')}", path.read_bytes())
    return Download(directory=Path("fetched"), max_bytes=1 << 30)


def _bound(_: Callable[..., Any]) -> str:
    with pytest.raises(ConfigError) as error:
        CacheStore.open("memory://bucket/dogs", Download(directory=_uploaded().directory, max_bytes=100))
    return _as_large_as_stated(str(error.value))


def _larger(ftk: Callable[..., Any]) -> str:
    _uploaded()
    largest = max(path.stat().st_size for path in Path("work/cache").rglob(f"*{shards.SHARD}"))
    settings = ["cache.path=memory://bucket/dogs", "cache.download_dir=fetched", f"cache.download_gib={(largest + 1) / 2**30}"]
    result = ftk("train", "run.yaml", "--dry-run", *(part for setting in settings for part in ("--set", setting)))
    assert result.code == 0, result.err
    (line,) = (line for line in result.err.splitlines() if "is larger" in line)
    return _as_large_as_stated(line)


def _as_large_as_stated(text: str) -> str:
    """The message with the numbers that the guide has in its place, and its URL."""
    stated = iter(re.findall(NUMBER, _blocks("message")["bound" if "allows N bytes" in " ".join(_plain(text)) else "larger"]))
    return re.sub(NUMBER, lambda _: next(stated), text).replace("memory://", "s3://")


NUMBER = r"\b\d[\d,.]*\b(?: [KMG]iB)?"
MESSAGES: dict[str, Callable[[Callable[..., Any]], str]] = {
    "part": _part,
    "unfinished": _unfinished,
    "stale": _stale,
    "prepared": _prepared,
    "prompt": _prompt,
    "damaged": _damaged,
    "flipped": _flipped,
    "newer": _newer,
    "locked": _locked,
    "url": _url,
    "larger": _larger,
    "bound": _bound,
}


def test_every_message_of_the_guide_is_tried():
    assert list(_blocks("message")) == list(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_the_real_one(name, copy, ftk):
    said, stated = ("\n".join(_plain(text)).split() for text in (MESSAGES[name](ftk), _blocks("message")[name]))
    assert said == stated


def test_two_run_files_share_items_but_not_the_view(copy, ftk):
    Path("other.yaml").write_text(Path("run.yaml").read_text().replace("workspace: work", "workspace: other"))
    Path("photos/cat.txt").write_text("a tabby cat")
    shared = ["--set", "cache.path=work/cache"]
    other = load_run(Path("other.yaml"), ["cache.path=work/cache"])
    prepare.run(other)
    assert stage.run(other).num_texts_encoded == 1
    assert "prepared dataset" in _refused(ftk, "train", "run.yaml", "--dry-run")
    again = stage.run(load_run(Path("run.yaml")))
    assert (again.num_latents_encoded, again.num_texts_encoded) == (0, 0)
    assert "prepared dataset" in _refused(ftk, "train", "other.yaml", "--dry-run", *shared)


# The page itself.


def _anchors(text: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in re.findall(r"^##+ (.*)", text, re.MULTILINE)}


def test_links_lead_somewhere():
    for file, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", GUIDE):
        assert anchor in _anchors((DOCS / file).read_text() if file else GUIDE), anchor
    assert all((DOCS / file).exists() for file in re.findall(r"\]\(([^#)]+)", GUIDE))


def test_the_places_for_measured_tables_are_there_or_filled():
    for heading, marker in (("### Stored precision", "rounding table"), ("## Speed", "speed tables")):
        assert f"<!-- {marker} -->" in GUIDE.split(heading)[1].split("\n## ")[0]


def _commands(sequence: Sequence[tuple[str, Any]]) -> list[str]:
    return [command.split()[1] for command, _ in sequence]


def test_the_example_goes_from_a_run_file_to_a_cache(walk):
    assert _commands(walk.first) == ["init", "tiny", "prepare", "cache", "cache"]
    assert _commands(walk.edit) == ["prepare", "cache"]
