"""The caption check: what it names, and that it is silent about captions as people and programs sensibly write them."""

from typing import Any

import pyarrow as pa
import pytest

from ftk.configs.schema import SourceConfig
from ftk.contracts import CaptionFinding
from ftk.pipeline import caption_check

SENTENCES = [
    "a close portrait of a corgi with its tongue out, blossoming branches behind it",
    "two parrots, one blue and yellow, one red",
    "The image shows a wooden chair (oak, about 1920) beside a window. The light is soft.",
    'a shop sign that reads "OPEN 9:00 - 17:30" (closed on Sundays)',
    "aspect ratio (16:9), scale (1:50), John (3:16), a map at (1:2.5)",
    "a screenshot of a terminal with <html> tags, 50% zoom & a list: a, b | c",
    "a clock (10:30) on a wall :) and a face :((",
    "größe 猫 🐈, f(x) = x + 1",
]
TAGS = [
    r"1girl, zelda \(breath of the wild\), blue eyes, :d, ;), smile",
    r"2boys, fate \(series\), gawain \(fate/extra\), >:(, hat",
    "no humans, scenery, ^_^, mountain, 4k",
    "solo, rating:safe, score_9, score_8_up, source_anime",
    "1boy, (o)_(o), hat, cup, night",
]
JSON = ['{"objects": [{"name": "a cup"}, {}], "text": "[SALE]", "style": {"a": "b|c"}}']


def _check(captions: list[Any], name: str = "photos", **source: Any) -> list[CaptionFinding]:
    rows = [
        {
            "key": f"k{number}",
            "source": name,
            "role": source.get("role", "instance"),
            "captions": texts if isinstance(texts, list) else [texts],
        }
        for number, texts in enumerate(captions)
    ]
    types = [("key", pa.string()), ("source", pa.string()), ("role", pa.string()), ("captions", pa.list_(pa.string()))]
    schema = pa.schema(types)
    # Two tables: shards are looked at one after the other.
    tables = [pa.Table.from_pylist(part, schema=schema) for part in (rows[:2], rows[2:])]
    return caption_check.check(tables, [SourceConfig(path="p", name=name, **source)])


def _kinds(*captions: Any, **source: Any) -> list[str]:
    return [finding.kind for finding in _check(list(captions), **source)]


@pytest.mark.parametrize("captions", [SENTENCES, TAGS, JSON, SENTENCES + TAGS + JSON], ids=["sentences", "tags", "json", "all"])
@pytest.mark.parametrize("source", [{}, {"trigger": "ohwx"}, {"prefix": "photo of"}], ids=["plain", "trigger", "prefix"])
def test_sane_captions_pass_without_a_word(captions: list[str], source: Any) -> None:
    added = {"trigger": "ohwx, ", "prefix": "photo of "}
    before = "".join(added[name] for name in source)
    assert _kinds(*(before + caption for caption in captions), **source) == []


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a dog, (smile:1.2)", "weights"),
        ("(best quality : 1.4), a dog", "weights"),
        (r"(zelda \(botw\):1.3), a dog", "weights"),
        ("(a dog:2)", "weights"),
        ("((masterpiece)), a dog", "weights"),
        ("{{masterpiece}}, a dog", "weights"),
        ("a [dog:cat:0.5] on grass", "weights"),
        ("a dog <lora:detail:0.8>", "networks"),
        ("a dog <LyCO:detail:1>", "networks"),
        ("a photo of [trigger] on grass", "placeholders"),
        ("a photo of [name]", "placeholders"),
        ("a photo of a {}", "placeholders"),
        ("a photo of {subject} on grass", "placeholders"),
        ("a {red|blue} dog", "wildcards"),
        ("a {2$$red|blue|green} dog", "wildcards"),
        ("a {0.5::red|blue} dog", "wildcards"),
        ("a __colour__ dog", "wildcards"),
        ("x", "short"),
        (".", "short"),
        ("dog", "short"),
    ],
)
def test_what_is_probably_not_meant_is_named(caption: str, kind: str) -> None:
    (finding,) = _check([*SENTENCES, caption])
    assert (finding.kind, finding.num_samples) == (kind, 1)
    assert finding.examples[0].startswith("k8 (")
    assert caption_check.sentence(finding).startswith(f"1 sample has captions with {kind}: ")


