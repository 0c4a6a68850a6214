"""What an adapter of LoRA's, LoHa's or LoKr's kind does to the weight of one layer, computed from the tensors of a file.

LoRA: W + s B A. LoHa: W + s (B1 A1) * (B2 A2). LoKr: W + s C (x) D, where C and D are whole or products. In DoRA each row of
W + s B A is scaled to a trained length. Factored kernels have a core tensor (`lora_mid`, `hada_t1`, `lokr_t2`).

Sources: LyCORIS (Yeh et al. 2023, arXiv 2309.14859), `lycoris/functional`; DoRA (Liu et al. 2024, arXiv 2402.09353).

Shape legend: O outputs, I inputs (of convolutions times the kernel's cells), R rank, h w the kernel's sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

TENSORS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora_A", "lora_B", "lora_mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""The tensors of each kind, by the names that PEFT and LyCORIS give them."""
_SCALED = ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factor of each kind that takes a scale: the change is linear in it."""
_CORE = "i j h w, i p, j r -> p r h w"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """What one layer's adapter does.

    Attributes:
        kind: `lora`, `loha` or `lokr`.
        tensors: fp32, by the names in `TENSORS`.
        rank: of the factors; None of a LoKr with two whole factors, which has none.
        scale: the strength, alpha / rank.
        magnitude: [O] or [1,I], DoRA's length of each row or column of the changed weight; else None.
        from_original: whether the magnitude is to be divided by the length in W, as ComfyUI does, not in W + s B A.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    rank: int | None
    scale: float
    magnitude: torch.Tensor | None = None
    from_original: bool = False

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * (self.rank or 1)

    def at_scale(self, scale: float) -> "LayerChange":
        """The same change with this scale, and the rest of the strength in its tensors."""
        factor = self.scale / scale
        tensors = {name: tensor * factor if name in _SCALED else tensor for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, scale=scale)

    def delta(self, shape: torch.Size) -> torch.Tensor:
        """What is added to a weight of this shape, fp32; DoRA's lengths left out.

        Raises:
            ValueError: the tensors do not make a weight of this shape.
        """
        tensors = dict(self.tensors)
        try:
            change = {"lora": _lora, "loha": _loha, "lokr": _lokr}[self.kind](tensors)
            whole = change.reshape(shape) * self.scale
        except (RuntimeError, KeyError, IndexError) as error:
            shapes = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())
            raise ValueError(f"{shapes} make no weight of shape {'x'.join(map(str, shape))}") from error
        return whole

    def applied(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The changed weight in fp32. With DoRA the strength is a share of the whole change, rescaling included."""
        original = weight.detach().float()
        delta = self.delta(weight.shape).to(original.device)
        if self.magnitude is None:
            return original + strength * delta
        changed = original + delta
        axes = [axis for axis in range(changed.ndim) if axis != self._axis(changed)]
        measured = original if self.from_original else changed
        lengths = torch.linalg.vector_norm(measured, dim=axes, keepdim=True)
        scaled = changed * self.magnitude.to(original.device).reshape(lengths.shape) / lengths
        return original + strength * (scaled - original)

    def _axis(self, weight: torch.Tensor) -> int:
        """The axis along which the magnitude has a number for each row; early files of LyCORIS have it on the inputs."""
        assert self.magnitude is not None
        is_on_inputs = self.magnitude.ndim > 1 and self.magnitude.shape[0] == 1 and self.magnitude.shape[1] == weight.shape[1]
        return 1 if is_on_inputs and self.magnitude.numel() > 1 else 0


def without_core(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA's factors with a core tensor [R,R,h,w] between them, multiplied into A."""
    if "lora_mid" not in tensors:
        return dict(tensors)
    down_RI = tensors["lora_A"].flatten(1)
    A = torch.einsum("a b h w, b i -> a i h w", tensors["lora_mid"], down_RI)
    return {"lora_A": A.contiguous(), "lora_B": tensors["lora_B"]}


def rank_of(kind: str, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The rank as LyCORIS and ComfyUI count it, None where a LoKr has no factor of low rank."""
    if kind == "lora":
        return int(tensors["lora_A"].shape[0])
    names = ("hada_w1_b",) if kind == "loha" else ("lokr_w2_b", "lokr_w1_b")
    return next((int(tensors[name].shape[0]) for name in names if name in tensors), None)


def _lora(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    factors = without_core(tensors)
    return factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return _product(tensors, "hada_w1", "hada_t1") * _product(tensors, "hada_w2", "hada_t2")


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    small_factor = tensors["lokr_w1"] if "lokr_w1" in tensors else _product(tensors, "lokr_w1", "lokr_t1")
    right = tensors["lokr_w2"] if "lokr_w2" in tensors else _product(tensors, "lokr_w2", "lokr_t2")
    return torch.kron(small_factor.reshape(*small_factor.shape, *[1] * (right.ndim - small_factor.ndim)), right.contiguous())


def _product(tensors: Mapping[str, torch.Tensor], name: str, core: str) -> torch.Tensor:
    """a b, or with a core tensor of the kernel's sides a^T t b."""
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum(_CORE, tensors[core], a, b) if core in tensors else a @ b
