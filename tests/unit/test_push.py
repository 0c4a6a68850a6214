"""Uploads to a Hub on loopback, and every way in which it refuses them."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer, hub_server

from ftk.deliver import push
from ftk.errors import ConfigError, EnvironmentFault

CARD = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen-Image\n---\n# dog\n"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, text in {"README.md": CARD, "weights.safetensors": "w", "images/0.png": "p", "private.txt": "no"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


FILES = ["README.md", "weights.safetensors", "images/0.png"]


def test_the_named_files_and_no_others_go_up_in_one_commit(hub: HubServer, folder: Path) -> None:
    url = push.upload(folder, FILES, "ada/dog", False, "Step 6 of dog")
    assert url == f"{hub.url}/ada/dog"
    found = hub.repositories["ada/dog"]
    assert not found["private"]
    assert {name: data.decode() for name, data in found["files"].items()} == {
        name: (folder / name).read_text() for name in FILES
    }
    assert hub.messages == ["Step 6 of dog"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    (folder / "weights.safetensors").write_text("newer")
    push.upload(folder, FILES, "ada/dog", False, "Step 9 of dog")
    assert hub.repositories["ada/dog"]["files"]["weights.safetensors"] == b"newer"


def test_a_private_repository_stays_private(hub: HubServer, folder: Path) -> None:
    push.upload(folder, FILES, "ada/dog", True, "one")
    assert hub.repositories["ada/dog"]["private"]
    push.upload(folder, FILES, "ada/dog", True, "two")
    hub.repositories["ada/cat"] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="there already, and public"):
        push.upload(folder, FILES, "ada/cat", True, "one")
    assert hub.repositories["ada/cat"]["files"] == {}


@pytest.mark.parametrize("name", ["dog", "a/b/c", "ada/my dog", "ada/-dog", "ada/d..og", "", "ada/" + "x" * 100, "/dog"])
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--push"):
        push.check_name(name)


def test_who_is_not_logged_in_is_told_before_any_work() -> None:
    with hub_server(token=None), pytest.raises(EnvironmentFault, match=r"not logged in(.|\n)*hf auth login"):
        push.check("ada/dog")
    with hub_server():
        push.check("ada/dog")


@pytest.mark.parametrize(
    ("path", "status", "error", "message"),
    [
        ("/api/repos/create", 401, EnvironmentFault, "refuses your token"),
        ("/api/repos/create", 403, EnvironmentFault, "refuses your token"),
        ("/api/models/ada/dog/commit", 403, EnvironmentFault, "refuses your token"),
        ("/api/repos/create", 400, ConfigError, "refuses it"),
        ("/api/repos/create", 500, EnvironmentFault, "the Hub fails"),
    ],
)
def test_what_the_hub_says_is_passed_on_without_the_token(
    hub: HubServer, folder: Path, path: str, status: int, error: type[Exception], message: str
) -> None:
    hub.refusals[path] = (status, f"no {TOKEN} for you")
    with pytest.raises(error, match=message) as raised:
        push.upload(folder, FILES, "ada/dog", False, "one")
    assert "for you" in str(raised.value)
    assert str(status) in str(raised.value)
    assert str(folder) in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_a_card_that_the_hub_does_not_take_is_a_mistake_of_the_run_file(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("apache-2.0", "mine"))
    with pytest.raises(ConfigError, match="license must be one of those listed"):
        push.upload(folder, FILES, "ada/dog", False, "one")
    assert hub.repositories["ada/dog"]["files"] == {}


def test_no_network_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as server:
        url = server.url
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with pytest.raises(EnvironmentFault, match="could not be reached"):
        push.upload(folder, FILES, "ada/dog", False, "one")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE is set"):
        push.upload(folder, FILES, "ada/dog", False, "one")
    huggingface_hub.close_session()
