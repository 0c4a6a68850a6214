"""docs/data.md must be true: its examples are built as it lists them, run, and give what it says; its tables are complete."""

import io
import itertools
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from servers import fault_server, s3_server

from ftk.cli.app import app
from ftk.configs.schema import CaptionsConfig, DataConfig, GenerateConfig, RunConfig, SourceConfig
from ftk.contracts import RejectReason, SampleRow
from ftk.pipeline.conditions import base as conditions
from ftk.pipeline.dataset import PreparedDataset
from ftk.pipeline.sources import base as sources

GUIDE = (Path(__file__).parents[2] / "docs/data.md").read_text()
WEB = "https://images.example.com"
IMAGE_SUFFIXES = {".jpg", ".png", ".webp"}

Files = dict[str, bytes]


def _section(position: int) -> str:
    """The text from the heading before a position to the next one."""
    start = max(found.start() for found in re.finditer(r"^##+ ", GUIDE[:position], re.MULTILINE))
    end = re.search(r"^##+ ", GUIDE[start + 3 :], re.MULTILINE)
    return GUIDE[start : start + 3 + end.start()] if end else GUIDE[start:]


EXAMPLES = {
    found[1]: (found[2], _section(found.start()))
    for found in re.finditer(r"^<!-- example: (\w+) -->\n```yaml\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)
}


def _table(text: str, start: str) -> list[list[str]]:
    """The cells of the Markdown table that begins with `start`, a marker or its header; without the header."""
    lines = text[text.index(start) :].removeprefix(start if start.startswith("<!--") else "").split("\n")
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def _code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# Building what the listings show.


class Drawer:
    """Image files of drawn pictures, each another one."""

    def __init__(self, pictures: Path) -> None:
        self._pictures = itertools.cycle(sorted(path for path in pictures.iterdir() if path.suffix != ".txt"))
        self._sizes: dict[str, tuple[int, int]] = {}

    def draw(self, suffix: str, note: str = "", stem: str = "") -> bytes:
        """A picture; those of one stem have one shape, as an image and its masks and control images have."""
        image = Image.open(next(self._pictures)).convert("RGB")
        image = image.resize(self._sizes.setdefault(stem, image.size)) if stem else image
        if size := re.match(r"(\d+) x (\d+)", note):
            image = image.resize((int(size[1]), int(size[2])))
        options = {}
        if "EXIF" in note:
            exif = Image.Exif()
            exif[0x010F] = "a camera"
            options["exif"] = exif
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[suffix], **options)
        return buffer.getvalue()


