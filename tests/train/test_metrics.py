import json
import math
import statistics

import pytest
import torch

from hypo_train.metrics.meter import Meter, add_online_rewards


def groups(count, size=2, seed=0):
    """Return (count, size) values that are correlated within a group."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 1, generator=generator)
    return 5 + 3 * shared + 0.1 * torch.randn(count, size, generator=generator)


def test_the_standard_error_is_over_prompts_not_samples():
    meter, values = Meter(), groups(50)
    for batch in values.split(8):
        meter.add_groups("kl", batch)
    found = meter.read()
    prompts = values.double().mean(1).tolist()
    assert found["kl"] == pytest.approx(statistics.fmean(prompts))
    assert found["kl_se"] == pytest.approx(statistics.stdev(prompts) / math.sqrt(50), rel=1e-9)
    as_if_independent = float(values.std()) / math.sqrt(100)
    assert found["kl_se"] > 1.3 * as_if_independent


def test_the_standard_error_matches_repeated_draws():
    """Compare the reported error with the spread of the mean over many draws of prompts."""
    means, errors = [], []
    for seed in range(300):
        meter = Meter()
        meter.add_groups("kl", groups(20, size=8, seed=seed))
        found = meter.read()
        means.append(found["kl"])
        errors.append(found["kl_se"])
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)


def test_the_error_of_one_prompt_is_nan_of_equal_ones_zero():
    meter = Meter()
    meter.add_groups("kl", torch.tensor([[1.0, 2.0]]))
    assert math.isnan(meter.read()["kl_se"])
    meter.add_groups("kl", torch.full((7, 2), 0.1))
    assert meter.read()["kl_se"] == pytest.approx(0, abs=1e-8)
    meter.add_groups("kl", torch.tensor([[1.0], [math.nan]]))
    assert math.isnan(meter.read()["kl_se"])


def test_a_restored_meter_reads_the_same():
    values = groups(12)
    whole, first, second = Meter(), Meter(), Meter()
    for meter in (whole, first):
        meter.add("loss", values[:5])
        meter.add_groups("kl", values[:5])
    second.load(json.loads(json.dumps(first.state())))
    for meter in (whole, second):
        meter.add("loss", values[5:])
        meter.add_groups("kl", values[5:])
    assert second.read() == whole.read()
    assert whole.read() == {}


def test_prompts_whose_rewards_are_all_equal_are_counted():
    meter = Meter()
    add_online_rewards(meter, torch.tensor([1.0, 1.0, 2.0, 4.0]), num_generations=2)
    found = meter.read()
    assert found == {"reward": 2.0, "reward_std": pytest.approx(0.5**0.5), "frac_reward_zero_std": 0.5}
