"""What can be wrong with a method, its targets or an adapter: said in one message with the way out, exit 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

ADAPTER = "runs/test/adapter/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ftk, pictures, tiny_models):
    """A run of each family that has been trained for a step: by the family's name its run file."""
    made = {}
    for family in ("qwen-image", "stable-diffusion"):
        root = tmp_path_factory.mktemp(family)
        tree = {
            "run": "test",
            "workspace": str(root / "work"),
            "model": {"family": family, "path": str(tiny_models(family))},
            "data": {"sources": [{"path": str(pictures)}], "resolutions": [64], "workers": 1},
            "method": {"name": "lora", "rank": 2},
            "train": {"steps": 1, "precision": "fp32", "trackers": []},
            "sample": {"prompts": ["a red circle"], "num_inference_steps": 1, "guidance_scale": 1.0},
        }
        path = root / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        done = ftk("run", path)
        assert done.code == 0, done.err
        made[family] = path
    return made


def work(run_file: Path) -> Path:
    return Path(yaml.safe_load(run_file.read_text())["workspace"])


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("qwen-image", {"name": "lore"}, r"there is no method 'lore'"),
        ("qwen-image", {"name": "lora", "rnk": 4}, r"method.rnk.*rank"),
        ("qwen-image", {"name": "lora", "targets": ["to_q", "to_w"]}, r"'to_w' is the name of no linear layer"),
        ("qwen-image", {"name": "lora", "targets": "atention"}, r"Did you mean `attention`"),
        ("qwen-image", {"name": "lora", "targets": {"regex": "to_q"}}, r"matches no layer"),
        ("qwen-image", {"name": "full", "targets": ["nrom"]}, r"'nrom' is the name of no module or parameter"),
        ("qwen-image", {"name": "oft", "block_size": 5}, r"method.block_size: 5 does not divide"),
        ("qwen-image", {"name": "lora", "text_encoder": {}}, r"method.text_encoder: the text encoder of qwen-image cannot"),
        ("qwen-image", {"name": "peft", "type": "MIS"}, r"PEFT has no type 'MIS'. Did you mean"),
        ("qwen-image", {"name": "peft", "type": "MISS", "rr": 2}, r"`rr` is not a setting of PEFT's MISS"),
        ("stable-diffusion", {"name": "oft", "block_size": 4, "targets": ["conv1"]}, r"it is a 3x3 convolution"),
        ("stable-diffusion", {"name": "t2i-adapter", "width": 8}, r"method.width has no effect with stable-diffusion"),
        ("qwen-image", {"name": "control-lora", "dora": True}, r"`dora: true` is not for control-lora"),
        ("stable-diffusion", {"name": "lora", "text_encoder": {"targets": ["qproj"]}}, r"method.text_encoder.targets: 'qproj'"),
    ],
)
def test_a_method_that_does_not_fit_is_said_before_anything_is_trained(trained, ftk, family, method, message):
    run_file = trained[family]
    done = ftk("train", run_file, "--set", "run=other", "--set", f"method={json.dumps(method)}")
    assert done.code == 2
    assert pytest.RaisesExc(Exception, match=message).matches(Exception(done.err)), done.err
    assert not (work(run_file) / "runs/other/checkpoints").exists()


@pytest.mark.parametrize("command", [["sample"], ["export", "--format", "comfyui"], ["merge", "--out", "merged"]])
def test_nothing_to_deliver_is_said(trained, ftk, command, tmp_path):
    name, *options = command
    options = [str(tmp_path / option) if option == "merged" else option for option in options]
    done = ftk(name, trained["qwen-image"], *options, "--set", "run=none")
    assert done.code == 2
    assert "ftk train" in done.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "other shape"])
def test_a_damaged_adapter_is_named(trained, ftk, tmp_path, damage):
    shutil.copytree(work(trained["qwen-image"]).parent, tmp_path / "copy")
    place = tmp_path / "copy/work"
    adapter = place / ADAPTER
    whole = adapter.read_bytes()
    if damage == "other shape":
        save_file({name: tensor[:1] for name, tensor in load_file(adapter).items()}, adapter)
    elif damage == "missing":
        adapter.unlink()
    else:
        adapter.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not an adapter"}[damage])
    done = ftk("sample", trained["qwen-image"], "--workspace", place)
    assert done.code == 2
    assert str(adapter) in done.err
    assert not list((place / "runs/test/samples").glob("base-*"))


def test_an_adapter_of_another_base_is_named(trained, ftk, tmp_path):
    shutil.copytree(work(trained["qwen-image"]).parent, tmp_path / "copy")
    place = tmp_path / "copy/work"
    shutil.copy(work(trained["stable-diffusion"]) / ADAPTER, place / ADAPTER)
    done = ftk("sample", trained["qwen-image"], "--workspace", place)
    assert done.code == 2
    assert "was trained on another base model" in done.err
    assert "Load it into the model that it was trained on" in done.err
