"""The experiment on coverage × method: its worlds, its selection, and a miniature of its training."""

import pytest
import torch

from benchmarks.paper.interaction.methods import SWEEPS, preference_loss, train
from benchmarks.paper.interaction.selection import of_reference, select
from benchmarks.paper.interaction.world import COVERED, LOWEST, Kind, make_worlds

SILENT = Kind(epsilon=0.01, covering=False, misleading=True)


def test_silent_pairs_compare_covered_responses_only():
    silent, covering = (make_worlds(Kind(0.01, c, True), [100]) for c in (False, True))
    assert silent.train.chosen.max() < COVERED <= covering.train.chosen.max()
    assert (silent.rewards[:, :, COVERED:] == LOWEST).all()
    assert silent.log_ref.exp()[COVERED:].sum().item() == pytest.approx(0.01)


def test_a_seeds_world_does_not_depend_on_other_seeds():
    alone, together = make_worlds(SILENT, [101]), make_worlds(SILENT, [100, 101])
    assert torch.equal(alone.rewards[0], together.rewards[1])
    assert torch.equal(alone.held_out.chosen[0], together.held_out.chosen[1])


@pytest.mark.parametrize("method", SWEEPS)
def test_every_method_repeats_its_bits_and_moves(method):
    worlds = make_worlds(SILENT, [100, 101])
    first, second = (train(worlds, [100, 101], SWEEPS[method][:2], checkpoints=(3,)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["kl"] > 0).all()


def test_a_selection_stays_within_its_budget():
    points = {"kl": torch.tensor([[[1.0], [3.0]]]), "reward": torch.tensor([[[0.5], [2.0]]])}
    reference = {"kl": torch.zeros(1), "reward": torch.tensor([0.1])}
    found = [select(points, reference, budget=b, rule="reward")["reward"].item() for b in (0.5, 2.0, 4.0)]
    assert found == pytest.approx([0.1, 0.5, 2.0])


def test_the_reference_has_no_kl():
    found = of_reference(make_worlds(SILENT, [100]))
    assert found["kl"].item() == 0
    assert found["uncovered"].item() == pytest.approx(0.01)


def test_chi_po_is_dpo_with_the_ratio_added():
    chosen, rejected, beta = torch.tensor(0.4), torch.tensor(-0.3), torch.tensor(0.5)
    margin = beta * (chosen.exp() + chosen - rejected.exp() - rejected)
    expected = -torch.nn.functional.logsigmoid(margin)
    assert preference_loss("χPO", chosen, rejected, beta).item() == pytest.approx(expected.item())
