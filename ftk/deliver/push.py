"""`ftk export --push`: exported files as a model repository on the Hugging Face Hub.

The token is the Hub client's own: of HF_TOKEN or of `hf auth login`. It is never read here, and never logged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError is that of the client's own library: httpx, or whatever comes after it.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ftk.configs.load import redact
from ftk.errors import ConfigError, EnvironmentFault

_ADVICE = "Run `hf auth login` with a token that may write, or set HF_TOKEN."


def check(repository: str) -> None:
    """Before any work: is this a repository's name, and is there a token?

    Raises:
        ConfigError: it is no name.
        EnvironmentFault: nobody is logged in.
    """
    check_name(repository)
    if not is_logged_in():
        raise EnvironmentFault(f"--push {repository}: you are not logged in to the Hugging Face Hub. {_ADVICE}")


def check_name(repository: str) -> None:
    """Refuse what is no `OWNER/NAME`.

    Raises:
        ConfigError: with the Hub's rule.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: no repository of the Hub can be called so. {_first_line(error)}") from None
    if repository.count("/") != 1:
        raise ConfigError(f"--push {repository}: name the owner too, as in OWNER/NAME.")


def is_logged_in() -> bool:
    """Whether the Hub client finds a token; not whether the Hub takes it."""
    return get_token() is not None


def upload(directory: Path, files: Sequence[str], repository: str, private: bool, message: str) -> str:
    """Upload files of a folder in one commit, into a repository that is made if it is not there; returns its address.

    Args:
        files: paths below `directory`; nothing else that lies there goes up.

    Raises:
        ConfigError: the Hub refuses the repository's name or the card, or the repository is public and ought not to be.
        EnvironmentFault: the Hub cannot be reached, or the token may not write there.
    """
    api = HfApi()
    with _explaining(repository, directory):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ConfigError(
                f"--push {repository} --private: the repository is there already, and public. Nothing was uploaded. Make it "
                f"private in its settings, or leave --private out."
            )
        api.upload_folder(repo_id=repository, folder_path=directory, allow_patterns=list(files), commit_message=redact(message))
    return str(url)


@contextmanager
def _explaining(repository: str, directory: Path) -> Iterator[None]:
    kept = f"The exported files are in {directory}; the same command uploads them."
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = redact(error.server_message or _first_line(error))
        if status in (401, 403):
            raise EnvironmentFault(
                f"--push {repository}: the Hub refuses your token ({status}: {said}). {_ADVICE} {kept}"
            ) from None
        if 400 <= status < 500:
            raise ConfigError(f"--push {repository}: the Hub refuses it ({status}: {said}). {kept}") from None
        raise EnvironmentFault(f"--push {repository}: the Hub fails ({status}: {said}). Try again later. {kept}") from None
    except OfflineModeIsEnabled:
        raise EnvironmentFault(f"--push {repository}: HF_HUB_OFFLINE is set, so nothing goes up. Unset it. {kept}") from None
    except ValueError as error:
        said = " ".join(redact(str(error)).split())
        raise ConfigError(f"--push {repository}: the Hub does not take the model card: {said} {kept}") from None
    except (HTTPError, OSError) as error:
        raise EnvironmentFault(
            f"--push {repository}: the Hub could not be reached ({type(error).__name__}: {redact(_first_line(error))}). Check "
            f"the network. {kept}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
