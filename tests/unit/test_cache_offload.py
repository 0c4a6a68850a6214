"""An encoder whose weights are streamed encodes to the bits of a resident one, and holds no weights between two calls."""

import logging
from pathlib import Path

import pytest
import torch

from ftk.cache.offload import placement, stream
from ftk.models import base as families

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a much longer caption of a blue square beside it"]


@pytest.mark.parametrize("name", families.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weights_give_the_bits_of_resident_ones(tiny_models, name, dtype):
    family, streamed_models = families.get(name), []

    def place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        streamed_models.append(stream(model, device))
        return streamed_models[-1]

    resident = family.load_text_encoder(tiny_models(name), dtype, CPU)
    streamed = family.load_text_encoder(tiny_models(name), dtype, CPU, place=place)
    assert len(streamed_models) == sum(component.startswith("text_encoder") for component in family.text_components)
    for _ in range(2):
        expected, texts = (family.encode_texts(encoder, CAPTIONS) for encoder in (resident, streamed))
        for expected_text, text in zip(expected, texts, strict=True):
            assert list(text) == list(expected_text)
            for part, tensor in expected_text.items():
                torch.testing.assert_close(text[part], tensor, rtol=0, atol=0)
        for model in streamed_models:
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
            assert model.device == CPU
    assert family.text_memory(streamed, 10) == family.text_memory(resident, 10)


def test_a_cache_made_with_streamed_weights_has_the_same_bytes(workspace_cache):
    none, layers = (workspace_cache(offload) for offload in ("none", "layers"))
    assert none
    assert layers == none


@pytest.mark.parametrize(("free_bytes", "is_streamed"), [((1 << 30) + 2000, False), (1 << 30, True)])
def test_auto_streams_what_does_not_fit_beside_a_batch(monkeypatch, caplog, free_bytes, is_streamed):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 1 << 40))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    caplog.set_level(logging.INFO, "ftk")
    place = placement("auto", torch.device("cuda", 0))
    model = place(torch.nn.Linear(16, 16), torch.device("cuda", 0))
    assert (model.weight.device.type == "meta") == is_streamed
    assert ("streamed from host memory" in caplog.text) == is_streamed


def test_only_what_is_asked_for_is_streamed():
    assert placement("auto", CPU) is None
    assert placement("none", torch.device("cuda")) is None
    assert placement("layers", CPU) is stream


@pytest.fixture
def workspace_cache(tiny_models, tmp_path):
    """Encode texts into a folder under a setting of `cache.offload`; the bytes of its files."""
    from ftk.cache import encode
    from ftk.cache.plan import TextItem, Unit
    from ftk.configs.schema import CacheConfig, ModelConfig

    def make(offload: str) -> dict[str, bytes]:
        folder = tmp_path / offload
        config = CacheConfig(offload=offload, device="cpu")
        job = encode.EncodeJob(
            kind="texts", base=ModelConfig(family="qwen-image", path="unused"), model=tiny_models("qwen-image"),
            folder=folder, prepared=Path(), config=config, workers=1,
        )  # fmt: skip
        unit = Unit(number=0, items=tuple(TextItem(id=f"{n}", caption=caption) for n, caption in enumerate(CAPTIONS)))
        encode.encode_unit(job, unit)
        encode.release()
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return make
