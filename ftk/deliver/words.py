"""New words in a diffusers pipeline: what `method: textual-inversion` delivers, for programs beside ftk."""

from pathlib import Path
from typing import Any

from ftk.errors import CheckpointError
from ftk.methods import textual_inversion
from ftk.models import base as models


def load_words(pipeline: Any, folder: str | Path) -> Any:
    """Load new words, and the LoRA beside them if there is one, into a pipeline, in place; returns it.

    From then on its prompts read them, and so does `pipeline.encode_prompt`, which gives `prompt_embeds` for any other use.

    Args:
        folder: what `ftk train` or `ftk export` wrote in the method's default format, or a repository of the Hub with it.

    Raises:
        CheckpointError: a file is missing or damaged, is of another base model, or the pipeline has the words already.
    """
    place = Path(folder)
    if not place.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            place = Path(snapshot_download(str(folder)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise CheckpointError(f"{folder} is neither a folder nor a repository of the Hub that can be read.") from error
    words = textual_inversion.learned_words(place)
    return textual_inversion.METHOD.load_into(models.get(words[0].family), pipeline, place)
