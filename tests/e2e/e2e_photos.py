"""Where real captioned photographs may lie beside the checkout; tests that want them say so when they are not there."""

from pathlib import Path

import pytest

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photographs in ../shared/data/photos")
