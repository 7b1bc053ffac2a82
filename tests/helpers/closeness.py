# SPDX-License-Identifier: Apache-2.0
"""The three-way rule: our error against the truth, measured by torch's error against the truth.

R is a float64 reference, T what torch computes in the dtype under test, K what dilseg computes.
A fixed tolerance hides an error that is small and systematic, so four things are compared.
"""

import os

import torch
from torch import Tensor

# Half types are accumulated in float32.
_ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
# Standard errors a mean of independent rounding errors may be away from zero.
_Z = 6.0


def floor(dtype: torch.dtype, depth: int, scale: float) -> float:
    """Error that is always allowed: one unit in the last place of the largest result, and the
    random walk of ``depth`` roundings in the accumulator."""
    accumulator = torch.finfo(_ACCUMULATION[dtype]).eps
    return scale * (torch.finfo(dtype).eps + accumulator * depth**0.5)


def assert_three_way(
    ours: Tensor,
    rival: Tensor,
    reference: Tensor,
    *,
    depth: int,
    scale: float | None = None,
) -> None:
    """Asserts that K = ``ours`` is about as close to R = ``reference`` as T = ``rival`` is.

    Args:
        ours: K, in the dtype under test.
        rival: T, in the dtype under test.
        reference: R, in float64.
        depth: Number of terms in the longest sum behind one element.
        scale: Size of those sums before cancellation; the largest |R| if not given.

    With bound = 2 max|T-R| + floor(dtype, depth, scale):

    1. max|K-R| <= bound.
    2. ||K-R|| <= 2 ||T-R|| + floor * sqrt(numel)  (many small errors).
    3. 1 - cos(K, R) <= twice the square of rule 2's relative bound  (a wrong direction).
    4. The mean of K-R, and of K-R towards zero, are within _Z standard errors of T's root mean
       square error (a systematic error: truncation, a lost term).
    """
    assert ours.shape == rival.shape == reference.shape, (
        f"shapes differ: ours {tuple(ours.shape)}, torch {tuple(rival.shape)}, "
        f"reference {tuple(reference.shape)}"
    )
    if ours.numel() == 0:
        return
    k, t, r = (x.detach().double().cpu().flatten() for x in (ours, rival, reference))
    finite = r.isfinite()
    assert torch.equal(k.isnan(), r.isnan()), "ours and the reference are nan in different places"
    assert torch.equal(k.isinf(), r.isinf()), "ours and the reference are inf in different places"
    where = finite.nonzero().flatten()
    k, t, r = k[finite], t[finite], r[finite]
    if not len(r):
        return
    error, rival_error = k - r, t - r
    least = floor(ours.dtype, depth, float(r.abs().max()) if scale is None else scale)
    problems = []

    bound = 2 * float(rival_error.abs().max()) + least
    worst = int(error.abs().argmax())
    if not float(error.abs().max()) <= bound:
        problems.append(f"max|K-R| = {float(error.abs().max()):.3e} > {bound:.3e}")

    norm_bound = 2 * float(rival_error.norm()) + least * len(r) ** 0.5
    if not float(error.norm()) <= norm_bound:
        problems.append(f"||K-R|| = {float(error.norm()):.3e} > {norm_bound:.3e}")

    size = float(k.norm() * r.norm())
    if size > 0:
        away = 1 - float(k @ r) / size
        away_bound = 2 * (norm_bound / float(r.norm())) ** 2 + 1e-14
        if not away <= away_bound:
            problems.append(f"1 - cos(K, R) = {away:.3e} > {away_bound:.3e}")

    spread = 2 * float(rival_error.norm()) / len(r) ** 0.5 + least
    bias_bound = _Z * spread / len(r) ** 0.5
    for name, bias in (
        ("mean(K-R)", error.mean()),
        ("mean((K-R) sign R)", (error * r.sign()).mean()),
    ):
        if not abs(float(bias)) <= bias_bound:
            problems.append(f"|{name}| = {abs(float(bias)):.3e} > {bias_bound:.3e}")

    if problems:
        coordinate = [int(i) for i in torch.unravel_index(where[worst], reference.shape or (1,))]
        node = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
        raise AssertionError(
            "; ".join(problems)
            + f"\nworst at {coordinate}: R = {float(r[worst])!r}, T = {float(t[worst])!r}, "
            f"K = {float(k[worst])!r}\nrun again: python -m pytest '{node}'"
        )


def assert_bitwise_equal(a: Tensor, b: Tensor) -> None:
    """Asserts equal bits, and says where the first difference is."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"dtypes differ: {a.dtype} and {b.dtype}"
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    different = a.contiguous().view(width) != b.contiguous().view(width)
    if bool(different.any()):
        at = different.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(different.sum())} of {a.numel()} elements differ, first at {at}: "
            f"{a[tuple(at)].item()!r} and {b[tuple(at)].item()!r}"
        )
