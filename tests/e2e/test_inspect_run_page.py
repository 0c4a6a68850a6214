"""The page that `ftk inspect RUN --html` writes of a real training of a tiny model, opened in a browser."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import BROWSER, measured, needs_browser, opened, title, with_script

from ftk.demo import draw_pictures
from ftk.train.hooks.recorder import read_metrics

STEPS = 12
_STATE = """
const state = () => ({
  charts: [...document.querySelectorAll("#charts figure")].map(figure => ({
    title: figure.querySelector("strong").textContent,
    where: figure.querySelector(".where").textContent,
    curves: [...figure.querySelectorAll("path.curve")].map(path => path.getAttribute("d")),
    values: Object.fromEntries([...figure.querySelectorAll(".legend button")].map(one =>
      [one.childNodes[1].textContent.trim(), one.querySelector("output").textContent])),
    crosses: figure.querySelectorAll(".cross circle").length,
    ticks: [...figure.querySelectorAll("svg text")].map(text => text.textContent),
  })),
  width: document.getElementById("width").textContent,
  whole: document.getElementById("whole").hidden,
});
const noted = [], svg = document.querySelector("#charts svg"), slider = document.getElementById("smoothing");
function slide(value) { slider.value = value; slider.dispatchEvent(new Event("input")); }
function send(kind, share, details = {}) {
  const box = svg.getBoundingClientRect();
  const options = { bubbles: true, clientX: box.left + 58 + share * (box.width - 70), clientY: box.top + 50, ...details };
  svg.dispatchEvent(new PointerEvent(kind, options));
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, ftk) -> Path:
    """Twelve steps with validation and two sheets of samples; read only."""
    root = tmp_path_factory.mktemp("watch")
    draw_pictures(root / "pictures", 8)
    tree = {
        "run": "test", "workspace": str(root / "work"), "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": str(root / "pictures")}], "resolutions": [64], "workers": 1},
        "train": {
            "steps": STEPS, "global_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32", "checkpoint_every": 6,
            "log_every": 2, "validation": {"share": 0.25, "every": 4},
        },
        "sample": {"prompts": ["a red circle"], "every": 6, "num_inference_steps": 1, "guidance_scale": 1.0},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    for command in ("prepare", "cache", "train"):
        done = ftk(command, root / "run.yaml")
        assert done.code == 0, done.err
    return root / "work" / "runs" / "test"


