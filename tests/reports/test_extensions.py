"""The cost of an extension: a new selection rule is one class and one line of the registry, a statistic is one key."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_records import Record, collected, record, write

import domainbed_hp
from domainbed_hp.model_selection import IIDAccuracy, load_selection_methods
from domainbed_hp.plugins import import_plugin
from domainbed_hp.registry import SELECTION_RULES, UsageError
from domainbed_hp.reports import figures, tables
from domainbed_hp.scripts import collect_results, plot, run

RULE = '''
class LastStep(SelectionMethod):
    """The last checkpoint, whatever its accuracy: a step's number is its score."""

    key = "last_step"
    name = "last step"

    @classmethod
    def candidates(cls, frame):
        single = take_single(frame)
        return single.assign(val_acc=single["step"])
'''
DATA = """
from domainbed_hp.datasets.spec import DatasetSpec

SKIES = DatasetSpec("Skies", ("day", "dusk", "night", "storm"), 2, ("cloud", "sun"), folder="skies")
"""


def sweep() -> list[list[Record]]:
    """One run for each environment, two rows; the best of three steps by validation is the one in the middle."""
    runs = []
    for name in ("ERM", "LoRA"):
        for env in range(4):
            records = []
            for step, (val_acc, test_acc) in enumerate([(0.1, 0.2), (0.9, 0.5), (0.3, 0.8)]):
                accs = {f"env{i}_out_acc": val_acc for i in range(4)}
                records.append(record(env, test_acc, algorithm=name, dataset="Skies") | accs | {"step": step})
            runs.append(records)
    return runs


def launch(folder: Path, script: str, *argv: str) -> str:
    """Run a script of the copy of the package in `folder`, or of the package itself if there is no copy.

    The user's own modules lie in `folder`.
    """
    command = [sys.executable, "-m", f"domainbed_hp.scripts.{script}", "--input_dir", "runs", *argv]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(domainbed_hp.__file__).parents[1])])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_rule_is_one_class_and_one_line(tmp_path: Path) -> None:
    package = tmp_path / "domainbed_hp"
    shutil.copytree(Path(domainbed_hp.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "mini"))
    with open(package / "model_selection.py", "a") as file:
        file.write(RULE)
    line = '    "oracle": "domainbed_hp.model_selection:Oracle",\n'
    text = (package / "registry.py").read_text()
    assert text.count(line) == 1
    added = line + '    "last_step": "domainbed_hp.model_selection:LastStep",\n'
    (package / "registry.py").write_text(text.replace(line, added))
    for i, records in enumerate(sweep()):
        write(tmp_path / "runs" / str(i), *records)

    cells = json.loads(launch(tmp_path, "collect_results", "--json"))["cells"]
    means = {c["selection"]: c["mean"] for c in cells if (c["dataset"], c["row"], c["column"]) == ("Skies", "ERM", "0")}
    assert list(means) == [*(method.name for method in load_selection_methods()), "last step"]
    assert means["last step"] == pytest.approx(80) and means[IIDAccuracy.name] == pytest.approx(50)
    drawn = launch(tmp_path, "plot", "--selection", "last_step").splitlines()
    assert [Path(line).name for line in drawn] == [f"Skies-{kind}.png" for kind in ("accuracy", "curves", "selection")]


def test_a_rule_and_a_data_set_of_ones_own_are_imported(tmp_path: Path) -> None:
    (tmp_path / "my_rule.py").write_text(
        "from domainbed_hp.model_selection import SelectionMethod, take_single\n" + RULE
    )
    (tmp_path / "my_data.py").write_text(DATA)
    for i, records in enumerate(sweep()):
        write(tmp_path / "runs" / str(i), *records)
    imports = ["--import", "my_rule", "my_data"]
    text = launch(tmp_path, "collect_results", *imports)
    assert "Dataset: Skies, model selection method: last step" in text
    assert text.count("Algorithm             day ") == 4
    place = ["--dataset", "Skies", "--algorithm", "LoRA", "--test_env", "3"]
    ranked = launch(tmp_path, "list_top_hparams", *place, *imports).partition("Model selection: last step\n")[2]
    assert "test_acc: 80.0  step: 2" in ranked
    assert launch(tmp_path, "plot", "--selection", "last_step", *imports).count("Skies") == 3


def test_a_rule_needs_a_key_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of a rule would else replace it, and its tables would change in silence."""
    code = "from domainbed_hp.model_selection import IIDAccuracy\n\nclass Better(IIDAccuracy):\n    name = 'better'\n"
    (tmp_path / "rule_without_key.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="--import rule_without_key: Better has no key. Add one"):
        import_plugin("rule_without_key")
    assert load_selection_methods()[0] is IIDAccuracy


def test_the_registry_and_the_rules_agree_on_keys() -> None:
    assert [method.key for method in load_selection_methods()] == list(SELECTION_RULES)


def test_an_unknown_rule_lists_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, record(0, 0.5))
    assert run(plot.main, ["--input_dir", str(tmp_path), "--selection", "orcale"]) == 2
    assert "'orcale'. Did you mean 'oracle'? Known: iid, leave_one_out, oracle" in capsys.readouterr().err


def tilted() -> list[Record]:
    """Records with a statistic that only LoRA has: ten times the step, and the trial."""
    records = []
    for trial in range(2):
        for env in range(4):
            for step, acc in enumerate((0.1, 0.9, 0.5)):
                accs = {f"env{i}_out_acc": acc for i in range(4)} | {"step": step}
                records.append(record(env, 0.5, trial, algorithm="LoRA") | accs | {"tilt": 10 * step + trial})
                records.append(record(env, 0.5, trial, algorithm="ERM") | accs)
    return records


def test_a_statistic_is_a_column_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its mean over the chosen records: step 1 of both trials by validation, the last step for the oracle."""
    for i, records in enumerate(zip(*[iter(tilted())] * 6, strict=True)):
        for name, own in (("LoRA", records[::2]), ("ERM", records[1::2])):
            write(tmp_path / f"{name}{i}", *own)
    argv = ["--input_dir", str(tmp_path), "--columns", "tilt", "step"]
    assert run(collect_results.main, [*argv, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    columns = {(c["selection"].split()[0], c["row"]): (c["tilt"], c["step"]) for c in cells if c["dataset"] == "PACS"}
    assert columns == {
        **{("training-domain", "LoRA"): (10.5, 1), ("training-domain", "ERM"): (None, 1)},
        **{("leave-one-domain-out", "LoRA"): (None, None), ("leave-one-domain-out", "ERM"): (None, None)},
        **{("test-domain", "LoRA"): (20.5, 2), ("test-domain", "ERM"): (None, 2)},
    }
    assert run(collect_results.main, argv) == 0
    header, _, lora = capsys.readouterr().out.splitlines()[3:6]
    assert header.split()[-2:] == ["tilt", "step"] and lora.split()[-2:] == ["10.5", "1"]


def test_a_statistic_is_a_curve_by_its_key() -> None:
    axes = figures.draw_curves(collected(tilted()).frame, "PACS", ["ERM", "LoRA"], ["tilt"]).axes
    assert [axis.get_title() for axis in axes] == ["tilt", "validation accuracy (%)", "target accuracy (%)"]
    assert [line.get_ydata().tolist() for line in axes[0].lines] == [[0.5, 10.5, 20.5]]
    assert np.allclose([line.get_ydata() for line in axes[1].lines], [[10, 90, 50]] * 2)


@pytest.mark.parametrize(("main", "flag"), [(collect_results.main, "--columns"), (plot.main, "--curves")])
def test_unknown_statistics_list_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str], main, flag) -> None:
    write(tmp_path, record(0, 0.5) | {"tilt": 1})
    assert run(main, ["--input_dir", str(tmp_path), flag, "tlit"]) == 2
    err = capsys.readouterr().err
    assert "unknown number in the records 'tlit'. Did you mean 'tilt'? Known: " in err and "env0_in_acc" in err
    assert ("step_time" in err) == (flag == "--columns")


def test_costs_stand_beside_statistics() -> None:
    records = [record(env, 0.5) | {"trainable_params": 7, "tilt": 0.25} for env in range(4)]
    table = tables.build_tables(collected(records), IIDAccuracy, statistics=["params", "tilt"])[0]
    assert table.header[-2:] == ["parameters (trained)", "tilt"]
    assert [statistic.format() for statistic in table.statistics] == [["7"], ["0.25"]]
