"""Fixtures that several test files share: one tiny model of each family, built once a run, and pictures to prepare."""

import gc
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from PIL import Image

from ftk import locations, storage
from ftk.contracts import PREPARED_SCHEMA, PreparedManifest, Reject, SampleRow, ShardRecord
from ftk.models import base as families
from ftk.pipeline import dataset
from ftk.pipeline.dataset import PreparedDataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors: on a busy machine OpenMP threads wait for each other a thousand times longer than they work.
os.environ["OMP_NUM_THREADS"] = "1"
# The same examples in every run, and no time limit for one: a red test is red for everybody, and a slow machine is no fault.
hypothesis.settings.register_profile(
    "ftk",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("ftk")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, processes take groups of tests as `group_of` makes them.

    Not by xdist's marks for that: xdist 3.8 adds them to the ids of tests, where pytest 9 no longer lets it.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """What a test shares fixtures with: its file; in contract/ only the tests of its family; those on Ray with each other."""
    path, _, name = nodeid.partition("::")
    if name.startswith("test_ray_") or path.endswith("test_ray_engine.py"):
        return "ray"
    if "/contract/" in path:
        cases = name.partition("[")[2]
        # Names may be parts of others: the longest is meant.
        return f"{path} {max((family for family in families.available() if family in cases), key=len, default='')}"
    return path


@pytest.fixture(scope="session", autouse=True)
def _short_waits() -> Iterator[None]:
    """Between two tries at a remote file; there are as many tries as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locations, "REMOTE_WAIT_SECONDS", 0.001)
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, by the family's name; written on first use and only read afterwards."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            directory = tmp_path_factory.mktemp("tiny") / name
            families.get(name).tiny(directory)
            built[name] = directory
            # What torch, diffusers and transformers consist of is searched for garbage no more: each search took 0.2 s.
            gc.collect()
            gc.freeze()
        return built[name]

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], Path]) -> Path:
    """The tiny Qwen-Image."""
    return tiny_models("qwen-image")


@pytest.fixture(scope="session")
def ray_node() -> dict[str, Any]:
    """What a node of `ray_cluster` is added with."""
    # Units of work that stand in a test file are imported on the nodes.
    paths = [str(Path(__file__).parent / "unit"), os.environ.get("PYTHONPATH")]
    return {"num_cpus": 2, "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}


@pytest.fixture(scope="session")
def ray_cluster(ray_node: dict[str, Any]) -> Iterator[Any]:
    """A Ray head with no CPU and two nodes of two, as processes of this machine. A test that removes a node adds another."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "ftk[ray]"')
    from ray.cluster_utils import Cluster

    # By default a node counts as lost after a quarter of a minute.
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**ray_node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def ray_connection(ray_cluster: Any) -> None:
    """This process is connected to the cluster. Each connection has workers of its own, which take seconds to start."""
    import ray

    if not ray.is_initialized():
        ray.init(address=ray_cluster.address, log_to_driver=False)


@pytest.fixture
def no_ray_connection(ray_cluster: Any) -> None:
    """This process is connected to no cluster, though there is one."""
    import ray

    ray.shutdown()


@pytest.fixture
def noise_image() -> Callable[..., Image.Image]:
    """A seeded random RGB picture of the given size."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))

    return make


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """The bytes of an image file."""

    def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def written_dataset() -> Callable[..., PreparedDataset]:
    """Write a prepared dataset without preparing anything: its shards' rows, rejects of its first shard, pairs of duplicates.

    Pictures are of one colour, the first three characters of their key's digest, and so are their control
    images. `totals` go into the manifest as they are.
    """

    def write(
        directory: Path,
        shards: Sequence[Sequence[SampleRow]],
        rejects: Sequence[Reject] = (),
        pairs: Sequence[tuple[str, str, int]] = (),
        **totals: Any,
    ) -> PreparedDataset:
        records = [_written_shard(directory, f"{n:05d}", rows, () if n else rejects) for n, rows in enumerate(shards)]
        storage.commit_table(directory / "rejects.parquet", dataset.reject_table(rejects))
        duplicates = [dict(zip(("key", "like", "bits"), pair, strict=True)) for pair in pairs]
        storage.commit_table(
            directory / "duplicates.parquet", pa.Table.from_pylist(duplicates, schema=dataset.DUPLICATE_SCHEMA)
        )
        manifest = {
            "schema_version": PREPARED_SCHEMA, "fingerprint": "abc", "recipe": {"captions": {"long_chars": 50}},
            "num_inputs": sum(one.num_inputs for one in records), "num_samples": sum(one.num_samples for one in records),
            "num_rejects": len(rejects), "num_upscaled": 0, "num_copied": 0, "num_long_captions": 0,
            "num_duplicates": sum(pair[2] < 0 for pair in pairs), "num_near_duplicates": sum(pair[2] >= 0 for pair in pairs),
            "rejects_by_reason": dict(Counter(one.reason.value for one in rejects)),
            "buckets": dict(sum((Counter(one.buckets) for one in records), Counter())), "shards": records,
        }  # fmt: skip
        storage.commit_json(directory / dataset.MANIFEST, PreparedManifest(**{**manifest, **totals}))
        return PreparedDataset.open(directory)

    return write


def _written_shard(directory: Path, name: str, rows: Sequence[SampleRow], rejects: Sequence[Reject]) -> ShardRecord:
    tar_path, table_path = directory / "shards" / f"{name}.tar", directory / "shards" / f"{name}.parquet"
    rows = [replace(row, shard=name) for row in rows]
    with storage.committing(tar_path) as file, dataset.tar_writer(file) as tar:
        for row in rows:
            picture = io.BytesIO()
            colour = tuple(storage.digest(row.key).encode()[:3])
            Image.new("RGB", (row.bucket_width, row.bucket_height), colour).save(picture, "PNG")
            controls = {f"control{number}.png": picture.getvalue() for number in range(row.num_controls)}
            tar.write({"__key__": row.key, "png": picture.getvalue(), **controls})
    storage.commit_table(table_path, dataset.sample_table(rows))
    return ShardRecord(
        name=name, is_last=True, recipe_fingerprint="", contents_fingerprint="", num_inputs=len(rows) + len(rejects),
        num_samples=len(rows), num_upscaled=0, num_copied=0, num_long_captions=0,
        buckets=dict(Counter(f"{row.bucket_width}x{row.bucket_height}" for row in rows)), bytes=tar_path.stat().st_size,
        sha256=storage.sha256_file(tar_path), table_sha256=storage.sha256_file(table_path), rejects=list(rejects),
    )  # fmt: skip
