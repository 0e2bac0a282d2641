import math
from itertools import combinations

import numpy as np
import pytest

from domainbed_hp.model_selection import METHODS, IIDAccuracy, LeaveOneOut, Oracle
from domainbed_hp.records import frame


def record(test_envs, step, accs, hparams_seed=0, trial_seed=0, dataset="PACS", algorithm="ERM", label=None):
    """`accs`: (in, out) of each environment."""
    args = {"algorithm": algorithm, "dataset": dataset, "label": label, "test_envs": test_envs}
    result = {"args": {**args, "trial_seed": trial_seed, "hparams_seed": hparams_seed}, "step": step}
    for i, (inside, out) in enumerate(accs):
        result |= {f"env{i}_in_acc": inside, f"env{i}_out_acc": out}
    return result


def selected(method, records):
    """group -> (hparams_seed, step, val_acc, test_acc)"""
    return {tuple(row[:4]): tuple(row[4:]) for row in method.select(frame(records)).itertuples(index=False, name=None)}


ONE = ("ERM", "PACS", 0, 0)


def test_names_are_domainbeds():
    assert [method.name for method in METHODS] == [
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


# The rules once more, from DomainBed's description and over lists of records, to hold the DataFrame against.
def restated(name, records):
    def envs(r):
        return sum(key.endswith("_out_acc") for key in r)

    def run_acc(run, t):
        single = [r for r in run if r["args"]["test_envs"] == [t]]
        scored = []
        for r in single:
            if name == "iid":
                outs = [r[f"env{i}_out_acc"] for i in range(envs(r)) if i != t]
                scored.append((sum(outs) / len(outs), r))
            elif name == "oracle":
                if r["step"] == max(s["step"] for s in single):
                    scored.append((r[f"env{t}_out_acc"], r))
            else:
                partners = {}
                for pair in run:
                    if len(pair["args"]["test_envs"]) == 2 and pair["step"] == r["step"]:
                        (v,) = set(pair["args"]["test_envs"]) - {t}
                        partners[v] = pair[f"env{v}_in_acc"]
                if set(partners) == set(range(envs(r))) - {t}:
                    scored.append((sum(partners.values()) / len(partners), r))
        best = None
        for value, r in sorted(scored, key=lambda pair: pair[1]["step"]):
            value = -math.inf if math.isnan(value) else value
            if best is None or value > best[0]:
                best = value, r["args"]["hparams_seed"], r["step"], r[f"env{t}_in_acc"]
        return best

    runs = {}
    for r in records:
        args = r["args"]
        for t in args["test_envs"]:
            key = (args["label"] or args["algorithm"], args["dataset"], args["trial_seed"], t)
            runs.setdefault(key, {}).setdefault(args["hparams_seed"], []).append(r)
    result = {}
    for key, by_seed in runs.items():
        found = [best for run in by_seed.values() if (best := run_acc(run, key[3])) is not None]
        if found:
            result[key] = max(found, key=lambda best: best[:2])[1:]
    return result


def random_sweep(rng):
    """Accuracies in quarters, so that ties abound; some runs and records missing, some accuracies NaN."""
    records = []
    for algorithm, label in [("ERM", None), ("LoRA", None), ("LoRA", "LoRA, rank 8")]:
        for dataset, num_envs in [("PACS", 4), ("Debug28", 3)]:
            test_envs = [[i] for i in range(num_envs)] + [list(p)[::-1] for p in combinations(range(num_envs), 2)]
            for trial_seed in range(2):
                for hparams_seed in range(3):
                    for envs in test_envs:
                        if rng.random() < 0.05:
                            continue
                        for step in (0, 10, 20):
                            accs = rng.integers(0, 5, (num_envs, 2)) / 4
                            accs[rng.random(accs.shape) < 0.01] = math.nan
                            run = {"hparams_seed": hparams_seed, "trial_seed": trial_seed, "dataset": dataset}
                            if rng.random() > 0.03:
                                records.append(
                                    record(envs, step, accs.tolist(), algorithm=algorithm, label=label, **run)
                                )
    return records


NAMES = ["iid", "leave_one_out", "oracle"]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("method", "name"), [*zip(METHODS, NAMES, strict=True)])
def test_agrees_with_the_rules_restated(method, name, seed):
    records = random_sweep(np.random.default_rng(seed))
    ours = {key: (h, step, test_acc) for key, (h, step, _, test_acc) in selected(method, records).items()}
    expected = restated(name, records)
    assert len(expected) > 20
    assert str(sorted(ours.items())) == str(sorted(expected.items()))
