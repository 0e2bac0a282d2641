from itertools import product

import numpy as np
import pytest
from made_records import frame, record

from domainbed_hp.registry import UsageError
from domainbed_hp.reports.compare import compare_rows


def paired(gains, dataset="PACS"):
    """Records of LoRA and ERM: `gains[env][trial]` is what LoRA has more."""
    records = []
    for env, of_env in enumerate(gains):
        for trial, gain in enumerate(of_env):
            base = 0.5 + 0.01 * env - 0.02 * trial
            records += [record(env, base, trial, algorithm="ERM", dataset=dataset)]
            records += [record(env, base + float(gain), trial, algorithm="LoRA", dataset=dataset)]
    return records


def first(records, a="LoRA", b="ERM"):
    return compare_rows(frame(records), a, b)[0]


def test_differences_are_paired_and_averaged_over_environments():
    result = first(paired([[0.01, 0.03], [0.02, 0.04], [0.0, 0.0], [-0.04, -0.02]]))
    assert [(d.where, round(d.mean, 9), d.n) for d in result.differences] == [
        *(("A", 2.0, 2), ("C", 3.0, 2), ("P", 0.0, 2), ("S", -3.0, 2), ("all", 0.5, 8))
    ]


def test_p_is_that_of_all_sign_flips():
    rng = np.random.default_rng(0)
    gains = rng.normal(0.02, 0.02, (2, 5))
    result = first(paired(gains))
    for i in range(2):
        flips = np.array(list(product((-1, 1), repeat=5))) * gains[i]
        upper = (flips.mean(1) >= gains[i].mean() - 1e-12).mean()
        lower = (flips.mean(1) <= gains[i].mean() + 1e-12).mean()
        assert result.differences[i].p == pytest.approx(min(1, 2 * min(upper, lower)))


def test_the_interval_is_around_the_mean_and_narrows_with_trials():
    rng = np.random.default_rng(0)
    few, many = (first(paired(rng.normal(0.03, 0.02, (2, n)))).differences[-1] for n in (4, 40))
    for d in (few, many):
        assert d.low < d.mean < d.high
    assert many.high - many.low < 0.6 * (few.high - few.low)
    # 95 % of the normal approximation: 2 * 1.96 * 2 points / sqrt(80)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 2 / 80**0.5, rel=0.2)


def test_the_interval_makes_up_for_few_trials():
    """Gains of 0 and 2: the outermost resamples deviate by 1, which the correction multiplies by sqrt(2)."""
    result = first(paired([[0.0, 0.02]])).differences[0]
    assert (result.low, result.high) == pytest.approx((1 - 2**0.5, 1 + 2**0.5))


def test_equal_rows_do_not_differ():
    result = first(paired([[0.0] * 6, [0.0] * 6]))
    assert [(d.mean, d.p, d.low, d.high) for d in result.differences] == [(0, 1, 0, 0)] * 3
    assert not result.list_warnings()


def test_too_few_trials_are_a_warning_and_a_single_one_tells_nothing():
    alone, together = first(paired([[0.01, 0.02, 0.03]] * 2)).list_warnings()
    assert (
        alone == "PACS, A, C: with 3 trials p cannot fall below 0.25, and the interval is too narrow; run more trials"
    )
    assert together == "PACS, all: with 3 trials the interval is too narrow; run more trials"
    single = first(paired([[0.01]]))
    assert single.differences[0].p is None
    assert "PACS, A, all: with 1 trial there is no interval and no p" in single.to_text()
    assert [bool(first(paired([[0.01] * n])).list_warnings()) for n in (5, 6)] == [True, False]


def test_each_number_of_trials_has_a_warning_of_its_own():
    result = first(paired([[0.01], [0.01, 0.02, 0.01, 0.02]]))
    assert [line.split(": ")[0] for line in result.list_warnings()] == ["PACS, A", "PACS, C", "PACS, all"]
    assert result.differences[2].p is not None and result.differences[2].low is None


def test_the_mean_of_all_is_that_of_the_environments_whatever_their_trials():
    gains = [[0.10, 0.12], [0.01, 0.02, 0.03, -0.01, 0.0]]
    result = first(paired(gains)).differences[2]
    assert result.mean == pytest.approx(100 * (0.11 + 0.01) / 2)
    assert result.low < result.mean < result.high
    flat = np.array([g for of_env in gains for g in of_env])
    weights = np.array([1 / 4] * 2 + [1 / 10] * 5)
    flips = (np.array(list(product((-1, 1), repeat=7))) * flat * weights).sum(1)
    assert result.p == pytest.approx(min(1, 2 * (flips >= (flat * weights).sum() - 1e-12).mean()))


def test_a_data_set_that_only_one_of_them_ran_on_is_left_out():
    records = paired([[0.01] * 6]) + [record(0, 0.5, dataset="VLCS", algorithm="ERM")]
    assert {result.dataset for result in compare_rows(frame(records), "LoRA", "ERM")} == {"PACS"}


def test_pairs_with_nan_are_left_out_and_said():
    records = paired([[0.01] * 7])
    records[1]["env0_in_acc"] = float("nan")
    result = first(records)
    assert result.differences[0].n == 6 and result.list_warnings() == ["PACS: 1 pairs hold NaN and are left out"]


@pytest.mark.slow
def test_the_interval_holds_what_it_says():
    """Normal gains around 0, ten trials in each of two environments: nearly 95 % of the intervals hold 0."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        d = first(paired(rng.normal(0, 0.02, (2, 10)))).differences[-1]
        inside += d.low <= 0 <= d.high
    assert inside >= 52


def test_only_pairs_that_both_have_count():
    records = [
        r
        for r in paired([[0.01, 0.05], [0.02, 0.02]])
        if (r["args"]["trial_seed"], r["args"]["algorithm"]) != (1, "ERM")
    ]
    assert [d.n for d in first(records).differences] == [1, 1, 2]


def test_text_shows_every_environment():
    text = first(paired([[0.01] * 6, [0.02] * 6])).to_text()
    assert text.startswith("-------- LoRA (a) minus ERM (b), PACS, model selection method: training-domain")
    assert "+1.0" in text and "+1.0 to +1.0" in text and "0.031" in text and "+1.5" in text


def test_rows_that_cannot_be_compared():
    result = frame(paired([[0.01]]))
    with pytest.raises(UsageError, match="unknown row 'Lora'. Did you mean 'LoRA'"):
        compare_rows(result, "Lora", "ERM")
    with pytest.raises(UsageError, match="with itself"):
        compare_rows(result, "ERM", "ERM")
    apart = frame([record(0, 0.5), record(1, 0.5, algorithm="LoRA")])
    with pytest.raises(UsageError, match="nothing to pair"):
        compare_rows(apart, "ERM", "LoRA")
