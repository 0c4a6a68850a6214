"""Adapters of other programs drawn, merged and trained further; weights of an earlier step, in another precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v")
RANK = 4
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAIN = {"steps": 4, "learning_rate": 0.05, "trackers": [], "global_batch_size": 2, "checkpoint_every": 2}


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def write_musubi(path: Path, model: Path, alpha=2.0, rank=RANK) -> dict[str, torch.Tensor]:
    """A file as musubi-tuner writes it; returns what it adds to each weight."""
    base = load_file(model / "transformer" / WEIGHTS)
    draw = torch.Generator().manual_seed(1)
    tensors, changes = {}, {}
    for layer in LAYERS:
        out, into = base[f"{layer}.weight"].shape
        down, up = torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)
        key = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        changes[f"{layer}.weight"] = alpha / rank * (up.double() @ down.double())
    save_file(tensors, path, {"ss_network_module": "networks.lora_qwen_image"})
    return changes


def masters(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/{step:08d}/adapter.safetensors")


def test_weights_of_a_step_are_exported_and_merged_in_the_precision_that_is_asked_for(ftk, cached, tmp_path):
    run_file = cached(method={"name": "lora", "rank": RANK, "targets": list(LAYERS)}, train={**TRAIN, "precision": "bf16"})
    assert ftk("train", run_file).code == 0
    run = tmp_path / "work/runs/test"
    file = "pytorch_lora_weights.safetensors"
    for options, step, dtype in (
        ((), 4, torch.float32),
        (("--step", 2), 2, torch.float32),
        (("--step", 2, "--dtype", "bfloat16"), 2, torch.bfloat16),
        (("--dtype", "float16"), 4, torch.float16),
    ):
        done = ftk("export", run_file, "--out", tmp_path / "out", *options, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["step"] == step
        tensors, header = tensors_of(tmp_path / "out" / file)
        assert header["ftk_step"] == str(step)
        for name, master in masters(run, step).items():
            key = "transformer." + name.replace(".default", "")
            # The masters' own bits, rounded once.
            assert torch.equal(tensors[key], master.to(dtype))
    missing = ftk("export", run_file, "--step", 3)
    assert (missing.code, "holds no checkpoint of this step. There are those of step 2, 4" in missing.err) == (2, True)
    assert ftk("export", run_file, "--step", 2, "--best").code == 2

    assert ftk("merge", run_file, "--step", 2, "--dtype", "float32", "--strength", 0.5, "--out", tmp_path / "merged").code == 0
    merged, before = (load_file(tmp_path / place / "transformer" / WEIGHTS) for place in ("merged", "model"))
    for layer in LAYERS:
        A, B = (masters(run, 2)[f"{layer}.lora_{each}.default.weight"] for each in "AB")
        torch.testing.assert_close(merged[f"{layer}.weight"] - before[f"{layer}.weight"], 0.5 * B @ A, atol=1e-6, rtol=0)
    assert "Merged: itself at 0.5." in (tmp_path / "merged/README.md").read_text()

    drawn = ftk("sample", run_file, "--step", 2, "--dtype", "float32", "--json")
    assert drawn.code == 0, drawn.err
    assert json.loads(drawn.out)["adapter"].endswith("00000002")
    assert Path(json.loads(drawn.out)["grid"]).name == "base-and-step-00000002-float32.png"


def test_a_file_of_musubi_tuner_is_drawn_and_merged(ftk, cached, tmp_path):
    run_file = cached(method={"name": "oft", "block_size": 4, "targets": ["to_k"]}, train={**TRAIN, "precision": "fp32"})
    changes = write_musubi(tmp_path / "theirs.safetensors", tmp_path / "model")
    assert ftk("train", run_file).code == 0
    drawn = ftk("sample", run_file, "--set", f"sample.adapters=[{{path: {tmp_path / 'theirs.safetensors'}}}]", "--json")
    assert drawn.code == 0, drawn.err
    assert json.loads(drawn.out)["together"] > 0

    one = ("--add", tmp_path / "theirs.safetensors", "--add", f"{tmp_path / 'theirs.safetensors'}@-0.25")
    for out, added in (("alone", ()), ("both", one)):
        done = ftk("merge", run_file, "--out", tmp_path / out, *added, "--json")
        assert done.code == 0, done.err
    assert json.loads(done.out)["added"] == [f"{one[1]} at 1", f"{one[1]} at -0.25"]
    alone, both = (load_file(tmp_path / out / "transformer" / WEIGHTS) for out in ("alone", "both"))
    for name, tensor in both.items():
        expected = alone[name].double() + 0.75 * changes.get(name, torch.zeros(()))
        torch.testing.assert_close(tensor.double(), expected, atol=1e-5, rtol=1e-6)
    refused = ftk("merge", run_file, "--out", tmp_path / "no", "--strength", 0.5)
    assert (refused.code, "--strength 0.5 has no meaning for method oft" in refused.err) == (2, True)
    other = {f"lora_unet_double_blocks_0_{kind}": torch.zeros(2, 2) for kind in ("x.lora_up.weight", "x.lora_down.weight")}
    save_file(other, tmp_path / "flux.safetensors")
    for arguments in (
        ("merge", run_file, "--out", tmp_path / "no", "--add", tmp_path / "flux.safetensors"),
        ("sample", run_file, "--set", f"sample.adapters=[{{path: {tmp_path / 'flux.safetensors'}}}]"),
        (
            "train",
            run_file,
            "--set",
            "method={name: lora}",
            "--set",
            f"train.start_from={tmp_path / 'flux.safetensors'}",
            "--fresh",
        ),
    ):
        done = ftk(*arguments)
        assert done.code == 2
        assert "trained on another base model: 1 of its 1 layers fit nothing" in done.err
        assert "lora_unet_double_blocks_0_x" in done.err
    assert not (tmp_path / "no").exists()


def settings(**changes):
    return {"name": "lora", "rank": RANK, "alpha": 2, "targets": list(LAYERS), **changes}


def test_a_run_goes_on_from_a_file_of_another_program(ftk, cached, tmp_path):
    file = tmp_path / "theirs.safetensors"
    train = {**TRAIN, "precision": "fp32", "start_from": str(file), "learning_rate": 1e-9}
    run_file = cached(method=settings(), train=train)
    changes = write_musubi(file, tmp_path / "model")
    assert ftk("train", run_file, "--dry-run").code == 0
    assert ftk("train", run_file).code == 0
    run = tmp_path / "work/runs/test"
    # It has hardly moved from there.
    tensors, header = tensors_of(run / "adapter/pytorch_lora_weights.safetensors")
    for layer in LAYERS:
        A, B = (tensors[f"transformer.{layer}.lora_{each}.weight"].double() for each in "AB")
        torch.testing.assert_close(B @ A, changes[f"{layer}.weight"], atol=1e-5, rtol=1e-5)
    assert header["ftk_start_from"].startswith("theirs.safetensors (blake3 ")
    assert "theirs.safetensors" in (run / "adapter/README.md").read_text()

    # The file's bytes are part of what the run is; its place is not.
    shutil.move(file, tmp_path / "moved.safetensors")
    gone = ftk("train", run_file, "--set", "train.steps=6")
    assert (gone.code, "no such file" in gone.err) == (2, True)
    moved = f"train.start_from={tmp_path / 'moved.safetensors'}"
    assert ftk("train", run_file, "--set", "train.steps=6", "--set", moved).code == 0
    write_musubi(file, tmp_path / "model", alpha=2.0)
    tensors = load_file(file)
    save_file({name: tensor * 1.0 if name.endswith("alpha") else tensor * 2 for name, tensor in tensors.items()}, file)
    changed = ftk("train", run_file, "--set", "train.steps=8")
    assert (changed.code, "start_from: checkpoint" in changed.err) == (2, True)


def test_a_run_goes_on_from_what_another_run_delivered(ftk, cached, tmp_path):
    """Whatever its alpha: the strength is in the file's tensors, and what the layers add is the same."""
    run_file = cached(method=settings(alpha=8), train={**TRAIN, "precision": "fp32"})
    assert ftk("train", run_file).code == 0
    first = tmp_path / "work/runs/test/adapter"
    for name, method in {"second": settings(alpha=8), "third": settings(alpha=1)}.items():
        options = [f"run={name}", f"train.start_from={first}", "train.learning_rate=1.0e-9", f"method={json.dumps(method)}"]
        done = ftk("train", run_file, *[part for option in options for part in ("--set", option)])
        assert done.code == 0, done.err
        theirs, ours = (
            load_file(folder / "pytorch_lora_weights.safetensors") for folder in (first, tmp_path / f"work/runs/{name}/adapter")
        )
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-5)


