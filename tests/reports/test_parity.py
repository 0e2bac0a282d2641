"""Tables against DomainBed's rules restated in plain Python, and properties that must hold of any sweep."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import collected, write
from restated import random_sweep, record, restated_cells

from domainbed_hp.model_selection import load_selection_methods
from domainbed_hp.reports import report, text_formats
from domainbed_hp.reports.load import load_runs

NUM_ENVS = {"PACS": 4, "Debug28": 3}
NAMES = dict(zip((method.name for method in load_selection_methods()), ("iid", "leave_one_out", "oracle"), strict=True))


def ours(records):
    """selection -> the cells as `restated_cells` has them."""
    numbers = {}
    for table in report.make_report(collected(records)).tables:
        for row, cells in zip(table.rows, table.cells, strict=True):
            values = [None if c.mean is None else c.mean if c.err is None else (c.mean, c.err) for c in cells]
            numbers.setdefault(table.method.name, {})[table.dataset, row] = values
    return numbers


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_those_of_the_rules_restated(seed):
    records = random_sweep(np.random.default_rng(100 + seed))
    numbers = ours(records)
    order = {"Debug28": 3, "PACS": 4}  # as registered
    for selection, name in NAMES.items():
        expected = restated_cells(name, records, order)
        assert numbers[selection].keys() == expected.keys()
        for key, cells in expected.items():
            for got, wanted in zip(numbers[selection][key], cells, strict=True):
                same = got is wanted if wanted is None else np.allclose(got, wanted, atol=1e-9, equal_nan=True)
                assert same, (selection, key, got, wanted)


def test_cells_of_domainbeds_sweep_are_those_of_the_rules_restated_and_of_domainbed(shared_data: Path):
    folder = shared_data / "domainbed_sweep"
    files = sorted(folder.glob("runs/*/results.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for r in records:
        r["args"]["label"] = None
    made = report.make_report(load_runs(folder / "runs"))
    assert text_formats.to_text(made) == (folder / "expected.txt").read_text()
    for table in made.tables:
        expected = restated_cells(NAMES[table.method.name], records, {"VLCS": 4})[table.dataset, "ERM"]
        for cell, wanted in zip(table.cells[0], expected, strict=True):
            assert np.allclose(cell.mean if cell.err is None else (cell.mean, cell.err), wanted, atol=1e-9)


@st.composite
def sweeps(draw):
    """Runs (lists of records) of a small sweep with ties, some of them missing."""
    algorithms = draw(st.lists(st.sampled_from(["ERM", "LoRA", "Mine", "Other"]), min_size=1, max_size=3, unique=True))
    datasets = draw(st.lists(st.sampled_from(["Debug28", "Unknown"]), min_size=1, max_size=2, unique=True))
    quarters = st.integers(0, 4).map(lambda n: n / 4)
    runs = []
    for algorithm in algorithms:
        for dataset in datasets:
            for trial, hparams_seed in ((0, 0), (0, 1), (1, 0)):
                for envs in draw(st.lists(st.sampled_from([[0], [1], [2], [0, 1], [1, 2]]), unique_by=tuple)):
                    accs = draw(st.lists(st.lists(st.tuples(quarters, quarters), min_size=3, max_size=3), max_size=2))
                    place = {"algorithm": algorithm, "dataset": dataset, "trial_seed": trial}
                    runs.append([record(envs, i, a, hparams_seed=hparams_seed, **place) for i, a in enumerate(accs)])
    return [run for run in runs if run]


def text_of(folder, runs, names):
    shutil.rmtree(folder, ignore_errors=True)
    for name, run in zip(names, runs, strict=True):
        write(folder / name, *run)
    return text_formats.to_text(report.make_report(load_runs(folder)))


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sweeps().filter(len), st.randoms(use_true_random=False))
def test_the_order_of_records_and_folders_never_changes_a_table(tmp_path, runs, chance):
    names = [f"run{i}" for i in range(len(runs))]
    before = text_of(tmp_path / "a", runs, names)
    deep = [f"{chance.choice('xyz')}/{name}" for name in names]
    chance.shuffle(deep)
    for run in runs:
        chance.shuffle(run)
    assert text_of(tmp_path / "a", runs, deep) == before


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(sweeps().filter(len), st.sampled_from(["Mine", "Aaa", "ZeroShotCLIP"]))
def test_an_unrelated_algorithm_never_changes_anothers_row(runs, name):
    records = [r for run in runs for r in run]
    others = [r for r in records if r["args"]["algorithm"] != name]
    if not others:
        return
    added = [
        {**r, "args": {**r["args"], "algorithm": name}, **{key: 1.0 for key in r if key.endswith("acc")}}
        for r in others
    ]
    before, after = ours(others), ours(others + added)
    for selection, cells in before.items():
        for key, line in cells.items():
            assert after[selection][key] == line