def _listed(section: str) -> Iterator[tuple[str, str]]:
    """(path, what stands behind it) of each file in the section's listings; an archive's members are below it."""
    for listing in re.findall(r"```text\n(.*?)```", section, re.DOTALL):
        above: list[str] = []
        for line in listing.splitlines():
            indent, name, note = re.fullmatch(r"( *)(\S+)(?: {2,}(.*))?", line).groups(default="")
            above[len(indent) // 2 :] = [name.rstrip("/")]
            if not name.endswith(("/", *ARCHIVES)):
                yield "/".join(above), note


def _files(section: str, drawer: Drawer) -> Files:
    """What the listings and the blocks that are marked as files say; archives are packed."""
    files: Files = {
        name: text.encode() for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", section, re.DOTALL)
    }
    archives: dict[str, Files] = {}
    for path, note in _listed(section):
        archive, name = next(
            ((f"{top}{end}", name) for end in ARCHIVES for top, _, name in [path.partition(f"{end}/")] if name), ("", "")
        )
        suffix = PurePosixPath(path).suffix
        if note.startswith("= "):
            data = files[str(PurePosixPath(path).with_name(note[2:]))]
        elif suffix in IMAGE_SUFFIXES:
            data = drawer.draw(suffix, note, PurePosixPath(path).name.partition(".")[0])
        elif suffix == ".parquet":
            continue
        else:
            data = (note.replace(" ⏎ ", "\n") + "\n").encode()
        (archives.setdefault(archive, {}) if name else files)[name or path] = data
    return files | {path: ARCHIVES[PurePosixPath(path).suffix](members) for path, members in archives.items()}


def _tar(members: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _zip(members: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


ARCHIVES = {".tar": _tar, ".zip": _zip}


def _parquet(columns: dict[str, list[Any]], schema: pa.Schema | None = None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def _index_with_paths(section: str, _: Drawer) -> Files:
    rows = _table(section, "| path | alt | blip |")
    names = ("path", "alt", "blip")
    columns = {name: [row[position] or None for row in rows] for position, name in enumerate(names)}
    return {"scrape/index.parquet": _parquet(columns)}


def _tables_with_bytes(section: str, drawer: Drawer) -> Files:
    rows = _table(section, "| image | text |")
    suffixes = [".png" if "PNG" in image else ".jpg" for image, _ in rows]
    return {
        f"cats/part-{number}.parquet": _parquet(
            {"image": [drawer.draw(suffix) for suffix in suffixes], "text": [text for _, text in rows]}
        )
        for number in range(2)
    }


def _hub_folder(section: str, drawer: Drawer) -> Files:
    datasets = pytest.importorskip("datasets", reason='the hub source needs `datasets`: pip install "ftk[hub]"')
    captions = [_code(becomes) for _, becomes in _table(section, "| input |")]
    columns = {
        "image": [{"bytes": drawer.draw(".png"), "path": f"{number}.png"} for number in range(len(captions))],
        "label": list(range(len(captions))),
        "short": [short for short, _ in captions],
        "long": [long for _, long in captions],
    }
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64"), "short": text, "long": text})
    return {"pets/data/train-00000-of-00001.parquet": _parquet(columns, features.arrow_schema)}


def _four_tars(_: str, drawer: Drawer) -> Files:
    return {f"laion/{number:05d}.tar": _tar({"1.jpg": drawer.draw(".jpg"), "1.txt": b"a picture"}) for number in range(4)}


BUILT: dict[str, Callable[[str, Drawer], Files]] = {
    "tables": _index_with_paths,
    "bytes": _tables_with_bytes,
    "hub": _hub_folder,
    "big": _four_tars,
}


def _build(name: str, pictures: Path, folder: Path) -> Files:
    """Write an example's run file and local inputs into a folder; returns those that belong elsewhere, by URL."""
    run_file, section = EXAMPLES[name]
    drawer = Drawer(pictures)
    files = _files(section, drawer) | BUILT.get(name, lambda *_: {})(section, drawer)
    (folder / "run.yaml").write_text(run_file)
    for path, data in files.items():
        if "://" not in path:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    return {path: data for path, data in files.items() if "://" in path}


# Comparing what came out with what is said.


@dataclass
class Stated:
    """A row of a table `input | becomes`."""

    path: str | None
    reject: str | None = None
    captions: list[str] = field(default_factory=list)
    num_samples: int = 1
    has_mask: bool = False
    num_controls: int = 0
    copied: bool = False


def _stated(section: str) -> list[Stated]:
    return [_stated_row(*row) for row in _table(section, "| input | becomes |")]


def _stated_row(given: str, becomes: str) -> Stated:
    path = next(iter(_code(given)), None)
    words = re.sub(r"`[^`]*`", "", becomes)
    if words.startswith("rejected"):
        return Stated(path=path, reject=_code(becomes)[0])
    samples, controls = re.search(r"in (\d+) samples", words), re.search(r"(\d+) control", words)
    return Stated(
        path=path,
        captions=_code(becomes),
        num_samples=int(samples[1]) if samples else 1,
        has_mask="mask" in words,
        num_controls=int(controls[1]) if controls else 0,
        copied="copied" in words,
    )


def _check(name: str, folder: Path) -> None:
    dataset = PreparedDataset.open(folder / "work/prepared")
    stated = _stated(EXAMPLES[name][1])
    rejected = [row for row in stated if row.reject]
    rejects = dataset.rejects()
    assert [reject.reason for reject in rejects] == [row.reject for row in rejected]
    for reject, row in zip(rejects, rejected, strict=True):
        ends = sorted((f"/{reject.path}", f"/{row.path}"), key=len)
        assert ends[1].endswith(ends[0])
    rows = iter(dataset.rows())
    for row in (row for row in stated if not row.reject):
        for _ in range(row.num_samples):
            sample = next(rows)
            assert sample.captions == row.captions
            found = (sample.has_mask, sample.num_controls, sample.copied)
            assert found == (row.has_mask, row.num_controls, row.copied), sample.key
            if row.path:
                assert re.sub(r"\W+", "-", PurePosixPath(row.path).stem).replace("_", "-") in sample.key.replace("_", "-")
    assert next(rows, None) is None, "more samples than the guide states"


LOCAL = [name for name in EXAMPLES if name not in ("remote", "big")]


@pytest.mark.parametrize("name", LOCAL)
def test_an_example_gives_what_the_guide_says(name, ftk, pictures, tmp_path, monkeypatch):
    _build(name, pictures, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = ftk("prepare", "run.yaml", "--set", "data.workers=2")
    assert result.code == 0, result.err
    _check(name, tmp_path)


def test_the_remote_example_gives_what_the_guide_says(start, pictures, tmp_path):
    pytest.importorskip("moto", reason='S3 is played by moto: pip install "ftk[dev]"')
    pytest.importorskip("s3fs", reason='s3:// needs s3fs: pip install "ftk[s3]"')
    pytest.importorskip("aiohttp", reason='https:// needs aiohttp: pip install "ftk[http]"')
    remote = _build("remote", pictures, tmp_path)
    with fault_server() as web, s3_server() as s3:
        for url, data in remote.items():
            if url.startswith("s3://bucket/"):
                s3.put_object(Bucket="bucket", Key=url.removeprefix("s3://bucket/"), Body=data)
            else:
                web.files[url.removeprefix(WEB)] = data
        links = tmp_path / "links.jsonl"
        links.write_text(links.read_text().replace(WEB, web.url))
        # A process of its own: workers have the environment of whoever started the first of them.
        process = start("prepare", "run.yaml", "--set", "data.workers=2", cwd=tmp_path)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    _check("remote", tmp_path)


def test_the_last_part_of_the_big_example_puts_it_together(ftk, pictures, tmp_path, monkeypatch):
    _build("big", pictures, tmp_path)
    monkeypatch.chdir(tmp_path)
    first, second = (json.loads(ftk("prepare", "run.yaml", "--part", f"{part}/2", "--json").out) for part in (1, 2))
    assert (first["num_shards"], first["num_shards_missing"]) == (2, 2)
    assert (second["num_samples"], second["num_shards"], second["num_shards_missing"]) == (4, 4, 0)
    assert (tmp_path / "work/prepared/dataset.json").exists()


def test_the_commands_and_programs_around_the_shortest_example_run(ftk, pictures, tmp_path, monkeypatch, capsys):
    _build("shortest", pictures, tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.search(r"```sh\n(.*?)```", EXAMPLES["shortest"][1], re.DOTALL)[1].splitlines()
    for command in commands:
        program, *arguments = command.partition("#")[0].split()
        assert program == "ftk"
        result = ftk(*arguments)
        assert result.code == 0, result.err
        assert (tmp_path / "work").exists() == ("--dry-run" not in arguments)
    programs = dict(re.findall(r"<!-- code: (\w+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL))
    assert programs.keys() == {"pyarrow", "webdataset"}
    exec(programs["pyarrow"], {})
    assert "photos" in capsys.readouterr().out
    pytest.importorskip("webdataset", reason="one program of the guide needs webdataset: pip install webdataset")
    exec(programs["webdataset"], {})
    assert "a dog runs along a beach" in capsys.readouterr().out


# What the tables list.


def _options(kind: str) -> dict[str, str]:
    """Each option of the tables marked with a kind, and its default as it is written there."""
    found: dict[str, str] = {}
    marker = f"<!-- options: {kind} -->\n"
    for place in re.finditer(marker, GUIDE):
        for option, default, _ in _table(GUIDE[place.start() :], marker):
            (name,) = _code(option)
            assert name not in found, f"{name} is listed twice"
            found[name] = default
    return found


def _default(model: type[BaseModel], name: str) -> str:
    value = model.model_fields[name].default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        return "`{}`"
    plain = list(value) if isinstance(value, tuple) else value
    return "`" + yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip().strip("'") + "`"


OPTIONS = {
    "data": DataConfig,
    "source": SourceConfig,
    "captions": CaptionsConfig,
    "generate": GenerateConfig,
    **{name: sources.get(name).Settings for name in sources.available()},
    **{
        name.replace("-", "_"): conditions.get(name).Settings
        for name in conditions.available()
        if conditions.get(name).Settings.model_fields
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_is_listed_with_its_default_and_none_that_is_not_there(kind):
    assert _options(kind) == {name: _default(OPTIONS[kind], name) for name in OPTIONS[kind].model_fields}


def test_every_kind_of_control_image_is_listed():
    listed = [_code(name)[0] for name, _ in _table(GUIDE, "| `make` | control image |")]
    assert sorted(listed) == sorted([*conditions.available(), "module:function"])


def test_only_kinds_of_options_that_exist_are_listed():
    assert set(re.findall(r"<!-- options: (\w+) -->", GUIDE)) == set(OPTIONS)


def test_every_reject_reason_is_listed_in_order():
    listed = [_code(reason)[0] for reason, *_ in _table(GUIDE, "<!-- rejects -->\n")]
    assert listed == [reason.value for reason in RejectReason]


def test_every_column_of_a_row_is_listed_in_order():
    listed = [name for column, _ in _table(GUIDE, "<!-- columns -->\n") for name in _code(column)]
    assert listed == [column.name for column in fields(SampleRow)]


def test_every_run_file_is_valid_and_every_kind_of_source_has_one():
    kinds = set()
    for run_file, _ in EXAMPLES.values():
        config = RunConfig.model_validate(yaml.safe_load(run_file))
        for source in config.data.sources:
            sources.parse(source)
            kinds.add(sources.kind(source))
    assert kinds == set(sources.available())
    assert len(re.findall("```yaml", GUIDE)) == len(EXAMPLES), "an example without its marker"


def test_commands_and_links_of_the_guide_lead_somewhere():
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"(?:^|`|wrap \")ftk (\w+)", GUIDE, re.MULTILINE)) <= commands
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^##+ (.*)", GUIDE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= headings
