"""Who gets which images, and what a client's scanner makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from fednano.client.digits import load_split
from fednano.client.partitions import BadPartition, Scanner, partition
from hypothesis import given
from hypothesis import strategies as st

ALPHAS = st.sampled_from(["0.001", "0.1", "0.5", "1", "100", "1000000"])
SCHEMES = st.one_of(
    st.just("iid"),
    st.builds("dirichlet:{}".format, ALPHAS),
    st.builds("quantity:{}".format, ALPHAS),
    st.builds("feature:{}".format, st.sampled_from(["0", "0.5", "1"])),
)
CLIENTS = st.integers(1, 20)


def sizes(scheme: str, clients: int = 5, samples: int = 1000, seed: int = 0) -> list[int]:
    return [len(share) for share in partition([0] * samples, clients, scheme, seed)]


@given(SCHEMES, CLIENTS, st.data())
def test_partitions_are_disjoint_and_exhaustive_and_leave_nobody_empty(
    scheme: str, clients: int, data: st.DataObject
) -> None:
    most = st.integers(8 * clients, 8 * clients + 300)
    labels = data.draw(most.flatmap(lambda n: st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    shares = partition(labels, clients, scheme, data.draw(st.integers(0, 2**63 - 1)))
    assert sorted(np.concatenate(shares)) == list(range(len(labels)))
    assert len(shares) == clients
    assert min(len(share) for share in shares) >= 8


@given(SCHEMES, CLIENTS, st.integers(0, 2**63 - 1))
def test_partitions_are_functions_of_the_seed(scheme: str, clients: int, seed: int) -> None:
    labels = list(range(10)) * 20
    first, again = (partition(labels, clients, scheme, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "quantity:0.5", "feature:1"])
def test_another_seed_deals_otherwise(scheme: str) -> None:
    labels = list(range(10)) * 40
    one, other = (partition(labels, 4, scheme, seed) for seed in (1, 2))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_small_alpha_skews_the_labels() -> None:
    labels = np.repeat(np.arange(10), 100)
    shares = partition(labels.tolist(), 4, "dirichlet:0.1", seed=0)
    assert max(np.bincount(labels[share]).max() / len(share) for share in shares) > 0.3


def test_quantity_skew_gives_unequal_shares_of_the_same_labels() -> None:
    labels = np.tile(np.arange(4), 500)
    shares = partition(labels.tolist(), 5, "quantity:0.5", seed=0)
    assert max(map(len, shares)) > 3 * min(map(len, shares))
    for share in shares:
        if len(share) > 200:
            assert np.abs(np.bincount(labels[share]) / len(share) - 0.25).max() < 0.1


def test_the_larger_alpha_the_more_equal_are_the_shares() -> None:
    spreads = [np.mean([np.std(sizes(f"quantity:{a}", seed=s)) for s in range(20)])
               for a in (0.1, 1, 10, 1000)]  # fmt: skip
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 200
    assert spreads[-1] < 10


def test_iid_and_feature_skew_give_the_same_equal_shares() -> None:
    iid, scanned = (partition([0] * 1001, 5, scheme, seed=3) for scheme in ("iid", "feature:1"))
    assert [len(share) for share in iid] == [201, *[200] * 4]
    assert all(np.array_equal(a, b) for a, b in zip(iid, scanned, strict=True))


@pytest.mark.parametrize(
    "scheme",
    ["even", "dirichlet", "dirichlet:", "dirichlet:-1", "iid:2", "quantity:0", "feature:1.1"],
)
def test_an_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(BadPartition, match=f"scheme: expected iid, .* got {scheme!r}"):
        partition([0] * 100, 2, scheme, seed=0)


@pytest.mark.parametrize("clients", [0, 13])
def test_an_impossible_number_of_clients_is_refused(clients: int) -> None:
    with pytest.raises(BadPartition, match=f"clients: expected 1 to 12 .* got {clients}"):
        partition([0] * 100, clients, "iid", seed=0)


def test_a_scanner_is_the_same_every_time_and_another_clients_is_another() -> None:
    digit = load_split("train")[0]
    mine, again, others = (Scanner(client, 1.0).scan(digit.image, digit.id) for client in (0, 0, 1))
    assert mine.tobytes() == again.tobytes() != others.tobytes()
    assert (mine.size, mine.mode) == (digit.image.size, "RGB")


def test_strength_scales_what_a_scanner_does() -> None:
    digits = load_split("train")[:20]

    def change(strength: float) -> float:
        scanner = Scanner(3, strength)
        pairs = [(scanner.scan(d.image, d.id), d.image) for d in digits]
        return float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b)) for a, b in pairs]))

    changes = [change(strength) for strength in (0.0, 0.25, 0.5, 1.0)]
    assert changes == sorted(changes)
    assert changes[0] == 0 < changes[1] < 0.6 * changes[3]


def test_only_feature_skew_has_scanners() -> None:
    assert Scanner.of("feature:0.5", 2) == Scanner(2, 0.5)
    assert Scanner.of("iid", 2) is Scanner.of("quantity:1", 2) is None
