"""Wrong things, as a new user would do them: a clear message, the right exit code, and nothing lost."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
from PIL import Image

from ftk.models import base as models


def images_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in (".png", ".jpg"))


def test_a_folder_without_images(ftk, workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    result = ftk("prepare", workspace(data={"sources": [{"path": str(tmp_path / "empty")}]}))
    assert result.code == 2
    assert "holds no images" in result.err
    assert "notes.txt" in result.err


def test_a_folder_that_does_not_exist_names_the_nearest(ftk, workspace, tmp_path):
    result = ftk("prepare", workspace(data={"sources": [{"path": str(tmp_path / "pictuers")}]}))
    assert result.code == 2
    assert f"Did you mean `{tmp_path / 'pictures'}`" in result.err


def test_a_wrong_source_leaves_nothing_behind(ftk, workspace, tmp_path):
    sources = [{"path": str(tmp_path / "pictures")}, {"path": str(tmp_path / "pitcures"), "name": "other"}]
    assert ftk("prepare", workspace(data={"sources": sources})).code == 2
    assert not (tmp_path / "work").exists()


def test_a_missing_caption_is_a_counted_reject_and_the_rest_is_kept(ftk, workspace, tmp_path):
    images_in(tmp_path / "pictures")[0].with_suffix(".txt").unlink()
    result = ftk("prepare", workspace(), "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert (report["num_samples"], report["num_rejects"]) == (11, 1)
    assert report["rejects_by_reason"] == {"caption_missing": 1}
    with_fallback = workspace(data={"sources": [{"path": str(tmp_path / "pictures"), "caption": "a drawing"}]})
    assert json.loads(ftk("prepare", with_fallback, "--json").out)["num_samples"] == 12


def test_a_truncated_jpeg_is_rejected_with_its_reason(ftk, workspace, tmp_path):
    jpeg = next(path for path in images_in(tmp_path / "pictures") if path.suffix == ".jpg")
    jpeg.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    report = json.loads(ftk("prepare", workspace(), "--json").out)
    assert report["rejects_by_reason"] == {"truncated": 1}
    assert report["rejects"][0]["path"] == jpeg.name
    assert report["num_samples"] == 11


def test_every_file_with_a_caption_is_a_sample_or_a_reject_with_a_reason(ftk, workspace, tmp_path):
    pytest.importorskip("pillow_jxl")
    folder = tmp_path / "mixed"
    folder.mkdir()
    image = Image.open(images_in(tmp_path / "pictures")[0]).convert("RGB")
    for name, image_format in (("good.jpg", "JPEG"), ("a.jxl", "JXL"), ("b.jpg_large", "JPEG"), ("c", "PNG"), ("d.qoi", "QOI")):
        image.save(folder / name, image_format)
    raw = {
        "e.dng": b"II*\0\x08\0\0\0",
        "f.CR2": b"II*\0\x10\0\0\0CR\2\0",
        "g.exr": b"v/1\x01",
        "h.psd": b"8BPS\0\x01",
        "i.raf": b"?",
    }
    for name, data in raw.items():
        (folder / name).write_bytes(data + b"\0" * 99)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a drawing")
    for name in ("notes.md", "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(b"no image")
    data = {"sources": [{"path": str(folder)}], "max_reject_fraction": 0.6}
    report = json.loads(ftk("prepare", workspace(data=data), "--json").out)
    assert (report["num_inputs"], report["num_samples"]) == (10, 5)
    assert sorted(reject["path"] for reject in report["rejects"]) == sorted(raw)
    assert report["rejects_by_reason"] == {"unreadable": 5}
    assert ftk("prepare", workspace(data={**data, "max_reject_fraction": 0.1})).code == 3


def test_masks_that_leave_nothing_to_train_are_named_and_counted(ftk, workspace, tmp_path):
    sources = [{"path": str(tmp_path / "pictures"), "masks": str(tmp_path / "masks")}]
    (tmp_path / "masks").mkdir()
    images = images_in(tmp_path / "pictures")
    for number, path in enumerate(images):
        with Image.open(path) as image:
            Image.new("L", image.size, 0 if number < 2 else 255).save(tmp_path / "masks" / f"{path.stem}.png")
    run_file = workspace(data={"sources": sources, "resolutions": [64, 96]})
    prepared = ftk("prepare", run_file, "--json")
    assert json.loads(prepared.out)["num_empty_masks"] == 4
    said = " ".join(prepared.err.split())
    assert "4 samples have a mask that is black all over" in said
    assert f"leaves nothing to train: {images[0].name}, {images[1].name}. Correct" in said
    # Also when every shard stands as it is; and not where the rest of the picture is trained.
    assert "leaves nothing to train" in ftk("prepare", run_file).err
    assert "leaves nothing to train" not in ftk("prepare", run_file, "--set", "train.loss.unmasked_weight=0.1").err
    shown = ftk("inspect", tmp_path / "work")
    assert re.search(r"empty masks +4 black all over", shown.out)
    assert json.loads(ftk("inspect", tmp_path / "work", "--json").out)["num_empty_masks"] == 4


def test_too_many_rejects_exit_3_and_what_was_good_is_kept(ftk, workspace, tmp_path):
    for path in images_in(tmp_path / "pictures")[:4]:
        path.write_bytes(b"")
    run_file = workspace()
    for _ in range(2):
        result = ftk("run", run_file)
        assert result.code == 3
        assert "4 of 12 images were rejected" in result.err
        assert "the file is empty" in result.err
    assert ftk("cache", run_file).code == 0
    assert ftk("run", run_file, "--set", "data.max_reject_fraction=0.5").code == 0


def test_nothing_but_rejects_exits_2(ftk, workspace, tmp_path):
    for path in images_in(tmp_path / "pictures"):
        path.write_bytes(b"not a picture")
    result = ftk("prepare", workspace(), "--set", "data.max_reject_fraction=1.0")
    assert result.code == 2
    assert "No image could be used" in result.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.learning_rat=1", "`train.learning_rat` is not a setting. Did you mean `learning_rate`?"),
        ("trian.steps=1", "`trian` is not a setting. Did you mean `train`?"),
        ("method.rnak=4", "`method.rnak` is not a setting. Did you mean `rank`?"),
        ("method.name=lroa", "there is no method 'lroa'"),
        ("model.family=qwen", "there is no family 'qwen'"),
        ("method.targets=atention", "has no group 'atention'"),
        ("method.targets=[to_qq]", "'to_qq' is the name of no linear layer"),
        ("train.steps=many", "`train.steps`"),
        ("train.micro_batch_size=9", "micro_batch_size 9 is larger than global_batch_size"),
        ("data.bucket_step=24", "not a multiple of 16"),
    ],
)
def test_a_misspelt_setting_names_the_nearest_valid_one(ftk, workspace, setting, said):
    run_file = workspace()
    command = "run" if "to_qq" in setting else "prepare"
    result = ftk(command, run_file, "--set", setting)
    assert result.code == 2
    assert said in result.err


def test_a_misspelt_key_in_the_file(ftk, workspace):
    run_file = workspace()
    run_file.write_text(run_file.read_text().replace("caption_dropout", "caption_droput"))
    result = ftk("train", run_file)
    assert result.code == 2
    assert "`train.caption_droput` is not a setting. Did you mean `caption_dropout`?" in result.err


def test_a_run_file_that_is_not_there(ftk, tmp_path):
    (tmp_path / "my-run.yaml").write_text("run: x")
    result = ftk("train", tmp_path / "my_run.yaml")
    assert result.code == 2
    assert "Did you mean" in result.err


def test_a_model_folder_that_is_no_model(ftk, workspace, tmp_path):
    (tmp_path / "nothing").mkdir()
    for path, said in (
        (tmp_path / "nothing", "no model_index.json"),
        (tmp_path / "pictures", "no model_index.json"),
        ("no/such/model/path", "no such folder"),
    ):
        result = ftk("run", workspace(model={"path": str(path)}))
        assert result.code == 2
        assert said in result.err
    assert not (tmp_path / "work").exists()


def test_a_model_with_a_cut_weight_file(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("prepare", run_file).code == 0
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    result = ftk("cache", run_file)
    assert result.code == 2
    assert f"{weights} is not a whole safetensors file" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("option", "setting"), [(("--engine", "ray"), "cache.engine=ray"), (("--full-hash",), "cache.full_hash=true")]
)
def test_an_option_that_has_become_a_setting_is_answered_with_the_setting(option, setting, ftk, workspace):
    result = ftk("cache", workspace(), *option)
    assert (result.code, f"Write --set {setting}," in result.err) == (2, True)
    assert option[0] not in ftk("cache", "--help").out


@pytest.mark.parametrize("family", models.available())
def test_captions_that_the_text_encoder_cuts_are_counted_and_named(ftk, workspace, tiny_models, tmp_path, family):
    limit = models.get(family).max_text_tokens
    captions = sorted((tmp_path / "pictures").glob("*.txt"))
    for number, path in enumerate(captions[:7]):
        path.write_text(f"picture {number} \x1b[31m" + "of words " * limit)
    run_file = workspace(model={"family": family, "path": str(tiny_models(family))})
    assert ftk("prepare", run_file).code == 0
    for _ in range(2):
        result = ftk("cache", run_file, "--json")
        assert result.code == 0
        assert json.loads(result.out)["num_texts_truncated"] == 7
        said = " ".join(result.err.split())
        assert f"7 of 14 texts are longer than the {limit} tokens that {family} reads" in said
        assert [f"picture {number} " in said for number in range(7)] == [True] * 5 + [False] * 2
        assert "and 2 more" in said
        assert "\x1b" not in said
        assert all(len(line) < 120 for line in result.err.splitlines() if "picture" in line)
    for path in captions[:7]:
        path.write_text("few words")
    assert ftk("prepare", run_file).code == 0
    result = ftk("cache", run_file, "--json")
    assert json.loads(result.out)["num_texts_truncated"] == 0
    assert "longer than" not in result.err


def test_stages_out_of_order_say_which_comes_first(ftk, workspace):
    run_file = workspace()
    for command, said in (("cache", "Run `ftk prepare"), ("train", "Run `ftk cache"), ("sample", "run `ftk train`")):
        result = ftk(command, run_file)
        assert result.code == 2
        assert said in result.err


def change_vae(model: Path) -> None:
    """Flip one bit in the middle of the weights: the same names, shapes and size."""
    path = model / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_cache_made_with_another_vae_is_refused_and_only_latents_are_encoded_again(ftk, cached, tmp_path):
    run_file = cached()
    assert ftk("train", run_file).code == 0
    change_vae(tmp_path / "model")
    refused = ftk("train", run_file)
    assert refused.code == 2
    assert "latents.weights.vae: expected" in refused.err
    report = json.loads(ftk("cache", run_file, "--json").out)
    assert (report["num_latents_encoded"], report["num_texts_encoded"]) == (12, 0)
    assert ftk("train", run_file, "--fresh").code == 0


@pytest.mark.parametrize(
    ("setting", "part"),
    [("cache.latents_dtype=float16", "latents.stored"), ("cache.text_dtype=bfloat16", "texts.dtype")],
)
def test_a_cache_of_other_settings_is_refused_with_what_differs(ftk, cached, setting, part):
    run_file = cached()
    refused = ftk("train", run_file, "--set", setting)
    assert refused.code == 2
    assert f"{part}: expected {setting.partition('=')[2]}, found float32" in refused.err


def test_a_cache_older_than_the_prepared_dataset_is_refused(ftk, cached, tmp_path):
    run_file = cached()
    min((tmp_path / "pictures").glob("*.txt")).write_text("an edited caption")
    assert ftk("prepare", run_file).code == 0
    refused = ftk("train", run_file)
    assert refused.code == 2
    assert "prepared dataset: expected" in refused.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.resolutions=[80]", "data.resolutions: expected [80], found [64]"),
        ("data.sources.0.repeats=3", "data.sources.pictures.repeats: expected 3, found 1"),
        ("data.sources.0.trigger=sks", "data.sources.pictures.trigger: expected sks, found nothing"),
    ],
)
def test_changed_data_settings_are_refused_until_prepare_has_run(ftk, cached, setting, said):
    run_file = cached()
    for command in ("cache", "train"):
        refused = ftk(command, run_file, "--set", setting)
        assert refused.code == 2
        assert said in refused.err
        assert "ftk prepare" in refused.err
    assert ftk("run", run_file, "--set", setting, "--set", "run=other").code == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}', "null"])
def test_a_damaged_manifest_is_named(ftk, cached, tmp_path, content):
    run_file = cached()
    for name, command in (("cache/cache.json", "train"), ("prepared/dataset.json", "cache")):
        path = tmp_path / "work" / name
        path.write_text(content)
        refused = ftk(command, run_file)
        assert refused.code == 2
        assert str(path) in refused.err


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_cut_index_is_named_left_alone_by_a_dry_run_and_made_again(ftk, cached, tmp_path, kind):
    run_file = cached()
    index = next((tmp_path / "work/cache" / kind).rglob("*.parquet"))
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    refused = ftk("train", run_file)
    assert refused.code == 2
    assert f"{index}: size: expected" in refused.err
    plan = json.loads(ftk("cache", run_file, "--dry-run", "--json").out)
    assert plan[f"num_{kind}_to_encode"] >= 12
    assert index.exists()
    assert json.loads(ftk("cache", run_file, "--json").out)[f"num_{kind}_encoded"] >= 12
    assert ftk("train", run_file).code == 0


def test_a_cut_table_of_the_prepared_dataset_is_named_and_made_again(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("prepare", run_file).code == 0
    table = tmp_path / "work/prepared/shards/00000.parquet"
    table.write_bytes(table.read_bytes()[:100])
    refused = ftk("cache", run_file)
    assert refused.code == 2
    assert f"{table} is damaged" in refused.err
    assert ftk("run", run_file).code == 0


def test_cut_metrics_are_said_and_do_not_stop_the_run(ftk, cached, tmp_path):
    run_file = cached()
    assert ftk("train", run_file).code == 0
    metrics = tmp_path / "work/runs/test/metrics.parquet"
    metrics.write_bytes(metrics.read_bytes()[:100])
    again = ftk("train", run_file, "--set", "train.steps=8")
    assert again.code == 0
    assert f"{metrics} is damaged" in again.err


def test_training_needs_neither_pictures_nor_encoders(ftk, cached, tmp_path):
    run_file = cached()
    for name in ("pictures", "work/prepared", "model/vae", "model/text_encoder", "model/tokenizer"):
        shutil.rmtree(tmp_path / name)
    shutil.move(tmp_path / "work", tmp_path / "moved")
    assert ftk("train", run_file, "--workspace", tmp_path / "moved").code == 0


def test_a_cut_cache_shard_is_named_and_only_it_is_encoded_again(ftk, workspace, tmp_path):
    run_file = workspace()
    settings = ("--set", "cache.shard_bytes=60000")
    assert ftk("prepare", run_file).code == ftk("cache", run_file, *settings).code == 0
    shard = sorted((tmp_path / "work/cache/latents").rglob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused = ftk("train", run_file)
    assert refused.code == 2
    assert str(shard) in refused.err
    report = json.loads(ftk("cache", run_file, *settings, "--json").out)
    assert 0 < report["num_latents_encoded"] < 12
    assert report["num_texts_encoded"] == 0
    assert ftk("train", run_file).code == 0


def test_a_flipped_bit_in_the_cache_never_reaches_the_model(ftk, cached, tmp_path):
    run_file = cached()
    shard = next((tmp_path / "work/cache/latents").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    for position in range(8 + header, len(data), 4096):
        data[position] ^= 4
    shard.write_bytes(bytes(data))
    refused = ftk("train", run_file)
    assert refused.code == 2
    assert "does not have its checksum" in refused.err


def test_a_cut_tar_shard_is_named_and_made_again(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("prepare", run_file).code == 0
    shard = tmp_path / "work/prepared/shards/00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    refused = ftk("cache", run_file)
    assert refused.code == 2
    assert "00000.tar is damaged" in refused.err
    assert ftk("prepare", run_file).code == 0
    assert shard.read_bytes() == whole


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(ftk, cached, tmp_path):
    run_file = cached(train={"steps": 6, "precision": "fp32", "learning_rate": 1e20, "max_grad_norm": None})
    result = ftk("train", run_file)
    assert result.code == 2
    assert "train.learning_rate" in result.err
    assert not list((tmp_path / "work/runs/test/checkpoints").glob("0*"))


def test_secrets_are_redacted_in_what_is_written(ftk, workspace, tmp_path):
    run_file = workspace(sample={"prompts": ["hf_abcdefghijklmnop"]})
    assert ftk("run", run_file).code == 0
    for path in (tmp_path / "work/runs/test").rglob("*"):
        if path.is_file():
            assert b"hf_abcdefghijklmnop" not in path.read_bytes(), path


def test_a_launcher_that_says_too_little_is_told_so(ftk, workspace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = ftk("train", workspace())
    assert result.code == 2
    assert "the environment variable RANK" in result.err


def test_tiny_does_not_write_over_anything(ftk, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert ftk("tiny", "qwen-image", tmp_path / "taken").code == 2
    assert ftk("tiny", "qwen-imgae", tmp_path / "new").code == 2
    assert ftk("tiny", "qwen-image", tmp_path / "new").code == 0
    models.get("qwen-image").check(tmp_path / "new")


def test_init_writes_a_run_file_once(ftk, tmp_path):
    path = tmp_path / "mine.yaml"
    assert ftk("init", path).code == 0
    assert "family: qwen-image" in path.read_text()
    assert ftk("init", path).code == 2
    assert ftk("init", tmp_path / "other.yaml", "--recipe", "nope").code == 2
