"""As `killing.py serve`, with what training imports imported once, and what fails unexpectedly said: `train_forks.py serve`."""

import sys
import traceback

import killing

killing.SLOW_IMPORTS += (
    "ftk.train.stage",
    "ftk.methods.lora",
    "peft",
    "diffusers.optimization",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
)
plain = killing.run


def run(command, arguments):
    try:
        plain(command, arguments)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        raise


if __name__ == "__main__":
    killing.run = run
    killing.serve()
