import json

import pytest
import torch

from ftk.errors import CheckpointError, ConfigError
from ftk.train.optimizer_state import names_in, pack, unpack


def there_and_back(value):
    tensors = {}
    tree = json.loads(json.dumps(pack(value, "w/state", tensors), allow_nan=False))
    assert names_in(tree) == set(tensors)
    return unpack(tree, tensors, torch.clone)


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.1, 1e-300, "text", [], (1, (2.5, [None])), {"a": 1, 2: (3,)}, torch.bfloat16]
)
def test_plain_values_come_back_as_they_were(value):
    found = there_and_back(value)
    assert found == value
    assert type(found) is type(value)


def test_numbers_that_json_lacks_come_back():
    assert there_and_back([float("inf"), float("-inf")]) == [float("inf"), float("-inf")]
    assert there_and_back(float("nan")) != there_and_back(float("nan"))


def test_tensors_come_back_wherever_they_are_kept():
    value = {"list": [torch.arange(3), torch.ones(2, dtype=torch.bfloat16)], "tensor": {"dtype": torch.tensor(7)}}
    found = there_and_back(value)
    assert torch.equal(found["list"][0], torch.arange(3))
    assert found["list"][1].dtype == torch.bfloat16
    assert found["tensor"]["dtype"].item() == 7


def test_eight_bit_moments_come_back_by_their_parts():
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    value = subclass.OptimState8bit.zeros((16, 32), signed=False, dtype=torch.float32)
    value.copy_(torch.rand(16, 32))
    found = there_and_back(value)
    assert type(found) is subclass.OptimState8bit
    assert (found.signed, found.block_size, found.dtype, found.shape) == (False, 256, torch.float32, (16, 32))
    assert torch.equal(found.codes, value.codes)
    assert torch.equal(found.dequantize(), value.dequantize())


def test_what_no_checkpoint_can_hold_is_refused():
    with pytest.raises(ConfigError, match="it keeps w/state, a function, which a checkpoint cannot hold"):
        pack(lambda: None, "w/state", {})


@pytest.mark.parametrize("name", ["os:system", "no_such_module:Thing", "torch.optim:AdamW", "builtins:eval"])
def test_only_a_tensor_class_that_is_loaded_is_made(name):
    tree = {"subclass": {"class": name, "parts": [], "context": None, "size": [], "stride": []}}
    with pytest.raises(CheckpointError, match=f"tensors of the class {name}"):
        unpack(tree, {}, torch.clone)


def test_a_tree_that_names_what_is_not_there_is_refused():
    with pytest.raises(CheckpointError, match="no tensor 'w/state'"):
        unpack({"tensor": "w/state"}, {}, torch.clone)
    with pytest.raises(CheckpointError, match="kind 'pickle'"):
        unpack({"pickle": "x"}, {}, torch.clone)
