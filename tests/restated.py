"""DomainBed's rules once more, from their description and over lists of records, to hold ours against."""

import math
from itertools import combinations


def record(test_envs, step, accs, hparams_seed=0, trial_seed=0, dataset="PACS", algorithm="ERM", label=None):
    """`accs`: (in, out) of each environment."""
    args = {"algorithm": algorithm, "dataset": dataset, "label": label, "test_envs": test_envs}
    result = {"args": {**args, "trial_seed": trial_seed, "hparams_seed": hparams_seed}, "step": step}
    for i, (inside, out) in enumerate(accs):
        result |= {f"env{i}_in_acc": inside, f"env{i}_out_acc": out}
    return result


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
        candidates = [best for run in by_seed.values() if (best := run_acc(run, key[3])) is not None]
        if candidates:
            result[key] = max(candidates, key=lambda best: best[:2])[1:]
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


def restated_cells(name, records, num_envs):
    """(dataset, or None for the averages, row) -> cells, each (mean, err), a bare mean for the average, or None.

    Numbers of environments by data set; a row of the averages needs every environment of a data set, as ours does.
    """
    chosen = restated(name, records)
    rows = list(dict.fromkeys(r["args"]["label"] or r["args"]["algorithm"] for r in records))

    def mean_err(values):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        return 100 * mean, 100 * deviation / math.sqrt(len(values))

    cells = {}
    for row in rows:
        averages = []
        for dataset, count in num_envs.items():
            by_env = [
                [acc for (r, d, _, t), (_, _, acc) in sorted(chosen.items()) if (r, d, t) == (row, dataset, env)]
                for env in range(count)
            ]
            line = [mean_err(accs) if accs else None for accs in by_env]
            average = None if None in line else sum(mean for mean, _ in line) / count
            cells[dataset, row] = [*line, average]
            trials = {}
            for (r, d, trial, _), (_, _, acc) in sorted(chosen.items()):
                if (r, d) == (row, dataset):
                    trials.setdefault(trial, []).append(acc)
            averages.append(None if average is None else mean_err([sum(a) / len(a) for a in trials.values()]))
        total = None if None in averages else sum(mean for mean, _ in averages) / len(averages)
        cells[None, row] = [*averages, total]
    return cells
