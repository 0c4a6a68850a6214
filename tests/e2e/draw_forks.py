"""As `killing.py serve`, with what drawing class images imports imported once: `draw_forks.py serve`."""

import killing

killing.SLOW_IMPORTS = (
    "ftk.cache.encode",
    "ftk.pipeline.stage",
    "ftk.deliver.draw_class_images",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
)

if __name__ == "__main__":
    killing.serve()
