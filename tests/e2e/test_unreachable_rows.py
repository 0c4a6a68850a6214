"""`ftk prepare` over tables of web images of which some do not answer: rejects, asked for again, nothing fetched twice."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from servers import FaultServer, fault_server
from test_prepare_faults import hashes
from test_source_faults import flat

pytestmark = pytest.mark.faults

pytest.importorskip("aiohttp", reason='http:// needs aiohttp: pip install "ftk[http]"')
NUM_IMAGES = 12


@pytest.fixture
def web() -> Iterator[FaultServer]:
    with fault_server() as server:
        server.files = {f"/{number:02d}.png": flat(number) for number in range(NUM_IMAGES)}
        yield server


def table_of(urls: list[str], path: Path, **columns: Any) -> Path:
    rows = [{"url": url, "text": f"number {number}", **columns} for number, url in enumerate(urls)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def urls_of(web: FaultServer) -> list[str]:
    return [web.url + name for name in web.files]


def over(workspace: Any, table: Path, **data: Any) -> Path:
    return workspace(data={"sources": [{"path": str(table)}], "resolutions": [64], "shard_samples": 5, "workers": 2, **data})


def rejected(prepared: Path) -> dict[str, tuple[str, str]]:
    """(reason, detail) by the last part of the path."""
    rows = pq.read_table(prepared / "rejects.parquet").to_pylist()
    return {row["path"].rpartition("/")[2]: (row["reason"], row["detail"]) for row in rows}


def asked(web: FaultServer) -> dict[str, int]:
    """How often each file was asked for since the last time."""
    counts = {name: web.count(name) for name in [*web.files, *web.always] if web.count(name)}
    web.requests.clear()
    return counts


def test_rows_that_do_not_answer_are_rejects_that_the_next_run_asks_for_again(ftk, workspace, tmp_path, web):
    table = table_of([*urls_of(web), f"{web.url}/gone.png", "nope://h/a.png"], tmp_path / "rows.jsonl")
    run_file = over(workspace, table, max_unreachable_fraction=0.4, max_reject_fraction=0.2)
    web.always |= {"/01.png": 401, "/03.png": 403, "/06.png": 429, "/11.png": 451}
    web.headers["/06.png"] = {"Retry-After": "86400"}
    web.redirects["/08.png"] = "/08.png"
    result = ftk("prepare", run_file, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["rejects_by_reason"] == {"file_missing": 1, "unreachable": 5, "unreadable": 1}
    found = rejected(tmp_path / "work/prepared")
    assert {name: reason for name, (reason, _) in found.items()} == {
        **dict.fromkeys(["01.png", "03.png", "06.png", "08.png", "11.png"], "unreachable"),
        "gone.png": "file_missing",
        "a.png": "unreadable",
    }
    for name, said in {"01.png": "HTTP 401", "03.png": "HTTP 403", "06.png": "HTTP 429", "11.png": "HTTP 451"}.items():
        assert said in found[name][1]
    assert "redirects" in found["08.png"][1]
    assert "5 remote images could not be fetched" in result.err
    counts = asked(web)
    assert {name: count for name, count in counts.items() if name != "/08.png"} == dict.fromkeys(
        [name for name in web.files if name != "/08.png"], 1
    )
    # The second run asks for those alone, the third when they answer, the fourth for nothing.
    assert ftk("prepare", run_file).code == 0
    assert set(asked(web)) == {"/01.png", "/03.png", "/06.png", "/08.png", "/11.png"}
    web.always.clear(), web.redirects.clear()
    report = json.loads(ftk("prepare", run_file, "--json").out)
    assert (report["num_samples"], report["rejects_by_reason"]) == (NUM_IMAGES, {"file_missing": 1, "unreadable": 1})
    assert asked(web) == dict.fromkeys(["/01.png", "/03.png", "/06.png", "/08.png", "/11.png"], 1)
    assert json.loads(ftk("prepare", run_file, "--json").out)["num_shards_reused"] == 3
    assert asked(web) == {}
    assert ftk("prepare", run_file, "--workspace", tmp_path / "at-once").code == 0
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "at-once/prepared")


def test_too_many_of_them_end_the_run_and_what_was_fetched_is_kept(ftk, workspace, tmp_path, web):
    run_file = over(workspace, table_of(urls_of(web), tmp_path / "rows.jsonl"))
    web.always |= {"/01.png": 403, "/03.png": 403}
    for _ in range(2):
        result = ftk("prepare", run_file)
        assert result.code == 3
        assert "2 remote images could not be fetched, more than data.max_unreachable_fraction 0.1 allows" in result.err
        assert "2 times: access was denied (HTTP 403)" in result.err
    assert asked(web) == {name: 2 if name in web.always else 1 for name in web.files}
    assert ftk("prepare", run_file, "--set", "data.max_unreachable_fraction=0.2").code == 0


def test_a_dead_network_ends_the_run_early_and_says_so(ftk, workspace, tmp_path, web):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    names = [f"{number:03d}" for number in range(300)]
    web.always = {f"/{name}": 403 for name in names}
    run_file = over(workspace, table_of([f"{web.url}/{name}" for name in names], tmp_path / "rows.jsonl"), shard_samples=250)
    for arguments in (["--dry-run"], []):
        result = ftk("prepare", run_file, *arguments)
        assert result.code == 4
        assert "The network as a whole seems to be down" in result.err
        assert "HTTP 403" in result.err
        assert 20 <= sum(asked(web).values()) < 60
    run_file = over(workspace, table_of([f"{dead}/a.png"], tmp_path / "one.jsonl"), max_unreachable_fraction=1.0)
    result = ftk("prepare", run_file)
    assert result.code == 4
    assert "None of 1 remote images could be fetched. The network as a whole seems to be down" in result.err


def test_a_network_that_dies_in_the_middle_of_a_shard_costs_nothing_that_was_fetched(ftk, workspace, tmp_path, web):
    web.files |= {f"/{number:02d}.png": flat(number) for number in range(60)}
    run_file = over(workspace, table_of(urls_of(web), tmp_path / "rows.jsonl"), shard_samples=50)
    web.always |= {f"/{number:02d}.png": 403 for number in range(7, 60)}
    result = ftk("prepare", run_file)
    assert result.code == 4
    assert "remote images could not be fetched. The network as a whole seems to be down" in result.err
    counts = asked(web)
    assert {f"/{number:02d}.png" for number in range(7)} < set(counts)
    assert "/49.png" not in counts
    web.always.clear()
    assert ftk("prepare", run_file).code == 0
    assert asked(web) == dict.fromkeys([f"/{number:02d}.png" for number in range(7, 60)], 1)
    assert ftk("prepare", run_file, "--workspace", tmp_path / "at-once").code == 0
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "at-once/prepared")


def test_masks_and_controls_that_do_not_answer_are_asked_for_again_with_local_images_beside(ftk, workspace, tmp_path, web):
    (tmp_path / "local.png").write_bytes(flat(9))
    rows = [
        {"image": "local.png", "text": "a", "mask": f"{web.url}/01.png", "edge": f"{web.url}/02.png"},
        {"image": f"{web.url}/03.png", "text": "b", "mask": "local.png", "edge": "local.png"},
        {"image": f"{web.url}/04.png", "text": "c", "mask": "local.png", "edge": f"{web.url}/05.png"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl"), "mask": "mask", "controls": ["edge"]}
    data = {"sources": [source], "resolutions": [64], "workers": 1, "max_unreachable_fraction": 1.0}
    run_file = workspace(data={**data, "flip": True})
    web.always["/02.png"] = 403
    assert ftk("prepare", run_file).code == 0
    assert rejected(tmp_path / "work/prepared") == {
        "local.png": ("unreachable", "control 02.png: access was denied (HTTP 403)")
    }
    asked(web)
    web.always.clear()
    assert ftk("prepare", run_file).code == 0
    assert asked(web) == {"/01.png": 1, "/02.png": 1}
    assert ftk("prepare", run_file, "--workspace", tmp_path / "at-once").code == 0
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "at-once/prepared")


def test_a_changed_caption_and_a_new_row_cost_their_own_images_alone(ftk, workspace, tmp_path, web):
    urls = urls_of(web)
    run_file = over(workspace, table_of(urls[:8], tmp_path / "rows.jsonl"), shard_samples=50)
    assert ftk("prepare", run_file).code == 0
    asked(web)
    table = table_of(urls[:9], tmp_path / "rows.jsonl")
    table.write_text(table.read_text().replace("number 3", "number three"))
    assert ftk("prepare", run_file).code == 0
    assert asked(web) == {"/03.png": 1, "/08.png": 1}
    assert ftk("prepare", run_file, "--workspace", tmp_path / "at-once").code == 0
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "at-once/prepared")


def test_a_second_look_for_duplicates_fetches_nothing(ftk, workspace, tmp_path, web):
    web.files["/11.png"] = web.files["/00.png"]
    run_file = over(workspace, table_of(urls_of(web), tmp_path / "rows.jsonl"), duplicates="first")
    first = json.loads(ftk("prepare", run_file, "--json").out)
    assert first["rejects_by_reason"] == {"duplicate": 1}
    asked(web)
    second = json.loads(ftk("prepare", run_file, "--json").out)
    # A row that is left out is no sample, whose hash nobody has.
    assert asked(web) == {"/11.png": 1}
    assert (second["rejects_by_reason"], second["num_shards_reused"]) == ({"duplicate": 1}, 3)