@pytest.fixture(scope="module")
def page(run, ftk, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "inspect.html"
    result = ftk("inspect", run, "--html", "--out", out)
    assert (result.code, result.out.strip()) == (0, str(out)), result.err
    return out


def seen(page: Path, tmp_path: Path, *actions: str) -> list[dict[str, Any]]:
    """The page's charts after each of some actions."""
    noted = " ".join(f"{action}; noted.push(state());" for action in actions)
    script = f"addEventListener('load', () => {{ {_STATE} {noted} document.title = JSON.stringify(noted); }});"
    found: list[dict[str, Any]] = json.loads(title(opened(with_script(page, tmp_path, script), tmp_path)))
    return found


@needs_browser
def test_every_chart_is_drawn_from_what_was_recorded(run, page, tmp_path):
    (found,) = seen(page, tmp_path, "")
    assert [chart["title"] for chart in found["charts"]] == [
        "Loss", "Loss by noise level", "Validation loss", "Gradient norm", "Learning rate", "Seconds a step", "Memory",
    ]  # fmt: skip
    loss, bands, validation, *others = found["charts"]
    assert [path.count("L") + 1 for path in loss["curves"]] == [STEPS, STEPS, 4]
    assert len(bands["curves"]) == 4
    assert len(validation["curves"]) >= 2
    assert all(chart["curves"] for chart in others)
    rows = read_metrics(run)
    assert float(loss["values"]["each step"]) == pytest.approx(rows[-1]["loss"], rel=1e-3)
    assert found["charts"][4]["values"] == {"learning rate": "0.001"}
    assert {"0", str(STEPS)} <= set(loss["ticks"])
    assert not any("NaN" in path for chart in found["charts"] for path in chart["curves"])


@needs_browser
def test_pointing_shows_the_values_of_that_step_in_every_chart(run, page, tmp_path):
    found, gone = seen(page, tmp_path, "send('pointermove', 5 / 12)", "send('pointerleave', 0)")
    row = read_metrics(run)[4]
    assert {chart["where"] for chart in found["charts"]} == {"step 5"}
    assert float(found["charts"][0]["values"]["each step"]) == pytest.approx(row["loss"], rel=1e-3)
    assert float(found["charts"][3]["values"]["each step"]) == pytest.approx(row["grad_norm"], rel=1e-3)
    assert all(chart["crosses"] for chart in found["charts"])
    assert {chart["where"] for chart in gone["charts"]} == {""}
    assert not any(chart["crosses"] for chart in gone["charts"])


@needs_browser
def test_dragging_zooms_all_charts_and_a_button_goes_back(page, tmp_path):
    mouse = "{ pointerType: 'mouse', button: 0, pointerId: 1 }"
    drag = "svg.setPointerCapture = () => {}; " + "; ".join(
        f"send('{kind}', {share}, {mouse})"
        for kind, share in (("pointerdown", 0.25), ("pointermove", 0.5), ("pointerup", 0.75))
    )
    plain, zoomed, back = seen(page, tmp_path, "", drag, "document.getElementById('whole').click()")
    assert not zoomed["whole"]
    assert all("12" not in chart["ticks"] and {"4", "6", "8"} & set(chart["ticks"]) for chart in zoomed["charts"])
    assert back == plain


@needs_browser
def test_smoothing_scale_and_legend_change_the_charts(page, tmp_path):
    scale, name = "document.getElementById('logarithmic').click()", "document.querySelector('.legend button').click()"
    plain, rough, smooth, log, linear, hidden = seen(page, tmp_path, "", "slide(0)", "slide(100)", scale, scale, name)
    assert rough["width"] == "none"
    assert rough["charts"][0]["curves"][0] == rough["charts"][0]["curves"][1]
    assert smooth["width"] == "over 4 steps"
    assert smooth["charts"][0]["curves"][0] != smooth["charts"][0]["curves"][1]
    assert log["charts"][0]["curves"][0] != smooth["charts"][0]["curves"][0]
    assert log["charts"][4] == plain["charts"][4]
    assert linear == smooth
    assert len(hidden["charts"][0]["curves"]) == len(plain["charts"][0]["curves"]) - 1


@needs_browser
def test_a_sheet_opens_large_and_keys_go_through_them(page, tmp_path):
    script = """addEventListener('load', () => {
      const viewer = document.getElementById('viewer'), seen = [], inside = name => viewer.querySelector(name);
      const note = () => seen.push([viewer.open, inside('span').textContent, inside('img').src.length]);
      document.querySelector('#sheets button').click(); note();
      viewer.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true })); note();
      document.getElementById('close').click(); note();
      document.title = JSON.stringify(seen); });"""
    first, second, closed = json.loads(title(opened(with_script(page, tmp_path, script), tmp_path)))
    assert (first[:2], second[:2], closed[0]) == ([True, "step 6"], [True, "step 12"], False)
    assert min(first[2], second[2]) > 1000


@needs_browser
def test_nothing_is_complained_of_in_the_console(page, tmp_path):
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         page.as_uri()], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'class="curve' in shown.stdout
    assert "CONSOLE" not in shown.stderr


@needs_browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_every_picture_decodes_and_nothing_is_fetched_or_cut_off(page, tmp_path, width_px):
    found = measured(page, tmp_path, width_px)
    # Two sheets and the sigmas; the viewer's own picture is empty until it opens.
    assert found == {"images": 4, "decoded": 3, "fetched": 0, "width": width_px, "overflow": False}
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page.read_text())


def test_the_page_and_the_tables_say_where_the_run_stands(run, page, ftk):
    text = page.read_text()
    for part in ("finished", f"step {STEPS} of {STEPS}", "pytorch_lora_weights.safetensors", "a red circle", "libraries.torch",
                 "best, read and whole", "train.learning_rate"):  # fmt: skip
        assert part in text
    found = json.loads(ftk("inspect", run, "--json").out)
    assert (found["state"], found["step"], found["num_samples"], found["num_bad_steps"]) == ("finished", STEPS, 2 * STEPS, 0)
    assert found["validation"]["num_measurements"] == 4
    assert [one["problem"] for one in found["checkpoints"]] == [None] * len(found["checkpoints"])
    assert found["sample_sheets"] == ["samples/step-00000006.png", "samples/step-00000012.png"]
    assert "finished" in ftk("inspect", run.parent.parent).out
