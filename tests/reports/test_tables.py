import shutil

import pytest
from made_records import collected, launched, minimal, record

from domainbed_hp import registry
from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.model_selection import IIDAccuracy, LeaveOneOut, Oracle
from domainbed_hp.reports import report, tables
from domainbed_hp.reports.load import load_runs
from domainbed_hp.reports.missing import find_missing
from domainbed_hp.reports.tables import Cell, Table


def build(records, **kwargs):
    return tables.build_tables(collected(records), IIDAccuracy, **kwargs)


def shown(cells):
    return [cell.format("+/-") for cell in cells]


def test_mean_and_standard_error():
    assert tables.make_cell([0.1, 0.2, 0.3]).format("+/-") == "20.0 +/- 4.7"
    assert tables.make_cell([0.1, 0.2, 0.3]).format(r"$\pm$") == r"20.0 $\pm$ 4.7"
    assert tables.make_cell([0.5], 2) == Cell(50.0, 0.0, 1, 2)
    assert tables.make_cell([]).format("+/-") == "X"


def test_average_is_unweighted_and_needs_every_cell():
    assert tables.average_cells([Cell(10.0, 1.0, 3, 1), Cell(20.0, 2.0, 1, 2)]) == Cell(15.0, None, 1, 3)
    assert tables.average_cells([Cell(10.0, 1.0, 3), Cell(missing=4)]) == Cell(missing=4)


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
    assert list(tables.list_environments(collected(records).frame).items()) == [
        ("VLCS", ("C", "L", "S", "V")),
        ("PACS", PACS.environments),
        ("Another", ("0", "1")),
        ("Mine", ("0", "1", "2")),
    ]


def test_environments_that_the_spec_does_not_name_are_shown():
    labels = tables.list_environments(collected([record(4, 0.5, num_envs=5)]).frame)
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
    assert tables.order_rows(frame) == ("ERM", "LoRA", *head, "Unknown A", "Unknown B")
    plan = ["LoRA", "HeadPurification, no gates", "HeadPurification", "not launched", "ERM"]
    assert tables.order_rows(frame, plan) == ("ERM", "LoRA", head[2], head[0], head[1], "Unknown A", "Unknown B")


def test_the_plan_of_a_sweep_orders_the_rows(tmp_path):
    labels = ["ERM, b", "ERM", "ERM, a"]
    args = [{"algorithm": "ERM", "dataset": "PACS", "label": label, "test_envs": [0]} for label in labels]
    launched(tmp_path, args)
    assert tables.build_tables(load_runs(tmp_path), IIDAccuracy)[0].rows == tuple(labels)


def test_the_best_and_the_second_of_a_column_by_what_is_printed():
    cells = [(97.04, 1.0), (97.0, 3.0), (96.0, None), (95.0, 2.0), (None, None)]
    rows = tuple(tuple(Cell(mean) for mean in line) for line in cells)
    table = Table("PACS", IIDAccuracy, tuple("abcde"), ("A", "Avg"), rows)
    assert table.rank_cells() == [[1, 0], [1, 1], [2, 0], [0, 2], [0, 0]]


def test_a_row_alone_is_not_the_best():
    (table, _) = build([record(env, 0.5) for env in range(4)])
    assert table.rank_cells() == [[0] * 5]


def test_costs_are_of_all_records_but_the_first_step():
    def costly(step, step_time, memory, **args):
        numbers = {"step": step, "step_time": step_time, "mem_gb": memory, "trainable_params": 1234}
        return record(0, 0.5, **args) | numbers

    records = [costly(0, 9.0, 0.5), costly(1, 0.2, 2.5), costly(2, 0.4, 1.5), record(0, 0.5, algorithm="LoRA")]
    table = build(records, statistics=["params", "step_time", "memory"])[0]
    assert table.header[-3:] == ["parameters (trained)", "step (ms)", "memory (GB)"]
    assert [cost.values for cost in table.statistics] == [(1234.0, None), (pytest.approx(300.0), None), (2.5, None)]
    assert table.format_lines(lambda i, j, cell: "")[0][-3:] == ["1,234", "300", "2.5"]


