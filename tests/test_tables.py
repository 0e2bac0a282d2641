import shutil
import subprocess

import pytest

from domainbed_hp import registry, tables
from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.model_selection import IIDAccuracy, LeaveOneOut, Oracle
from domainbed_hp.records import frame
from domainbed_hp.tables import Cell


def run(env, test_acc, trial_seed=0, dataset="PACS", algorithm="ERM", label=None, num_envs=4):
    """One record of a run that tests on `env`."""
    args = {"algorithm": algorithm, "dataset": dataset, "label": label, "test_envs": [env], "hparams_seed": 0}
    outs = {f"env{i}_out_acc": 0.5 for i in range(num_envs)}
    return {"args": {**args, "trial_seed": trial_seed}, "step": 0, **outs, f"env{env}_in_acc": test_acc}


def build(records, **kwargs):
    return tables.build(frame(records), IIDAccuracy, **kwargs)


def test_mean_and_standard_error():
    assert tables.cell([0.1, 0.2, 0.3]).format("+/-") == "20.0 +/- 4.7"
    assert tables.cell([0.1, 0.2, 0.3]).format(r"$\pm$") == r"20.0 $\pm$ 4.7"
    assert tables.cell([0.5]) == Cell(50.0, 0.0, 1)
    assert tables.cell([]).format("+/-") == "X"


def test_average_is_unweighted_and_needs_every_cell():
    assert tables.average([Cell(10.0, 1.0, 3), Cell(20.0, 2.0, 1)]) == Cell(15.0, None, 1)
    assert tables.average([Cell(10.0, 1.0, 3), Cell()]) == Cell()


def test_cells_are_over_trials_and_the_averages_over_the_trials_means():
    # Trial 0: 10 20 30 40, mean 25; trial 1: 30 40 50 60, mean 45.
    records = [run(env, 0.1 + 0.1 * env + 0.2 * trial, trial) for env in range(4) for trial in range(2)]
    dataset, averages = build(records)
    assert [cell.format("+/-") for cell in dataset.cells[0]] == [
        *("20.0 +/- 7.1", "30.0 +/- 7.1", "40.0 +/- 7.1", "50.0 +/- 7.1"),
        "35.0",
    ]
    assert [cell.format("+/-") for cell in averages.cells[0]] == ["35.0 +/- 7.1", "35.0"]
    assert (averages.dataset, averages.columns) == (None, ("PACS", "Avg"))


def test_a_missing_environment_leaves_no_average():
    dataset, averages = build([run(env, 0.5) for env in range(3)])
    assert [cell.format("+/-") for cell in dataset.cells[0]] == ["50.0 +/- 0.0"] * 3 + ["X", "X"]
    assert [cell.format("+/-") for cell in averages.cells[0]] == ["X", "X"]


def test_a_trial_without_one_environment_is_averaged_over_the_others_as_in_domainbed():
    records = [run(env, 0.2) for env in range(4)] + [run(env, 0.6, trial_seed=1) for env in range(3)]
    dataset, averages = build(records)
    assert [cell.n for cell in dataset.cells[0]] == [2, 2, 2, 1, 1]
    assert averages.cells[0][0].format("+/-") == "40.0 +/- 14.1"


def test_datasets_as_registered_then_unknown_ones_with_numbered_environments():
    records = [
        run(0, 0.5, dataset="Mine", num_envs=3),
        run(0, 0.5),
        run(0, 0.5, dataset="VLCS"),
        run(0, 0.5, dataset="Another", num_envs=2),
    ]
    labels = tables.environments(frame(records))
    assert list(labels.items()) == [
        ("VLCS", ("C", "L", "S", "V")),
        ("PACS", PACS.environments),
        ("Mine", ("0", "1", "2")),
        ("Another", ("0", "1")),
    ]


def test_environments_that_the_spec_does_not_name_are_shown():
    assert tables.environments(frame([run(4, 0.5, num_envs=5)]))["PACS"] == (*PACS.environments, "4")


ROWS = [
    ("Unknown B", "Unknown B"),
    ("HeadPurification", "HeadPurification, no gates"),
    ("Unknown A", "Unknown A"),
    ("LoRA", "LoRA"),
    ("HeadPurification", "All heads"),
    ("HeadPurification", "HeadPurification"),
    ("ERM", "ERM"),
]


