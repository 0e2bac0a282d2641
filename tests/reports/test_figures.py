import numpy as np
import pytest
from made_records import Record, collected, record

from domainbed_hp.model_selection import IIDAccuracy, Oracle
from domainbed_hp.reports import figures, tables
from domainbed_hp.reports.load import load_runs
from domainbed_hp.scripts import plot, run


def sweep() -> list[Record]:
    """Two rows, two trials, four steps; LoRA gets better with every step, ERM worse."""
    records = []
    for name, slope in (("LoRA", 0.1), ("ERM", -0.1)):
        for env in range(4):
            for trial in range(2):
                for step in range(4):
                    numbers = {"step": step, "loss": 1 - 0.1 * step}
                    numbers |= {f"env{i}_out_acc": 0.5 + slope * step for i in range(4)}
                    records.append(record(env, 0.6 + slope * step, trial, algorithm=name) | numbers)
    return records


def test_accuracies_are_those_of_the_table():
    table = tables.build_tables(collected(sweep()), IIDAccuracy)[0]
    (axis,) = figures.draw_accuracies(table).axes
    points = [container.lines[0].get_ydata() for container in axis.containers]
    assert np.allclose(points, [[cell.mean for cell in cells] for cells in table.cells])
    assert [text.get_text() for text in axis.get_xticklabels()] == [*"ACPS", "Avg"]


def test_error_bars_are_standard_errors():
    records = [record(env, 0.5 + 0.1 * trial, trial) for env in range(4) for trial in range(2)]
    (axis,) = figures.draw_accuracies(tables.build_tables(collected(records), IIDAccuracy)[0]).axes
    segments = axis.containers[0].lines[2][0].get_segments()
    assert np.allclose([np.ptp(segment[:, 1]) / 2 for segment in segments[:4]], 100 * 0.05 / 2**0.5)


def test_bands_are_one_standard_deviation():
    records = [record(0, acc, trial) | {"loss": acc} for trial, acc in enumerate((0.4, 0.6))]
    axis = figures.draw_curves(collected(records).frame, "PACS", ["ERM"]).axes[2]
    low, high = axis.collections[0].get_datalim(axis.transData).get_points()[:, 1]
    assert np.allclose([low, high], 50 + np.array([-1, 1]) * np.std([40, 60], ddof=1))


def test_names_are_no_formulas():
    records = [record(env, 0.5, label="ERM, cost $a$ $b_$") for env in range(4)]
    runs = collected(records)
    for figure in figures.draw_figures(runs, tables.build_tables(runs, IIDAccuracy)).values():
        figure.draw_without_rendering()


def test_every_method_has_its_training_loss():
    records = []
    for name, loss in (("ERM", "loss"), ("LoRA", "ce"), ("FLYP", "contrastive")):
        records += [record(0, 0.5, algorithm=name) | {"step": step, loss: 3.0 - step} for step in range(3)]
    axis = figures.draw_curves(collected(records).frame, "PACS", ["ERM", "LoRA", "FLYP"]).axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[3, 2, 1]] * 3


def test_the_legend_of_many_rows_covers_no_axes():
    names = [f"LoRA, variant {i} of a long name" for i in range(28)]
    runs = collected([record(env, 0.5, algorithm="LoRA", label=name) for name in names for env in range(4)])
    drawn = figures.draw_figures(runs, tables.build_tables(runs, IIDAccuracy))
    assert set(drawn) == {"PACS-accuracy", "PACS-curves", "PACS-selection"}
    for figure in drawn.values():
        figure.draw_without_rendering()
        (box,) = (legend.get_window_extent() for legend in figure.legends)
        assert box.y0 >= 0
        assert all(axis.get_tightbbox().y0 >= box.y1 and axis.get_window_extent().height > 100 for axis in figure.axes)


def test_curves_are_means_by_step():
    runs = collected(sweep())
    axes = figures.draw_curves(runs.frame, "PACS", ["ERM", "LoRA"]).axes
    assert [axis.get_title() for axis in axes] == ["training loss", "validation accuracy (%)", "target accuracy (%)"]
    assert np.allclose([line.get_ydata() for line in axes[1].lines], [[50, 40, 30, 20], [50, 60, 70, 80]])
    assert np.allclose([line.get_ydata() for line in axes[2].lines], [[60, 50, 40, 30], [60, 70, 80, 90]])


