"""Routers without parameters: hash and random."""

import pytest
import torch

from moefold import routers
from tests.routers.common import DIM, untyped


def hashed(ids: torch.Tensor, experts: int = 8, **settings) -> torch.Tensor:
    router = routers.build("hash", dim=DIM, num_experts=experts, **settings)
    return router(torch.randn(*ids.shape, DIM), None, ids).chosen


# Hash


def test_an_id_has_its_experts_once_and_for_all():
    # Whatever the token holds, wherever it stands, in whichever router of this seed and pass.
    one = hashed(torch.tensor([[5, 9, 5, 5], [9, 7, 5, 9]]))
    assert torch.equal(one[0, 0], one[0, 2])
    assert torch.equal(one[0, 0], one[1, 2])
    assert torch.equal(one[0, 1], one[1, 3])
    alone = hashed(torch.tensor([[9]]))
    assert torch.equal(alone[0, 0], one[0, 1])


@pytest.mark.parametrize("k", [1, 2, 8])
def test_every_token_has_k_experts_of_equal_weight(k):
    router = routers.build("hash", dim=DIM, num_experts=8, k=k)
    routing = router(torch.randn(1, 50, DIM), None, torch.arange(50)[None])
    assert (routing.chosen.sum(2) == k).all()
    assert routing.weights[routing.chosen].tolist() == pytest.approx([1 / k] * 50 * k)
    assert routing.weight_of_row.dtype == torch.float32


@pytest.mark.parametrize("ids", [torch.arange(8000), torch.arange(8000) * 1024], ids=["", "even"])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_ids_spread_over_experts(ids, seed):
    # Neighbouring ids, and ids that share their last ten bits. If loads are those of independent
    # uniform draws, chi-square with 7 degrees of freedom exceeds 24.3 once in a thousand seeds.
    load = hashed(ids[None], seed=seed).sum((0, 1)).double()
    assert ((load - 1000).square() / 1000).sum().item() < 24.3


def test_neighbours_are_unrelated():
    # Of pairs of neighbouring ids, one in eight shares its expert: 1000 +- 30 of 8000, and 4 sigma.
    expert = hashed(torch.arange(8001)[None]).int().argmax(2)[0]
    same = int((expert[1:] == expert[:-1]).sum())
    assert abs(same - 1000) < 4 * 30


def test_another_seed_is_another_hash():
    ids = torch.arange(8000)[None]
    one, two = (hashed(ids, seed=seed).int().argmax(2) for seed in (0, 1))
    assert abs(int((one == two).sum()) - 1000) < 4 * 30


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40, 10**20])
def test_any_whole_number_is_a_seed(seed):
    chosen = hashed(torch.arange(-50, 50)[None], seed=seed)
    assert (chosen.sum(2) == 1).all()
    assert chosen.any(1).sum() > 4


def test_ids_of_any_integer_dtype_hash_alike():
    ids = torch.arange(100)[None]
    with untyped():
        assert torch.equal(hashed(ids), hashed(ids.int()))
        assert torch.equal(hashed(ids), hashed(ids.to(torch.uint8)))


def test_by_position_needs_no_ids():
    router = routers.build("hash", dim=DIM, num_experts=8, by="position", seed=3)
    chosen = router(torch.randn(2, 20, DIM)).chosen
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[:1], hashed(torch.arange(20)[None], seed=3))
    given = router(torch.randn(2, 20, DIM), None, torch.zeros(2, 20, dtype=torch.long)).chosen
    assert torch.equal(given, chosen)


def test_positions_count_real_tokens():
    # 1111 / ..11 / 1.1.: the third sequence's second token has position 1, wherever it stands.
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    router = routers.build("hash", dim=DIM, num_experts=8, by="position", seed=3)
    chosen = router(torch.randn(3, 4, DIM), mask).chosen
    assert torch.equal(chosen[1][mask[1]], chosen[0, :2])
    assert torch.equal(chosen[2][mask[2]], chosen[0, :2])
    assert not torch.equal(chosen[0, :2], chosen[0, 2:])
    assert not chosen[~mask].any()


# Random


def test_random_differs_between_passes_and_follows_the_generator():
    router = routers.build("random", dim=DIM, num_experts=8, k=2).eval()
    x = torch.randn(1, 100, DIM)
    torch.manual_seed(0)
    one, two = router(x).chosen, router(x).chosen
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(router(x).chosen, one)


def test_random_takes_k_different_experts_of_equal_weight():
    router = routers.build("random", dim=DIM, num_experts=8, k=3)
    routing = router(torch.zeros(1, 200, DIM))
    assert (routing.chosen.sum(2) == 3).all()
    assert routing.weights[routing.chosen].tolist() == pytest.approx([1 / 3] * 600)


def test_random_prefers_nobody():
    # Chi-square as above, with 7 degrees of freedom; equal tokens have unrelated draws.
    router = routers.build("random", dim=DIM, num_experts=8, k=1)
    load = router(torch.zeros(1, 8000, DIM)).chosen.sum((0, 1)).double()
    assert ((load - 1000).square() / 1000).sum().item() < 24.3


@pytest.mark.parametrize("name", ["hash", "random"])
def test_they_have_nothing_to_balance_and_nothing_to_learn(name):
    router = routers.build(name, dim=DIM, num_experts=8)
    routing = router(torch.randn(1, 5, DIM), None, torch.arange(5)[None])
    assert not list(router.parameters())
    assert not router.state_dict()
    assert routing.logits is None
    assert not routing.weight_of_row.requires_grad
