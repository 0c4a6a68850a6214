"""Runs `ftk prepare` and kills itself at the n-th touch of the disk: `killing_prepare.py N ARGUMENTS`; 0 counts them."""

import os
import signal
import sys
from pathlib import Path

from ftk.cli import app
from ftk.pipeline import dataset

point, touches = 0, 0


def touch():
    global touches
    touches += 1
    if touches == point:
        os.kill(os.getpid(), signal.SIGKILL)


def around(function):
    def wrapped(*arguments, **options):
        touch()
        result = function(*arguments, **options)
        touch()
        return result

    return wrapped


# Workers import this file too, and are not to be killed.
if __name__ == "__main__":
    point = int(sys.argv[1])
    os.fsync = around(os.fsync)
    Path.replace = around(Path.replace)
    Path.unlink = around(Path.unlink)
    dataset.TarWriter.add = around(dataset.TarWriter.add)
    dataset.TarWriter.close = around(dataset.TarWriter.close)
    sys.argv = ["ftk", "prepare", *sys.argv[2:]]
    try:
        app.main()
    finally:
        print(touches)
