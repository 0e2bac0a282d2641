import math
from functools import cache

import numpy as np
import pytest
from made_records import collected, frame
from restated import random_sweep, record, restated

from domainbed_hp.model_selection import GROUP, IIDAccuracy, LeaveOneOut, Oracle, load_selection_methods
from domainbed_hp.reports import report, text_formats


def selected(method, records):
    """group -> (hparams_seed, step, val_acc, test_acc)"""
    chosen = method.select(frame(records))[[*GROUP, "hparams_seed", "step", "val_acc", "test_acc"]]
    return {tuple(row[:4]): tuple(row[4:]) for row in chosen.itertuples(index=False, name=None)}


ONE = ("ERM", "PACS", 0, 0)


def test_names_are_domainbeds():
    assert [method.name for method in load_selection_methods()] == [
        "training-domain validation set",
        "leave-one-domain-out cross-validation",
        "test-domain validation set (oracle)",
    ]


def test_iid_takes_the_step_with_the_best_mean_of_the_training_environments():
    records = [
        record([0], 0, [(0.1, 0.9), (0.0, 0.7), (0.0, 0.7)]),
        record([0], 1, [(0.3, 0.4), (0.0, 0.5), (0.0, 1.0)]),
        record([0], 2, [(0.8, 0.9), (0.0, 0.7), (0.0, 0.7)]),
    ]
    assert selected(IIDAccuracy, records) == {ONE: (0, 1, 0.75, 0.3)}


def test_iid_and_oracle_ignore_runs_with_two_test_environments():
    records = [record([0, 1], 0, [(0.1, 0.9)] * 3)]
    assert selected(IIDAccuracy, records) == selected(Oracle, records) == {}


def test_oracle_looks_at_the_last_step_alone():
    records = [
        record([0], 2, [(0.3, 0.4), (0.0, 0.0)], hparams_seed=1),
        record([0], 0, [(0.9, 1.0), (0.0, 1.0)], hparams_seed=1),
        record([0], 2, [(0.2, 0.3), (0.0, 0.0)], hparams_seed=2),
    ]
    assert selected(Oracle, records) == {ONE: (1, 2, 0.4, 0.3)}


def test_leave_one_out_averages_the_left_out_partners():
    records = [
        record([0], 0, [(0.1, 0.0)] * 3),
        record([0, 1], 0, [(0.0, 0.0), (0.5, 0.0), (0.0, 0.0)]),
        record([2, 0], 0, [(0.0, 0.0), (0.0, 0.0), (0.6, 0.0)]),
        record([0], 1, [(0.9, 0.0)] * 3),
        record([0, 1], 1, [(0.0, 0.0), (0.9, 0.0), (0.0, 0.0)]),
    ]
    ((group, (hparams_seed, step, val_acc, test_acc)),) = selected(LeaveOneOut, records).items()
    assert (group, hparams_seed, step, test_acc) == (ONE, 0, 0, 0.1)
    assert val_acc == pytest.approx(0.55)
    assert selected(LeaveOneOut, [r for r in records if r["args"]["test_envs"] != [2, 0]]) == {}
    assert selected(LeaveOneOut, records[1:3]) == {}


def test_leave_one_out_needs_exactly_one_single_run():
    pairs = [record([0, v], 0, [(0.5, 0.5)] * 3) for v in (1, 2)]
    assert len(selected(LeaveOneOut, [record([0], 0, [(0.1, 0.1)] * 3), *pairs])) == 1
    assert selected(LeaveOneOut, [record([0], 0, [(0.1, 0.1)] * 3)] * 2 + pairs) == {}


def test_ties_go_to_the_higher_hparams_seed_and_the_earlier_step():
    records = [
        record([0], step, [(test_acc, 0.0), (0.0, 0.5)], hparams_seed=seed)
        for seed, step, test_acc in [(3, 20, 0.1), (3, 10, 0.2), (7, 20, 0.3), (7, 10, 0.4), (5, 10, 0.5)]
    ]
    assert selected(IIDAccuracy, records) == {ONE: (7, 10, 0.5, 0.4)}


def test_nan_loses():
    records = [
        record([0], 0, [(0.1, 0.0), (0.0, math.nan)], hparams_seed=9),
        record([0], 10, [(0.2, 0.0), (0.0, 0.1)], hparams_seed=9),
        record([0], 0, [(0.3, 0.0), (0.0, math.nan)], hparams_seed=10),
    ]
    assert selected(IIDAccuracy, records) == {ONE: (9, 10, 0.1, 0.2)}


NAMES = ["iid", "leave_one_out", "oracle"]
swept = cache(lambda seed: random_sweep(np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("method", "name"), [*zip(load_selection_methods(), NAMES, strict=True)])
def test_agrees_with_the_rules_restated(method, name, seed):
    records = swept(seed)
    ours = {key: (h, step, test_acc) for key, (h, step, _, test_acc) in selected(method, records).items()}
    expected = restated(name, records)
    assert len(expected) > 20
    assert str(sorted(ours.items())) == str(sorted(expected.items()))


@pytest.mark.parametrize("seed", range(3))
def test_no_rule_reads_the_images_that_are_trained_on(seed):
    """`--eval fast` leaves them out; through the reading of records, tables and all."""
    records = random_sweep(np.random.default_rng(seed))
    fast = [
        {k: v for k, v in r.items() if not k.endswith("_in_acc") or int(k[3]) in r["args"]["test_envs"]}
        for r in records
    ]
    assert sum(map(len, fast)) < sum(map(len, records))
    made, again = (report.make_report(collected(part)) for part in (records, fast))
    assert len(made.tables) >= 3 and text_formats.to_text(again) == text_formats.to_text(made)