def test_what_a_run_cannot_go_on_from_is_refused_with_the_numbers_to_set(ftk, cached, tmp_path):
    file = tmp_path / "theirs.safetensors"
    run_file = cached(method=settings(), train={**TRAIN, "start_from": str(file)})
    write_musubi(file, tmp_path / "model", alpha=2.0)

    def refused(*method):
        done = ftk("train", run_file, *method, "--dry-run")
        assert done.code == 2
        return done.err

    def method(**changes):
        return "--set", f"method={json.dumps(settings(**changes))}"

    said = refused(*method(rank=8, alpha=8))
    assert "the file has rank 4, alpha 2" in said
    assert "Set method.rank: 4, method.alpha: 2." in said
    assert "Set method.alpha: 2." in refused(*method(alpha=4))
    assert "Set method.dora: false." in refused(*method(dora=True))
    assert "Set method.name: lora." in refused("--set", f"method={json.dumps({'name': 'loha', 'targets': list(LAYERS)})}")
    said = refused(*method(targets=[LAYERS[0]]))
    assert f"adapts 1 layers that this run does not train: {LAYERS[1]}. Add them to method.targets." in said
    assert "method full has no adapter to go on from" in refused("--set", "method={name: full, targets: [to_q]}")
    assert "initialisation: pissa has no effect" in refused(*method(initialisation="pissa"))


