"""Opens pages in a headless browser, where there is one."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH to open the page with")
_MEASURE = """
addEventListener("load", () => {
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    images: images.length,
    decoded: images.filter(image => image.naturalWidth > 0 && image.clientWidth > 40).length,
    fetched: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    width: innerWidth,
    overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  }), "*");
});"""


def opened(page: Path, tmp_path: Path) -> str:
    """The document after the browser loaded it and ran its scripts."""
    return subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", "--window-size=1400,900", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


def with_script(page: Path, tmp_path: Path, script: str, policy: bool = True) -> Path:
    """A copy of the page that also runs `script`; without `policy` it may run any other, too."""
    text = page.read_text()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    if "script-src " not in text:
        text = text.replace("default-src 'none'; ", "default-src 'none'; script-src ; ", 1)
    text = text.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    if not policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text, count=1)
    copy = tmp_path / "page.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>", 1))
    return copy


def title(document: str) -> str:
    return re.search(r"<title>(.*?)</title>", document, re.DOTALL).group(1)


def measured(page: Path, tmp_path: Path, width_px: int) -> dict[str, Any]:
    """Images, those that decode, what was fetched, and whether the page is wider than its window of `width_px`."""
    with_script(page, tmp_path, _MEASURE)
    # In a frame, because the browser's own window does not get as narrow as a telephone.
    frame = f'<title></title><iframe src="page.html" style="width: {width_px}px; border: 0"></iframe>'
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<script>onmessage = message => document.title = message.data;</script>{frame}")
    found: dict[str, Any] = json.loads(title(opened(wrapper, tmp_path)))
    return found
