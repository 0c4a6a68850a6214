"""The page that `ftk inspect --html` writes, opened in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from browser import measured, needs_browser, opened, title, with_script

from ftk.contracts import Reject, RejectReason, SampleRow

HOSTILE = """<script>document.title = "ran"</script><img src=x onerror="document.title = 'ran'">"""


def sample(number: int) -> SampleRow:
    """Every other one is wide, and loses a part to the crop."""
    wide = number % 2
    return SampleRow(
        key=f"dog-{number}", source="dogs", content_sha256="0" * 64, image_id=f"{number}", width=300, height=200,
        bucket_width=96 if wide else 64, bucket_height=64, resize_width=96, resize_height=64, crop_x=0 if wide else 16,
        crop_y=0, flipped=number == 2, copied=False, perceptual_hash="0" * 16, repeats=1, role="instance", num_controls=0,
        captions=[f"a dog, number {number} {HOSTILE}", "<i>more</i>"], control_ids=[], has_mask=False, mask_id="",
        shard="00000",
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, written_dataset) -> Path:
    """Six samples in two buckets, two rejects and a pair of images that look alike; read only."""
    rejects = [
        Reject(source="dogs", path=f"bad-{number}.png", reason=RejectReason.UNREADABLE, detail=HOSTILE) for number in range(2)
    ]
    directory = tmp_path_factory.mktemp("inspect") / "work" / "prepared"
    written_dataset(directory, [[sample(number) for number in range(6)]], rejects, [("dog-1", "dog-0", 3)])
    return directory


@pytest.fixture(scope="module")
def page(prepared, ftk, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "inspect.html"
    result = ftk("inspect", prepared, "--html", "--out", out)
    assert (result.code, result.out.strip()) == (0, str(out))
    return out


@needs_browser
def test_the_page_shows_buckets_captions_rejects_and_pairs(page, tmp_path):
    document = opened(page, tmp_path)
    assert title(document) == "work/prepared: 6 samples"
    for text in ("64×64", "96×64", "3 of 3 shown", "a dog, number 5", "bad-1.png", "3 of 64 bits differ", "33.3% lost"):
        assert text in document
    assert document.count('class="card"') == 6
    assert 'id="filtering" hidden' not in document, "the page's own script did not run"


@needs_browser
@pytest.mark.parametrize("policy", [True, False])
def test_captions_and_rejects_cannot_run_scripts(page, tmp_path, policy):
    script = "addEventListener('load', () => { document.title += ' ' + document.querySelectorAll('script').length; });"
    assert title(opened(with_script(page, tmp_path, script, policy), tmp_path)) == "work/prepared: 6 samples 2"


@needs_browser
def test_a_script_that_the_page_does_not_know_is_refused(page, tmp_path):
    text = page.read_text().replace("</body>", '<script>document.title = "ran"</script></body>', 1)
    (tmp_path / "page.html").write_text(text)
    assert title(opened(tmp_path / "page.html", tmp_path)) == "work/prepared: 6 samples"


@needs_browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_every_image_decodes_and_nothing_is_fetched_or_cut_off(page, tmp_path, width_px):
    assert measured(page, tmp_path, width_px) == {
        "images": 8, "decoded": 8, "fetched": 0, "width": width_px, "overflow": False,
    }  # fmt: skip
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page.read_text())


@needs_browser
def test_the_filter_hides_other_samples_and_empty_buckets(page, tmp_path):
    script = """
    addEventListener("load", () => {
      const field = document.getElementById("filter");
      const look = text => {
        field.value = text;
        field.dispatchEvent(new Event("input"));
        const shown = [...document.querySelectorAll(".card:not([hidden]) .key")].map(key => key.textContent);
        const sheets = document.querySelectorAll(".sheet:not([hidden])").length;
        return [shown, sheets, document.getElementById("filtered").textContent];
      };
      document.title = JSON.stringify([look("NUMBER  dog-4"), look("flipped"), look("nothing has this"), look("")[0].length]);
    });"""
    assert json.loads(title(opened(with_script(page, tmp_path, script), tmp_path))) == [
        [["dogs: dog-4"], 1, "1 of 6"],
        [["dogs: dog-2"], 1, "1 of 6"],
        [[], 0, "0 of 6"],
        6,
    ]


def test_json_has_the_numbers_and_the_page(prepared, ftk, tmp_path):
    plain = json.loads(ftk("inspect", prepared.parent, "--json").out)
    assert (plain["num_inputs"], plain["num_samples"], plain["num_rejects"]) == (8, 6, 2)
    assert [(one["width"], one["num_samples"]) for one in plain["buckets"]] == [(64, 3), (96, 3)]
    assert plain["duplicates"] == [{"key": "dog-1", "like": "dog-0", "bits": 3}]
    with_page = json.loads(ftk("inspect", prepared, "--json", "--html", "--out", tmp_path / "x.html").out)
    assert with_page == {**plain, "page": str(tmp_path / "x.html")}
    assert (tmp_path / "x.html").stat().st_size > 10_000


def test_the_terminal_shows_tables(prepared, ftk):
    shown = ftk("inspect", prepared)
    assert shown.code == 0
    for text in ("96x64", "dogs", "unreadable", "bad-0.png", "3 of 64"):
        assert text in shown.out


def test_damage_and_absence_end_in_a_message_and_code_2(prepared, ftk, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    tar = copy / "shards" / "00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    damaged = ftk("inspect", copy, "--html")
    assert damaged.code == 2
    assert "00000.tar is damaged" in damaged.err
    tar.write_bytes(whole[:-1])
    assert ftk("inspect", copy).code == 2
    absent = ftk("inspect", tmp_path / "nowhere")
    assert absent.code == 2
    assert "nowhere does not exist" in absent.err