def test_rows_follow_the_registry_then_the_plan():
    found = frame([run(0, 0.5, algorithm=a, label=None if a == row else row) for a, row in ROWS])
    head = ["HeadPurification", "All heads", "HeadPurification, no gates"]
    assert list(registry.ALGORITHMS).index("ERM") < list(registry.ALGORITHMS).index("LoRA")
    assert tables.row_order(found) == ("ERM", "LoRA", *head, "Unknown B", "Unknown A")
    plan = ["LoRA", "HeadPurification, no gates", "HeadPurification", "not launched", "ERM"]
    planned = (head[2], head[0], head[1])
    assert tables.row_order(found, plan) == ("ERM", "LoRA", *planned, "Unknown B", "Unknown A")


def test_text_is_domainbeds_layout():
    records = [run(env, 0.1 * env, trial, num_envs=2, dataset="Mine") for env in range(2) for trial in range(2)]
    assert tables.to_text(build(records), 4) == (
        "Total records: 4\n"
        "\n"
        "-------- Dataset: Mine, model selection method: training-domain validation set\n"
        "Algorithm             0                     1                     Avg                  \n"
        "ERM                   0.0 +/- 0.0           10.0 +/- 0.0          5.0                  \n"
        "\n"
        "-------- Averages, model selection method: training-domain validation set\n"
        "Algorithm                  Mine                       Avg                       \n"
        "ERM                        5.0 +/- 0.0                5.0                       \n"
    )


def test_long_names_widen_their_own_table_only():
    label = "ERM, of twenty-four char"
    lines = tables.to_text(build([run(0, 0.5, label=label, num_envs=2, dataset="Mine")]), 1).splitlines()
    assert lines[3] == "  ".join(text.ljust(24) for text in ("Algorithm", "0", "1", "Avg")) + " "
    assert lines[4] == "  ".join(text.ljust(24) for text in (label, "50.0 +/- 0.0", "X", "X")) + " "
    assert lines[7] == "  ".join(text.ljust(25) for text in ("Algorithm", "Mine", "Avg")) + " "


def test_gaps_name_row_dataset_environment_and_trials():
    complete = [run(env, 0.5, trial, algorithm="LoRA") for env in range(4) for trial in range(3)]
    some = [run(env, 0.5, trial) for env in range(4) for trial in range(3) if (env, trial) != (2, 1) and env != 3]
    found = frame(complete + some)
    assert tables.gaps(tables.build(found, Oracle), found) == [
        f"ERM, PACS, environment {PACS.environments[2]}: 2 of 3 trials (test-domain validation set (oracle))",
        f"ERM, PACS, environment {PACS.environments[3]}: 0 of 3 trials (test-domain validation set (oracle))",
    ]
    complete = frame(complete)
    assert tables.gaps(tables.build(complete, Oracle), complete) == []
    assert len(tables.gaps(tables.build(complete, Oracle), complete, {"PACS": {0, 5}})) == 4


def test_a_row_without_runs_or_without_pairs_is_told_in_one_line():
    found = frame([run(env, 0.5) for env in range(4)] + [run(0, 0.5, algorithm="LoRA", dataset="VLCS")])
    lines = tables.gaps(tables.build(found, LeaveOneOut), found)
    assert len(lines) == 4
    assert lines[0] == "ERM, VLCS: no runs, hence X"
    assert lines[2].startswith("all rows, PACS: leave-one-domain-out cross-validation needs runs with two test env")


NASTY = r"50% _a_ & #1 {b} $c$ \d ~e^f <g> |h| [i] *j* é µ ð λ → "


def test_latex_escapes_and_never_cuts():
    text = tables.to_latex(build([run(0, 0.5, label="HeadPurification, without its gates and adapters_1")]), 7)
    assert "\n% Total records: 7\n" in text
    assert r"HeadPurification, without its gates and adapters\_1 & 50.0 $\pm$ 0.0 & X" in text
    assert rf"\textbf{{{PACS.environments[3]}}}" in text
    assert tables.escape("%_&#${}") == r"\%\_\&\#\$\{\}"
    # Bare, they would be swallowed by the end of the row above.
    assert tables.escape("[2pt] * λ") == "{[}2pt] {*} U+03BB"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_alone(tmp_path):
    names = [NASTY, "[2pt] first", "* star", "ERM"]
    records = [
        run(env, 0.5, algorithm=name, dataset=data) for env in range(4) for name in names for data in ("VLCS", NASTY)
    ]
    (tmp_path / "results.tex").write_text(tables.to_latex(build(records), len(records)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "results.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "results.log").read_text(errors="replace")
