"""The same bytes from every engine, and images that take a worker down with them."""

import json
import shutil
import threading
import time

import crashing_images
import pytest
from test_prepare_faults import hashes, odd_pictures, run_file_over  # noqa: F401 - a fixture

from ftk.pipeline import images

pytestmark = pytest.mark.faults


def test_images_that_crash_hang_or_swell_a_worker_are_rejected_and_the_run_goes_on(
    ftk, workspace, odd_pictures, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    for name in ("CRASH", "HANG", "SWELL"):
        (odd_pictures / f"005-{name}.png").write_bytes(name.encode())
        (odd_pictures / f"005-{name}.txt").write_text("a trap")
    monkeypatch.setattr(images, "prepare_image", crashing_images.prepare_image)
    run_file = run_file_over(workspace, odd_pictures, workers=2, worker_seconds=3, worker_memory_gib=0.4)
    report = json.loads(ftk("prepare", run_file, "--json").out)
    lost = {row["path"]: row for row in report["rejects"] if row["reason"].startswith("worker_")}
    assert {path: row["reason"] for path, row in lost.items()} == {
        "005-CRASH.png": "worker_crashed",
        "005-HANG.png": "worker_timed_out",
        "005-SWELL.png": "worker_out_of_memory",
    }
    assert "SIGSEGV" in lost["005-CRASH.png"]["detail"]
    assert report["num_samples"] == 12
    assert report["num_samples"] + report["num_rejects"] == report["num_inputs"] == 17


@pytest.mark.campaign
@pytest.mark.usefixtures("ray_connection")
def test_ray_gives_the_bytes_of_the_local_engine_though_a_node_dies(
    ftk, ray_cluster, ray_node, workspace, odd_pictures, tmp_path  # noqa: F811
):  # fmt: skip
    for number in range(12):
        shutil.copy(odd_pictures / "001-hills.png", odd_pictures / f"more-{number:02d}.png")
        (odd_pictures / f"more-{number:02d}.txt").write_text(f"hills {number}")
    # A node has room for one unit at a time.
    run_file = run_file_over(workspace, odd_pictures, workers=2)
    assert ftk("prepare", run_file, "--workspace", tmp_path / "local").code == 0
    second = sorted(ray_cluster.worker_nodes, key=lambda node: node.node_id)[1]
    receipts = tmp_path / "work/prepared/shards"
    killed_after = []

    def kill_after_the_first_shard():
        deadline = time.monotonic() + 120
        while not list(receipts.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed_after.append(len(list(receipts.glob("*.json"))))
        ray_cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_after_the_first_shard)
    try:
        killer.start()
        result = ftk("prepare", run_file, "--set", "data.engine=ray", "--json")
        assert result.code == 0, result.err
        report = json.loads(result.out)
    finally:
        killer.join()
        ray_cluster.add_node(**ray_node)
    assert 0 < killed_after[0] < report["num_shards"]
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "local/prepared")
