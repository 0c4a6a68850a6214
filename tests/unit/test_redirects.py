"""A public server cannot make us read what only this machine, or its network, can reach."""

from collections.abc import Iterator

import pytest
from servers import FaultServer, fault_server

from ftk import locations, redirects

pytest.importorskip("aiohttp", reason='http:// needs aiohttp: pip install "ftk[http]"')


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server at 127.0.0.1, which passes for public here; `localhost`, the same server, is private."""

    async def leads_inside(host: str) -> bool:
        return host == "localhost"

    monkeypatch.setattr(redirects, "_leads_inside", leads_inside)
    with fault_server() as server:
        server.files["/secret"] = b"secret"
        yield server


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1",
     "fe80::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::"],
)  # fmt: skip
def test_addresses_of_this_machine_and_of_private_networks(address: str) -> None:
    assert redirects.is_private(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_internet(address: str) -> None:
    assert not redirects.is_private(address)


def test_a_redirect_from_outside_into_the_own_network_is_refused(web: FaultServer) -> None:
    web.redirects["/a.jpg"] = f"http://localhost:{web.server_port}/secret"
    for read in (locations.read_bytes, locations.signature, lambda url: locations.open_stream(url).__enter__()):
        with pytest.raises(OSError, match=r"it redirects to localhost, an address of a private network"):
            read(f"{web.url}/a.jpg")
    assert web.count("/secret") == 0


def test_it_is_refused_after_other_redirects_too(web: FaultServer) -> None:
    web.redirects |= {"/a.jpg": "/b.jpg", "/b.jpg": f"http://localhost:{web.server_port}/secret"}
    with pytest.raises(OSError, match="a private network"):
        locations.read_bytes(f"{web.url}/a.jpg")
    assert web.count("/secret") == 0


def test_other_redirects_are_followed(web: FaultServer) -> None:
    web.redirects |= {"/a.jpg": "/b.jpg", "/b.jpg": f"{web.url}/secret"}
    assert locations.read_bytes(f"{web.url}/a.jpg") == b"secret"


def test_who_names_the_own_network_may_be_led_on_there(web: FaultServer) -> None:
    web.redirects["/a.jpg"] = f"http://localhost:{web.server_port}/secret"
    assert locations.read_bytes(f"http://localhost:{web.server_port}/a.jpg") == b"secret"
