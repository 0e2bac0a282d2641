import numpy as np
import pytest
import torch
from made_records import Record, collected, record
from safetensors.numpy import save_file

from domainbed_hp.model_selection import IIDAccuracy
from domainbed_hp.networks.heads import HeadGate
from domainbed_hp.reports import figures, tables
from domainbed_hp.reports.load import Run
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
    table = tables.build(collected(sweep()), IIDAccuracy)[0]
    (axis,) = figures.accuracies(table).axes
    points = [container.lines[0].get_ydata() for container in axis.containers]
    assert np.allclose(points, [[cell.mean for cell in cells] for cells in table.cells])
    assert [text.get_text() for text in axis.get_xticklabels()] == [*"ACPS", "Avg"]


def test_error_bars_are_standard_errors():
    records = [record(env, 0.5 + 0.1 * trial, trial) for env in range(4) for trial in range(2)]
    (axis,) = figures.accuracies(tables.build(collected(records), IIDAccuracy)[0]).axes
    segments = axis.containers[0].lines[2][0].get_segments()
    assert np.allclose([np.ptp(segment[:, 1]) / 2 for segment in segments[:4]], 100 * 0.05 / 2**0.5)


def test_bands_are_one_standard_deviation():
    records = [record(0, acc, trial) | {"loss": acc} for trial, acc in enumerate((0.4, 0.6))]
    axis = figures.curves(collected(records).frame, "PACS", ["ERM"]).axes[2]
    low, high = axis.collections[0].get_datalim(axis.transData).get_points()[:, 1]
    assert np.allclose([low, high], 50 + np.array([-1, 1]) * np.std([40, 60], ddof=1))


def test_names_are_no_formulas():
    records = [record(env, 0.5, label="ERM, cost $a$ $b_$") for env in range(4)]
    found = collected(records)
    for figure in figures.all_figures(found, tables.build(found, IIDAccuracy)).values():
        figure.draw_without_rendering()


def test_every_method_has_its_training_loss():
    records = []
    for name, loss in (("ERM", "loss"), ("LoRA", "ce"), ("FLYP", "contrastive")):
        records += [record(0, 0.5, algorithm=name) | {"step": step, loss: 3.0 - step} for step in range(3)]
    axis = figures.curves(collected(records).frame, "PACS", ["ERM", "LoRA", "FLYP"]).axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[3, 2, 1]] * 3


def test_the_legend_of_many_rows_covers_no_axes():
    names = [f"LoRA, variant {i} of a long name" for i in range(28)]
    found = collected([record(env, 0.5, algorithm="LoRA", label=name) for name in names for env in range(4)])
    drawn = figures.all_figures(found, tables.build(found, IIDAccuracy))
    assert set(drawn) == {"PACS-accuracy", "PACS-curves", "PACS-selection"}
    for figure in drawn.values():
        figure.draw_without_rendering()
        (box,) = (legend.get_window_extent() for legend in figure.legends)
        assert box.y0 >= 0
        assert all(axis.get_tightbbox().y0 >= box.y1 and axis.get_window_extent().height > 100 for axis in figure.axes)


def test_curves_are_means_by_step():
    found = collected(sweep())
    axes = figures.curves(found.frame, "PACS", ["ERM", "LoRA"]).axes
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
    (axis,) = figures.selection(collected(records).frame, "PACS", ["ERM", "LoRA"]).axes
    assert axis.get_legend_handles_labels()[1] == ["ERM (rank correlation +1.00)", "LoRA (rank correlation +1.00)"]
    assert len(axis.collections[0].get_offsets()) == 32


def test_rows_differ_in_more_than_colour():
    look = figures.styles([str(i) for i in range(40)])
    assert len({(s["color"], s["marker"], s["linestyle"]) for s in look.values()}) == 40
    assert len({s["marker"] for s in look.values()}) == len(figures.MARKERS)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "hard"])
def test_learned_gates_are_those_of_the_model(tmp_path, kind):
    logits = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    names = [f"tower.blocks.{i}.attn.gate.gate_logits" for i in range(12)]
    save_file(dict(zip(names, logits.numpy(), strict=True)), tmp_path / "model.safetensors")
    expected = []
    for line in logits:
        gate = HeadGate(6, kind, 2).eval()
        gate.gate_logits.data = line
        expected.append(gate().detach().numpy())
    found = figures.learned_gates(Run(str(tmp_path), {}, {"gates": kind, "gate_keep": 2}))
    assert np.allclose(found, expected, atol=1e-6)


def test_no_gates_without_a_model_or_without_gates(tmp_path):
    assert figures.learned_gates(Run(str(tmp_path), {}, {"gates": "softmax"})) is None
    save_file({"weight": np.ones(2)}, tmp_path / "model.safetensors")
    assert figures.learned_gates(Run(str(tmp_path), {}, {"gates": "softmax"})) is None
    assert figures.learned_gates(Run(str(tmp_path), {}, {})) is None


def test_plot_writes_png_and_pdf(tmp_path, capsys):
    from made_records import write

    for i, one in enumerate(sweep()):
        write(tmp_path / str(i), one | {"hparams": {"gates": "softmax"}})
    for i in ("3", "11"):  # trial 0 of environments 0 and 1
        save_file({"a.gate_logits": np.zeros(4, np.float32)}, tmp_path / i / "model.safetensors")
    assert run(plot.main, ["--input_dir", str(tmp_path)]) == 0
    gates = [f"PACS-gates-LoRA-env{env}" for env in (0, 1)]
    names = ["PACS-accuracy", "PACS-curves", *gates, "PACS-selection"]
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and err == ""


def test_plot_of_nothing(tmp_path, capsys):
    assert run(plot.main, ["--input_dir", str(tmp_path)]) == 2
    assert "nothing to collect" in capsys.readouterr().err
    from made_records import write

    write(tmp_path / "run", record(0, 0.5))
    assert run(plot.main, ["--input_dir", str(tmp_path), "--selection", "leave_one_out"]) == 2
    assert "nothing to draw" in capsys.readouterr().err
