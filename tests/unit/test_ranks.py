import pytest
import torch
import torch.distributed as dist

from ftk.errors import Preempted
from ftk.train.ranks import Ranks, others_gone, part, rows


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("connection reset"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17583"),
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv"),
    ],
)
def test_an_exchange_that_fails_tells_that_another_process_is_gone(error):
    found = others_gone(error)
    assert isinstance(found, Preempted)
    assert str(error) in str(found)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("CUDA")])
def test_other_errors_are_not_laid_on_other_processes(error):
    assert others_gone(error) is None


def test_one_process_gathers_from_itself_and_has_all_rows():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    assert Ranks().gather({"a": 1}) == [{"a": 1}]
    assert rows(parameter) is None
    assert part(parameter) is parameter