def test_selection_tells_the_rank_correlation():
    records = sweep()
    for one in records:  # which environment it is must not tell the accuracy
        (env,) = one["args"]["test_envs"]
        for i in range(4):
            one[f"env{i}_out_acc"] -= 0.2 * env
        one[f"env{env}_in_acc"] += 0.2 * env
    (axis,) = figures.draw_selection(collected(records).frame, "PACS", ["ERM", "LoRA"]).axes
    assert axis.get_legend_handles_labels()[1] == ["ERM (rank correlation +1.00)", "LoRA (rank correlation +1.00)"]
    assert len(axis.collections[0].get_offsets()) == 32


def test_rows_differ_in_more_than_colour():
    look = figures.make_styles([str(i) for i in range(40)])
    assert len({(s["color"], s["marker"], s["linestyle"]) for s in look.values()}) == 40
    assert len({s["marker"] for s in look.values()}) == len(figures.MARKERS)


def gated(tmp_path, *steps):
    """A run of PACS with gates; `steps` are (validation accuracy, gates or None)."""
    from made_records import write

    hparams = {"gates": "hard", "gate_keep": 0.5}
    records = []
    for step, (acc, gates) in enumerate(steps):
        accs = {f"env{i}_out_acc": acc for i in range(4)}
        one = record(0, 0.5, algorithm="HeadPurification") | accs | {"step": step, "hparams": hparams}
        records.append(one if gates is None else one | {"gates": gates})
    write(tmp_path / "run", *records)
    return load_runs(tmp_path)


FIRST, SECOND, THIRD = ([[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("method", "gates", "step"),
    [
        (IIDAccuracy, [FIRST, SECOND, THIRD], 1),
        (Oracle, [FIRST, SECOND, THIRD], 2),
        (IIDAccuracy, [FIRST, None, THIRD], 2),
    ],
)
def test_gates_are_those_of_the_chosen_record_or_else_the_last(tmp_path, method, gates, step):
    """Hard gates, a share of 0.5 of the heads: what is drawn is what the record says, 0 or 1."""
    runs = gated(tmp_path, *zip((0.1, 0.9, 0.5), gates, strict=True))
    drawn = figures.draw_figures(runs, tables.build_tables(runs, method), notes=(notes := []))
    axis = drawn["PACS-gates-HeadPurification-env0"].axes[0]
    assert axis.images[0].get_array().tolist() == gates[step] and notes == []
    assert axis.get_title() == f"HeadPurification on PACS, test environment 0, trial 0, step {step}"


def test_a_run_with_gates_whose_records_have_none_is_said(tmp_path):
    runs = gated(tmp_path, (0.5, None))
    drawn = figures.draw_figures(runs, tables.build_tables(runs, IIDAccuracy), notes=(notes := []))
    assert not any("gates" in name for name in drawn)
    assert [note.endswith(f"(made by an earlier version): {tmp_path / 'run'}") for note in notes] == [True]


def test_plot_writes_png_and_pdf(tmp_path, capsys):
    from made_records import write

    for i, one in enumerate(sweep()):
        more = {"hparams": {"gates": "softmax"}, "gates": [[1.0, 1.0]]} if one["args"]["algorithm"] == "LoRA" else {}
        write(tmp_path / str(i), one | more)
    assert run(plot.main, ["--input_dir", str(tmp_path)]) == 0
    gates = [f"PACS-gates-LoRA-env{env}" for env in range(4)]
    names = ["PACS-accuracy", "PACS-curves", *gates, "PACS-selection"]
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7 and err == ""


def test_plot_of_nothing(tmp_path, capsys):
    assert run(plot.main, ["--input_dir", str(tmp_path)]) == 2
    assert "nothing to collect" in capsys.readouterr().err
    from made_records import write

    write(tmp_path / "run", record(0, 0.5))
    assert run(plot.main, ["--input_dir", str(tmp_path), "--selection", "leave_one_out"]) == 2
    assert "nothing to draw" in capsys.readouterr().err