def test_samples_are_counted_once_and_the_first_are_named() -> None:
    findings = _check([["a dog (smile:1.2)", "((smile)), a dog"], "a dog", *["a dog (hat:1.1)"] * 5])
    (finding,) = [finding for finding in findings if finding.kind == "weights"]
    assert finding.num_samples == 6
    assert finding.examples == ["k0 ((smile:1.2))", "k2 ((hat:1.1))", "k3 ((hat:1.1))"]


def test_a_dataset_of_names_may_have_one_word_a_caption() -> None:
    assert _kinds("dog", "cat", "horse", "two cats") == []
    assert _kinds("猫", "犬", *SENTENCES) == []
    assert _kinds("dog", *SENTENCES, caption="dog") == []
    assert _kinds("ohwx", *SENTENCES, trigger="ohwx") == []
    assert _kinds("ohwx, dog", *SENTENCES, trigger="ohwx") == ["short"]
    assert _kinds(
        "photo of x, 35 mm", *(f"photo of {text}, 35 mm" for text in SENTENCES), prefix="photo of", suffix=", 35 mm"
    ) == ["short"]


@pytest.mark.parametrize(
    ("lead", "source", "expected"),
    [
        ("a photo of ", {}, ["begins with 'a photo of'"]),
        ("corgi ", {}, ["begins with 'corgi'"]),
        ("a ", {}, []),
        ("there is a ", {}, []),
        ("ohwx dog, ", {"trigger": "ohwx dog"}, []),
        ("ohwx dog, a photo of ", {"trigger": "ohwx dog"}, ["begins with 'a photo of'"]),
        ("a photo of ", {"prefix": "a photo of"}, []),
        ("a photo of ", {"role": "class"}, []),
    ],
)
def test_what_every_caption_begins_with_is_named(lead: str, source: Any, expected: list[str]) -> None:
    captions = [lead + text for text in ("dog on grass", "cat on a mat", "horse at sea", "fox in snow", "owl at night")]
    details = [finding.detail for finding in _check(captions, **source)]
    assert len(details) == len(expected)
    assert all(text in detail for text, detail in zip(expected, details, strict=True))
    # Fewer captions may begin alike by chance, and one that differs is enough.
    assert _kinds(*captions[:4], **source) == []
    assert "invariant" not in _kinds(*captions, "two ducks on a pond", **source)


def test_tags_that_every_caption_has_are_named() -> None:
    captions = [f"{hair} hair, 1girl, hat, {place}" for hair, place in zip("abcdef", "uvwxyz", strict=True)]
    (finding,) = _check(captions)
    assert "has the tags '1girl', 'hat'" in finding.detail
    assert _kinds(*captions[:-1], "x hair, hat, z") == ["invariant"]
    assert _kinds(*captions[:-1], "x hair, cup, z") == []


def test_the_sources_own_caption_is_no_invariant() -> None:
    assert _kinds(*["a photo of a dog"] * 8, caption="a photo of a dog") == []


def test_sources_are_looked_at_by_themselves() -> None:
    rows = [("one", f"a photo of {number}") for number in range(5)] + [("two", text) for text in SENTENCES]
    table = pa.table({
        "key": [f"k{number}" for number in range(len(rows))], "source": [name for name, _ in rows],
        "role": ["instance"] * len(rows), "captions": [[text] for _, text in rows],
    })  # fmt: skip
    sources = [SourceConfig(path="p", name="one"), SourceConfig(path="p", name="two")]
    (finding,) = caption_check.check([table], sources)
    assert (finding.num_samples, "every caption of source one begins with" in finding.detail) == (5, True)