@pytest.mark.parametrize("method", [{"name": "oft", "block_size": 4}, {"name": "loha", "rank": 3}, {"name": "lokr", "rank": 3}])
def test_a_run_of_another_method_goes_on_from_its_own_delivery(ftk, cached, tmp_path, method):
    run_file = cached(method={**method, "targets": ["to_q"]}, train={**TRAIN, "steps": 2, "precision": "fp32"})
    assert ftk("train", run_file).code == 0
    first = tmp_path / "work/runs/test/adapter"
    options = ["run=second", f"train.start_from={first}", "train.learning_rate=1.0e-9"]
    done = ftk("train", run_file, *[part for option in options for part in ("--set", option)])
    assert done.code == 0, done.err
    (theirs,) = first.glob("*.safetensors")
    after = load_file(tmp_path / "work/runs/second/adapter" / theirs.name)
    for key, tensor in load_file(theirs).items():
        torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=1e-5)
    if method["name"] != "oft":
        wrong = ftk("train", run_file, "--set", f"train.start_from={first}", "--set", "method.rank=2", "--set", "run=third")
        assert (wrong.code, "Set method.rank: 3" in wrong.err) == (2, True), wrong.err
        return
    wrong = ftk("train", run_file, "--set", f"train.start_from={first}", "--set", "method.block_size=8", "--set", "run=third")
    assert (wrong.code, "oft_block_size is 4 in the file and 8 in the run" in wrong.err) == (2, True), wrong.err


def test_what_took_a_part_out_of_the_weights_is_merged_into_the_original_ones(ftk, cached, tmp_path):
    """PiSSA took it out of bf16 weights; in another precision or at another strength the delivered change counts."""
    method = {"name": "lora", "rank": RANK, "targets": list(LAYERS), "initialisation": "pissa"}
    run_file = cached(method=method, train={**TRAIN, "learning_rate": 1e-3, "precision": "bf16"})
    assert ftk("train", run_file).code == 0
    assert ftk("export", run_file, "--out", tmp_path / "out").code == 0
    done = ftk("merge", run_file, "--dtype", "float32", "--strength", 0.5, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    tensors, _ = tensors_of(tmp_path / "out/pytorch_lora_weights.safetensors")
    merged, before = (load_file(tmp_path / place / "transformer" / WEIGHTS) for place in ("merged", "model"))
    for layer in LAYERS:
        A, B = (tensors[f"transformer.{layer}.lora_{each}.weight"] for each in "AB")
        assert A.shape[0] == 2 * RANK
        assert A.dtype == torch.float32
        torch.testing.assert_close(merged[f"{layer}.weight"], before[f"{layer}.weight"] + 0.5 * B @ A, atol=1e-6, rtol=1e-6)


def test_a_whole_model_is_exported_in_the_precision_that_is_asked_for(ftk, cached, tmp_path):
    run_file = cached(method={"name": "full", "targets": ["to_q"]}, train={**TRAIN, "learning_rate": 1e-3, "precision": "bf16"})
    assert ftk("train", run_file).code == 0
    base = load_file(tmp_path / "model/transformer" / WEIGHTS)
    for options, dtype in (((), torch.bfloat16), (("--dtype", "float32"), torch.float32)):
        assert ftk("export", run_file, "--out", tmp_path / "out", *options).code == 0
        weights = load_file(tmp_path / "out/transformer" / WEIGHTS)
        trained = masters(tmp_path / "work/runs/test", 4)
        for name, tensor in weights.items():
            assert torch.equal(tensor, trained.get(name, base[name]).to(dtype)), name
