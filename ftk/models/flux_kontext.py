"""FLUX.1 Kontext: FLUX.1 dev that is shown one image to edit, as tokens behind the noisy ones. Texts do not see it.

Source: diffusers, `pipelines/flux/pipeline_flux_kontext.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.models.components.geometry import ReferenceRule
from ftk.models.components.loading import load_pipeline
from ftk.models.components.weights import Tensor
from ftk.models.flux import Flux

if TYPE_CHECKING:
    import torch

PREFERRED_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip
"""(width, height) in px that the model was trained with."""


class FluxKontext(Flux):
    """The reference has the size of the list that is nearest to its aspect ratio."""

    name = "flux-kontext"
    pipeline_name = "FluxKontextPipeline"
    native_sizes = PREFERRED_SIZES
    references: ReferenceRule | None = ReferenceRule(multiple=16, sizes=PREFERRED_SIZES, most=1)

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """The one model; a file of it holds the transformer alone."""
        return "black-forest-labs/FLUX.1-Kontext-dev"

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """The official pipeline, which is told to draw at the size that it is asked for."""
        from diffusers import FluxKontextPipeline

        class Pipeline(FluxKontextPipeline):  # type: ignore[misc]
            def __call__(self, *arguments: Any, **options: Any) -> Any:
                # It would scale the size to its own area, and a reference to one of its list.
                if "height" in options and "width" in options:
                    options = {"max_area": options["height"] * options["width"], "_auto_resize": False, **options}
                return super().__call__(*arguments, **options)

        return load_pipeline(Pipeline, directory, device, dtype=dtype, **components)

    def pipeline_references(self, references: "Sequence[torch.Tensor]") -> dict[str, Any]:
        """The pipeline takes one image, also as normalised latents."""
        (reference,) = references
        return {"image": reference}

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """As ai-toolkit writes them."""
        return {"modelspec.architecture": "flux-1-dev/kontext", "ss_base_model_version": "flux1_kontext"}


FAMILY = FluxKontext()
