import pytest
from made_records import collected, launched, record

from domainbed_hp import registry
from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.model_selection import IIDAccuracy, LeaveOneOut, Oracle
from domainbed_hp.reports import report, tables
from domainbed_hp.reports.collected import load
from domainbed_hp.reports.missing import find_missing
from domainbed_hp.reports.tables import Cell, Table


def build(records, **kwargs):
    return tables.build(collected(records), IIDAccuracy, **kwargs)


def shown(cells):
    return [cell.format("+/-") for cell in cells]


def test_mean_and_standard_error():
    assert tables.cell([0.1, 0.2, 0.3]).format("+/-") == "20.0 +/- 4.7"
    assert tables.cell([0.1, 0.2, 0.3]).format(r"$\pm$") == r"20.0 $\pm$ 4.7"
    assert tables.cell([0.5], 2) == Cell(50.0, 0.0, 1, 2)
    assert tables.cell([]).format("+/-") == "X"


def test_average_is_unweighted_and_needs_every_cell():
    assert tables.average([Cell(10.0, 1.0, 3, 1), Cell(20.0, 2.0, 1, 2)]) == Cell(15.0, None, 1, 3)
    assert tables.average([Cell(10.0, 1.0, 3), Cell(missing=4)]) == Cell(missing=4)


def test_cells_are_over_trials_and_the_averages_over_the_trials_means():
    # Trial 0: 10 20 30 40, mean 25; trial 1: 30 40 50 60, mean 45.
    records = [record(env, 0.1 + 0.1 * env + 0.2 * trial, trial) for env in range(4) for trial in range(2)]
    dataset, averages = build(records)
    assert shown(dataset.cells[0]) == ["20.0 +/- 7.1", "30.0 +/- 7.1", "40.0 +/- 7.1", "50.0 +/- 7.1", "35.0"]
    assert shown(averages.cells[0]) == ["35.0 +/- 7.1", "35.0"]
    assert (averages.dataset, averages.columns) == (None, ("PACS", "Avg"))


def test_a_missing_environment_leaves_no_average():
    dataset, averages = build([record(env, 0.5) for env in range(3)])
    assert shown(dataset.cells[0]) == ["50.0 +/- 0.0"] * 3 + ["X", "X"]
    assert shown(averages.cells[0]) == ["X", "X"]


def test_a_trial_without_one_environment_is_averaged_over_the_others_as_in_domainbed():
    records = [record(env, 0.2) for env in range(4)] + [record(env, 0.6, trial_seed=1) for env in range(3)]
    dataset, averages = build(records)
    assert [cell.n for cell in dataset.cells[0]] == [2, 2, 2, 1, 1]
    assert averages.cells[0][0].format("+/-") == "40.0 +/- 14.1"


def test_every_cell_counts_the_jobs_that_it_lacks():
    records = [record(env, 0.2) for env in range(4)] + [record(env, 0.6, trial_seed=1) for env in (0, 1)]
    dataset, averages = build(records, missing=find_missing(collected(records)))
    assert [cell.missing for cell in dataset.cells[0]] == [0, 0, 1, 1, 2]
    assert [cell.missing for cell in averages.cells[0]] == [2, 2]


def test_datasets_as_registered_then_unknown_ones_with_numbered_environments():
    records = [
        record(0, 0.5, dataset="Mine", num_envs=3),
        record(0, 0.5),
        record(0, 0.5, dataset="VLCS"),
        record(0, 0.5, dataset="Another", num_envs=2),
    ]
    assert list(tables.environments(collected(records).frame).items()) == [
        ("VLCS", ("C", "L", "S", "V")),
        ("PACS", PACS.environments),
        ("Another", ("0", "1")),
        ("Mine", ("0", "1", "2")),
    ]


def test_environments_that_the_spec_does_not_name_are_shown():
    labels = tables.environments(collected([record(4, 0.5, num_envs=5)]).frame)
    assert labels["PACS"] == (*PACS.environments, "4")


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
    frame = collected([record(0, 0.5, algorithm=a, label=None if a == row else row) for a, row in ROWS]).frame
    head = ["HeadPurification", "All heads", "HeadPurification, no gates"]
    assert list(registry.ALGORITHMS).index("ERM") < list(registry.ALGORITHMS).index("LoRA")
    assert tables.row_order(frame) == ("ERM", "LoRA", *head, "Unknown A", "Unknown B")
    plan = ["LoRA", "HeadPurification, no gates", "HeadPurification", "not launched", "ERM"]
    assert tables.row_order(frame, plan) == ("ERM", "LoRA", head[2], head[0], head[1], "Unknown A", "Unknown B")


def test_the_plan_of_a_sweep_orders_the_rows(tmp_path):
    labels = ["ERM, b", "ERM", "ERM, a"]
    args = [{"algorithm": "ERM", "dataset": "PACS", "label": label, "test_envs": [0]} for label in labels]
    launched(tmp_path, args)
    assert tables.build(load(tmp_path), IIDAccuracy)[0].rows == tuple(labels)


def test_the_best_and_the_second_of_a_column_by_what_is_printed():
    cells = [(97.04, 1.0), (97.0, 3.0), (96.0, None), (95.0, 2.0), (None, None)]
    rows = tuple(tuple(Cell(mean) for mean in line) for line in cells)
    table = Table("PACS", IIDAccuracy, tuple("abcde"), ("A", "Avg"), rows)
    assert table.ranks() == [[1, 0], [1, 1], [2, 0], [0, 2], [0, 0]]


def test_a_row_alone_is_not_the_best():
    (table, _) = build([record(env, 0.5) for env in range(4)])
    assert table.ranks() == [[0] * 5]


def test_costs_are_of_all_records_but_the_first_step():
    def costly(step, step_time, memory, **args):
        numbers = {"step": step, "step_time": step_time, "mem_gb": memory, "trainable_params": 1234}
        return record(0, 0.5, **args) | numbers

    records = [costly(0, 9.0, 0.5), costly(1, 0.2, 2.5), costly(2, 0.4, 1.5), record(0, 0.5, algorithm="LoRA")]
    table = build(records, cost_names=["params", "step_time", "memory"])[0]
    assert table.header[-3:] == ["parameters (trained)", "step (ms)", "memory (GB)"]
    assert [cost.values for cost in table.costs] == [(1234.0, None), (pytest.approx(300.0), None), (2.5, None)]
    assert table.grid(lambda i, j, cell: "")[0][-3:] == ["1,234", "300", "2.5"]


def test_why_a_cell_is_x_where_no_job_is_missing():
    records = [record(env, 0.5) for env in range(4)] + [record(0, 0.5, algorithm="LoRA", dataset="VLCS")]
    made = report.make(collected(records))
    needs = f"{LeaveOneOut.name} needs runs with two test environments, and there are none"
    absent = [note for note in made.notes if "no runs" in note]
    assert sorted(absent) == ["ERM, VLCS: no runs, hence X", "LoRA, PACS: no runs, hence X"]
    assert any(note.startswith(f"all rows, PACS: {needs}") for note in made.notes)
    assert not any(Oracle.name in note for note in made.notes)


@pytest.mark.parametrize("order", [1, -1])
def test_a_report_lists_what_a_table_lacks(order):
    records = [record(env, 0.5, trial) for env in range(4) for trial in range(2) if (env, trial) != (3, 1)][::order]
    made = report.make(collected(records))
    line = "ERM, PACS, test_envs 3, trial 1, hparams_seed 0"
    assert [made.lacking(table) for table in made.tables] == [[line]] * 6
