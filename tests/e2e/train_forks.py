"""As `killing.py serve`, with what training imports imported once: `train_forks.py serve`."""

import killing

killing.SLOW_IMPORTS += (
    "ftk.train.stage",
    "ftk.methods.lora",
    "peft",
    "diffusers.optimization",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
)

if __name__ == "__main__":
    killing.serve()
