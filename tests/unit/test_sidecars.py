"""Which caption file belongs to which image: exact names first, then those that differ in case or Unicode form alone."""

import posixpath
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftk.locations import File
from ftk.pipeline import sidecars
from ftk.pipeline.names import Nearest, folded

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def _match(names: Sequence[str], suffixes: Sequence[str] = sidecars.SUFFIXES) -> sidecars.Matches:
    images = [name for name in names if name.lower().endswith((".jpg", ".png"))]
    others = {name: File(location=name, relative=name, signature="") for name in names if name not in images}
    return sidecars.match(sidecars.FolderFiles(images=images, others=others), suffixes)


def _captions(*names: str, suffixes: Sequence[str] = sidecars.SUFFIXES) -> dict[str, str]:
    return {image: file.relative for image, file in _match(names, suffixes).captions.items()}


def _unmatched(*names: str) -> dict[str, tuple[str, str]]:
    return {name: (image, why) for name, image, why in _match(names).unmatched}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("IMG_1.JPG", "img_1.txt"), {"IMG_1.JPG": "img_1.txt"}),
        (("IMG_2.JPG", "IMG_2.JPG.txt"), {"IMG_2.JPG": "IMG_2.JPG.txt"}),
        (("IMG_2.JPG", "img_2.jpg.TXT"), {"IMG_2.JPG": "img_2.jpg.TXT"}),
        ((f"{NFC}.jpg", f"{NFD}.txt"), {f"{NFC}.jpg": f"{NFD}.txt"}),
        ((f"{NFD}.jpg", f"{NFC}.txt"), {f"{NFD}.jpg": f"{NFC}.txt"}),
        ((f"{NFD.upper()}.jpg", f"{NFC}.txt"), {f"{NFD.upper()}.jpg": f"{NFC}.txt"}),
        (("a.jpg", "a.png", "A.txt"), {"a.jpg": "A.txt", "a.png": "A.txt"}),
        (("a.jpg", "A.txt", "A.json"), {"a.jpg": "A.txt"}),
        # The exact name goes before any other.
        (("a.jpg", "A.txt", "a.json"), {"a.jpg": "a.json"}),
        (("a.jpg", "a.txt", "a.jpg.txt"), {"a.jpg": "a.txt"}),
        (("a.jpg", "a.jpg.png", "a.jpg.txt"), {"a.jpg.png": "a.jpg.txt"}),
        # Never one of two.
        (("a.jpg", "A.jpg", "A.txt"), {"A.jpg": "A.txt"}),
        (("IMG.jpg", "img.jpg", "Img.txt"), {}),
        (("IMG.jpg", "img.txt", "Img.txt"), {}),
        (("IMG.jpg", "img.txt", "img.jpg.txt"), {}),
        (("IMG.jpg", "IMG.JPG", "img.jpg.txt"), {}),
        (("IMG.jpg", "IMG.txt", "Img.jpg", "img.txt"), {"IMG.jpg": "IMG.txt"}),
        (("a.jpg", "b.txt", "a.tags"), {}),
    ],
)
def test_a_caption_file_is_found_by_its_images_name(names: tuple[str, ...], expected: dict[str, str]) -> None:
    assert _captions(*names) == expected


@pytest.mark.parametrize(
    ("names", "unmatched", "image", "why"),
    [
        (("a.jpg", "a.tags"), "a.tags", "a.jpg", "caption_suffix: .tags"),
        (("A.jpg", "a.booru"), "a.booru", "A.jpg", "caption_suffix: .booru"),
        (("a.jpg", "README.md"), "README.md", "", "no image has this name"),
        (("IMG.jpg", "img.jpg", "Img.txt"), "Img.txt", "IMG.jpg", "fits IMG.jpg and img.jpg"),
        (("IMG.jpg", "img.txt", "Img.txt"), "Img.txt", "IMG.jpg", "as img.txt does"),
        (("IMG.jpg", "IMG.txt", "img.txt"), "img.txt", "IMG.jpg", "as the caption file of exactly this name does"),
    ],
)
def test_a_text_file_of_no_image_is_named_with_the_likely_one(
    names: tuple[str, ...], unmatched: str, image: str, why: str
) -> None:
    found = _unmatched(*names)
    assert found[unmatched][0] == image
    assert why in found[unmatched][1]


