"""pyvips, imported by its first use and set up for workers.

Worker processes are forked from one that has the pipeline's modules loaded, and a library with threads must not be running
then.
"""

import functools
import logging
import os
from typing import Any


@functools.cache
def load() -> Any:
    """The module. libvips has one thread: the stage runs as many workers as there are cores."""
    os.environ["VIPS_CONCURRENCY"] = "1"
    import pyvips

    # Its remarks on damaged files: what becomes of those is in the table of rejects.
    logging.getLogger("pyvips").setLevel(logging.CRITICAL)
    # Every image is seen once: remembered operations would only hold memory.
    pyvips.cache_set_max(0)
    return pyvips