def test_costs_are_of_the_data_set_and_memory_that_nobody_measured_is_not_told():
    def costly(dataset, step_time):
        return record(0, 0.5, dataset=dataset) | {"step": 1, "step_time": step_time, "mem_gb": 0.0}

    built = build([costly("VLCS", 0.1), costly("PACS", 0.3)], statistics=["step_time", "memory"])
    assert [table.statistics[0].values for table in built] == [(pytest.approx(t),) for t in (100, 300, 200)]
    assert built[0].statistics[1].values == (None,)


def test_why_a_cell_is_x_where_no_job_is_missing():
    records = [record(env, 0.5) for env in range(4)] + [record(0, 0.5, algorithm="LoRA", dataset="VLCS")]
    made = report.make_report(collected(records))
    needs = f"{LeaveOneOut.name} needs runs with two test environments, and there are none"
    assert sorted(made.absent_rows) == ["ERM, VLCS: no runs, so cells show X", "LoRA, PACS: no runs, so cells show X"]
    assert any(note.startswith(f"all rows, PACS: {needs}") for note in made.notes)
    assert not any(Oracle.name in note for note in made.notes)


def test_pairs_at_other_steps_leave_leave_one_out_an_x_that_is_explained():
    singles = [minimal(test_envs=[i]) for i in range(3)]
    pairs = [minimal(test_envs=list(envs)) | {"step": 1} for envs in ((0, 1), (0, 2), (1, 2))]
    later = [one | {"step": 1, "env0_in_acc": 0.5} for one in singles[:1]]
    result = report.make_report(collected(singles + later + pairs))
    assert any("finds no step that a run and its pairs recorded once" in note for note in result.notes)


def test_the_average_of_averages_lacks_what_is_planned_elsewhere(tmp_path):
    args = [{"algorithm": "ERM", "dataset": d, "test_envs": [env]} for d in ("PACS", "VLCS") for env in range(4)]
    for job in launched(tmp_path, args)[4:]:
        shutil.rmtree(job.folder)
    made = report.make_report(load_runs(tmp_path))
    dataset, averages = made.tables[:2]
    assert [cell.missing for cell in dataset.cells[0]] == [0] * 5
    assert [cell.missing for cell in averages.cells[0]] == [0, 4]
    assert (len(made.list_missing(dataset)), len(made.list_missing(averages))) == (0, 4)


def test_a_table_lists_what_it_lacks_itself():
    records = [record(env, 0.5, t, dataset=d) for d in ("PACS", "VLCS") for env in range(4) for t in range(2)]
    made = report.make_report(collected(records[:-1]))
    assert [len(made.list_missing(table)) for table in made.tables[:3]] == [1, 0, 1]  # VLCS, PACS, averages
    pairs = [minimal(test_envs=list(envs)) for envs in ((0, 1), (0, 2))] + [minimal(test_envs=[i]) for i in range(3)]
    made = report.make_report(collected(pairs))
    assert [len(made.list_missing(table)) for table in made.tables] == [0, 0, 1, 1, 0, 0]


def test_jobs_without_a_record_are_not_said_to_count(tmp_path):
    args = {"algorithm": "ERM", "dataset": "PACS"}
    jobs = launched(tmp_path, [{**args, "test_envs": [env]} for env in range(4)], done=False)
    (jobs[0].folder / "results.jsonl").unlink()
    made = report.make_report(load_runs(tmp_path))
    assert "3 jobs are not done; their records so far are counted" in made.notes


@pytest.mark.parametrize("order", [1, -1])
def test_a_report_lists_what_a_table_lacks(order):
    records = [record(env, 0.5, trial) for env in range(4) for trial in range(2) if (env, trial) != (3, 1)][::order]
    made = report.make_report(collected(records))
    line = "ERM, PACS, test_envs 3, trial 1, hparams_seed 0"
    assert [made.list_missing(table) for table in made.tables] == [[line]] * 6
