"""`prepare_image`, but for images that kill, hang or swell the worker that opens them. Imported by workers."""

import os
import signal
import time

from ftk.pipeline import images

_real = images.prepare_image


def prepare_image(task):
    data = task.image.read()
    if data.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"HANG"):
        time.sleep(1000)
    if data.startswith(b"SWELL"):
        held = [bytearray(b"x" * (16 << 20)) for _ in range(64)]
        time.sleep(1000 + len(held))
    return _real(task)
