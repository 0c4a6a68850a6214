"""The matrix of a rank that is nearest to another: its largest singular directions, their roots on either side.

Eckart and Young 1936. A convolution's weights are a matrix [out, in x kernel]; its factor A has the kernel and B is 1x1, as in
LyCORIS' LoCon and PEFT.

Shape legend: O outputs, I inputs (of convolutions times the kernel's cells), R rank, h w the kernel's sides.
"""

import torch

from ftk.methods.lora import Factors

_EXACT_NUMBERS = 2 << 20
"""Matrices of at most so many numbers are decomposed exactly, in about a second; one of 3072 x 3072 would take a quarter of a
minute."""
_POWER_ITERATIONS = 8


def squared_norm(tensor: torch.Tensor) -> float:
    """The sum of squares, in fp64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def decompose(difference: torch.Tensor, rank: int, energy: float | None, dtype: torch.dtype) -> tuple[Factors, float]:
    """The factors of a layer's change [O,I] or [O,I,h,w], and the squared norm of what they leave of it.

    Args:
        energy: the lowest rank that keeps this share of the squared norm, where that is below `rank`.
    """
    change_OI = difference.flatten(1)
    rank = min(rank, *change_OI.shape)
    U_OR, S_R, V_RI = largest_directions(change_OI, rank)
    if energy is not None:
        kept_R = S_R.double().square().cumsum(0)
        wanted = energy * squared_norm(change_OI)
        rank = min(rank, int((kept_R < wanted).sum()) + 1)
    roots_R = S_R[:rank].sqrt()
    B = (U_OR[:, :rank] * roots_R).to(dtype)
    A = (roots_R[:, None] * V_RI[:rank]).to(dtype)
    rest = squared_norm(change_OI - B.float() @ A.float())
    if difference.ndim > 2:
        A = A.reshape(rank, *difference.shape[1:])
        B = B.reshape(*B.shape, *[1] * (difference.ndim - 2))
    return Factors(A=A.cpu().contiguous(), B=B.cpu().contiguous(), magnitude=None), rest


def largest_directions(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [O,R], S [R], V [R,I]) of the largest singular values, falling.

    Exact where the matrix is small, or where most of it is asked for. Elsewhere by random projections onto twice the rank and
    eight power iterations (Halko et al. 2009, arXiv 0909.4061, algorithm 4.4), a twentieth of the work: exact to rounding where
    the spectrum falls, a few percent of the energy below the best where it is flat. Seeded: equal matrices, equal factors.
    """
    size = 2 * rank + 16
    if matrix_OI.numel() <= _EXACT_NUMBERS or min(matrix_OI.shape) <= 2 * size:
        U, S, V = torch.linalg.svd(matrix_OI, full_matrices=False)
        return U[:, :rank], S[:rank], V[:rank]
    with torch.random.fork_rng(devices=[matrix_OI.device] if matrix_OI.device.type == "cuda" else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix_OI, q=size, niter=_POWER_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank].T