def test_what_is_no_caption_or_beside_one_is_not_reported() -> None:
    assert _unmatched("a.jpg", "a.txt", "a.json", "a.jpg.json", "a.tags", "a.npz", "b.npz", "c.mp4", "notes", "x.csv") == {}
    assert _unmatched("a.jpg", "a.npz", "a.mp4", "a.xmp", "a") == {}


def test_caption_files_may_end_in_anything() -> None:
    names = ("a.jpg", "a.txt", "a.tags.txt", "b.jpg", "b_caption.txt", "C.jpg", "c.TAGS.TXT")
    assert _captions(*names, suffixes=[".tags.txt", "_caption.txt"]) == {
        "a.jpg": "a.tags.txt",
        "b.jpg": "b_caption.txt",
        "C.jpg": "c.TAGS.TXT",
    }
    assert _captions(*names, suffixes=[".txt", ".tags.txt"]) == {"a.jpg": "a.txt", "C.jpg": "c.TAGS.TXT"}


def test_the_likely_image_may_lie_in_another_folder_or_be_spelt_otherwise() -> None:
    unmatched = sidecars.Unmatched("photos")
    for directory, names in (
        ("", ["beach-01.jpg", "beach-02.jpg", "beech-1.txt"]),
        ("img/", ["zoo.jpg", "pier.jpg", "pier.txt"]),
        ("txt/", ["Zoo.txt", "pier.txt"]),
    ):
        files = sidecars.FolderFiles(
            images=[name for name in names if name.endswith("jpg")],
            others={name: File(location=name, relative=name, signature="") for name in names if not name.endswith("jpg")},
        )
        unmatched.add(directory, files, sidecars.match(files))
    assert unmatched.number == 3
    assert [(one.path, one.likely_image) for one in unmatched.examples()] == [
        ("beech-1.txt", "beach-01.jpg"),
        ("txt/Zoo.txt", "img/zoo.jpg"),
        ("txt/pier.txt", ""),
    ]


def test_numbers_are_never_a_misspelling() -> None:
    assert Nearest(["006", "008"]).to("007") is None
    assert Nearest(["IMG_007", "IMG_008"]).to("img 7") == "IMG_007"
    assert Nearest([f"cat {'a' * number}" for number in range(9000)]).to("cat aab") is None


# A few letters that have cases and Unicode forms, so that random names often meet.
STEMS = st.lists(st.sampled_from(["a", "A", NFC, NFD, NFC.upper(), "1"]), min_size=1, max_size=2).map("".join)
NAMES = st.builds(str.__add__, STEMS, st.sampled_from([".jpg", ".JPG", ".png", ".txt", ".jpg.txt", ".json"]))


@given(st.text())
def test_folding_twice_changes_nothing_more(name: str) -> None:
    assert folded(folded(name)) == folded(name)
    for form in ("NFC", "NFD"):
        assert folded(unicodedata.normalize(form, name)) == folded(name)


@settings(max_examples=300)
@given(st.sets(NAMES, max_size=7))
def test_matches_are_those_of_the_rule_applied_to_every_pair(names: set[str]) -> None:
    matches = _match(sorted(names))
    images = [name for name in names if name.lower().endswith((".jpg", ".png"))]
    for image in images:
        found = matches.captions.get(image)
        assert (found and found.relative) == _by_the_rule(image, images, names - set(images))


def _by_the_rule(image: str, images: Sequence[str], files: set[str]) -> str | None:
    """The rule of the docs, by brute force."""
    stem = posixpath.splitext(image)[0]
    stems = {posixpath.splitext(other)[0] for other in images}
    exact = [stem + suffix for suffix in sidecars.SUFFIXES] + [
        image + suffix for suffix in sidecars.SUFFIXES if image not in stems
    ]
    for name in exact:
        if name in files:
            return name
    taken = stems | set(images)
    fitting = {base for base in _bases(files) - taken if folded(base) in (folded(stem), folded(image))}
    if len(fitting) != 1:
        return None
    (base,) = fitting
    rivals = {own for other in images for own in (posixpath.splitext(other)[0], other) if folded(own) == folded(base)}
    return next(base + suffix for suffix in sidecars.SUFFIXES if base + suffix in files) if len(rivals) == 1 else None


def _bases(files: set[str]) -> set[str]:
    return {name.removesuffix(suffix) for name in files for suffix in sidecars.SUFFIXES if name.endswith(suffix)}
