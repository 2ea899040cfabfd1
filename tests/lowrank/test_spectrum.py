"""Singular values and ranks of matrices that have known ones."""

import math

import pytest
import torch

from relora_ds.lowrank.singular_values import Spectrum, spectrum_of


def matrix(singular_values: list[float], rows: int = 60, columns: int = 90, dtype=torch.float64) -> torch.Tensor:
    """`[rows, columns]` with these singular values, the others 0."""
    generator = torch.Generator().manual_seed(0)
    n = len(singular_values)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (rows, columns)
    )
    return (left * torch.tensor(singular_values, dtype=torch.float64) @ right.T).to(dtype)


def test_singular_values_are_those_of_the_matrix():
    values = [4.0, 2.0, 0.5, 0.03]
    for given in (matrix(values), matrix(values).T):
        found = spectrum_of(given)
        assert found.is_exact and found.num_all == 60 and found.singular_values.dtype == torch.float64
        assert found.singular_values[:4].tolist() == pytest.approx(values) and found.singular_values[4] < 1e-12
        assert found.norm == pytest.approx(math.sqrt(sum(value**2 for value in values)))


def test_ranks():
    found = spectrum_of(matrix([4.0, 2.0, 0.5, 0.03], dtype=torch.float32))
    assert found.singular_values.dtype == torch.float32
    assert found.numerical_rank() == 3  # 0.03 is below 1 % of 4
    assert found.numerical_rank(0.001) == 4 and found.numerical_rank(0.51) == 1
    assert found.stable_rank == pytest.approx((16 + 4 + 0.25 + 0.0009) / 16)
    assert found.count_below() == 57 and found.count_below(1.0) == 58


@pytest.mark.parametrize("n", [1, 7, 60])
def test_equal_singular_values_are_a_rank_in_every_sense(n):
    found = spectrum_of(matrix([3.0] * n))
    assert found.numerical_rank() == n
    assert found.stable_rank == pytest.approx(n) and found.effective_rank == pytest.approx(n)


def test_effective_rank_is_the_exponential_of_the_entropy():
    shares = [0.5, 0.25, 0.25]
    assert spectrum_of(matrix(shares)).effective_rank == pytest.approx(math.exp(1.5 * math.log(2)))


@pytest.mark.parametrize("exact_up_to", [60, 10])
def test_an_update_of_zeros_has_rank_0(exact_up_to):
    found = spectrum_of(torch.zeros(60, 90), exact_up_to=exact_up_to, num_largest=8)
    assert (found.numerical_rank(), found.stable_rank, found.effective_rank, found.count_below()) == (0, 0, 0, 60)


def test_the_largest_of_a_large_matrix():
    values = [0.8**i for i in range(60)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = spectrum_of(matrix(values), exact_up_to=59, num_largest=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.is_exact and found.num_all == 60
    assert found.singular_values.tolist() == pytest.approx(values[:20])
    exact = spectrum_of(matrix(values))
    assert found.stable_rank == pytest.approx(exact.stable_rank) and found.effective_rank is None
    assert found.numerical_rank(0.1) == exact.numerical_rank(0.1)
    assert found.count_below(0.1) == exact.count_below(0.1) == 60 - 11
    assert found.count_below(0.001) is None, "all of the largest are above it, the others may be or not"
    torch.manual_seed(6)
    again = spectrum_of(matrix(values), exact_up_to=59, num_largest=20)
    assert torch.equal(again.singular_values, found.singular_values)


def test_a_flat_spectrum_is_underestimated_by_little():
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(300, 400, generator=generator)
    exact, found = spectrum_of(given), spectrum_of(given, exact_up_to=100, num_largest=30)
    ratio = found.singular_values / exact.singular_values[:30]
    assert ratio.max() < 1 + 1e-5 and ratio.min() > 0.97


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    given = torch.zeros(3, 4)
    given[1, 2] = value
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has values that are not finite"):
        spectrum_of(given)


def test_low_precision_is_read_in_fp32():
    found = spectrum_of(matrix([4.0, 2.0]).bfloat16())
    assert isinstance(found, Spectrum) and found.singular_values.dtype == torch.float32
