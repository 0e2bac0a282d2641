import shutil
import subprocess

import pytest
from made_records import collected, record

from domainbed_hp.datasets.pacs import PACS
from domainbed_hp.reports import latex, published, report

NASTY = r"50% _a_ & #1 {b} $c$ \d ~e^f <g> |h| [i] *j* é µ ð λ → "
LONG = "HeadPurification, without its gates and its adapters_1"


def made(records, **kwargs):
    return report.make_report(collected(records), **kwargs)


def test_names_are_escaped_and_never_cut():
    text = latex.to_latex(made([record(0, 0.5, label=LONG)]))
    assert text.startswith("\\documentclass") and "\n% Total records: 1\n" in text
    assert r"HeadPurification, without its gates and its adapters\_1 & 50.0 $\pm$ 0.0 & X" in text
    assert rf"\textbf{{{PACS.environments[3]}}}" in text
    assert latex.escape_latex("%_&#${}") == r"\%\_\&\#\$\{\}"
    assert latex.escape_latex("~^") == r"\textasciitilde{}\textasciicircum{}"
    # Bare, they would be swallowed by the end of the row above.
    assert latex.escape_latex("[2pt] * λ") == "{[}2pt] {*} U+03BB"


def test_the_best_is_bold_the_second_underlined_and_what_is_incomplete_explained():
    rows = (("ERM", 0.5), ("LoRA", 0.7), ("ZeroShotCLIP", 0.6))
    keys = [(name, acc, env, trial) for name, acc in rows for env in range(4) for trial in range(2)]
    records = [record(e, acc, t, algorithm=name) for name, acc, e, t in keys if (name, e, t) != ("LoRA", 3, 1)]
    text = latex.to_latex(made(records))
    best, second = r"\textbf{70.0 $\pm$ 0.0}", r"\underline{60.0 $\pm$ 0.0}"
    dagger = r"$^{\dagger}$"
    assert " & ".join(["LoRA", best, best, best, best + dagger, rf"\textbf{{70.0}}{dagger} \\"]) in text
    assert " & ".join(["ZeroShotCLIP", *[second] * 4, r"\underline{60.0} \\"]) in text
    note = r"Incomplete, for want of: LoRA, PACS, test\_envs 3, trial 1, hparams\_seed 0.\par"
    assert text.count(note) == 6
    assert dagger not in latex.to_latex(made([r for r in records if r["args"]["algorithm"] != "LoRA"]))


def test_a_fragment_has_floats_and_no_preamble():
    text = latex.to_fragment(made([record(env, 0.5) for env in range(4)]))
    assert r"\documentclass" not in text and r"\begin{document}" not in text and r"\section" not in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 6
    assert r"\caption{PACS, model selection: training-domain validation set.}" in text


@pytest.mark.latex
@pytest.mark.parametrize("kind", ["document", "fragment"])
@pytest.mark.parametrize("extras", [False, True])
def test_every_kind_of_table_compiles(tmp_path, kind, extras):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    names = [NASTY, "[2pt] first", "* star", "ERM", "80%", "region_0", "x" * 40, LONG]
    records = [
        record(env, 0.5, trial, algorithm=name, dataset=data) | {"trainable_params": 7}
        for env in range(4)
        for name in names
        for data in ("VLCS", "PACS", NASTY)
        for trial in range(2)
        if (env, trial, name) != (3, 1, "ERM")
    ]
    ours = made(records, statistics=["params", "step_time"] if extras else [])
    if extras:
        ours.published = published.make_published_tables({"PACS": PACS.environments, "VLCS": "CLSV"})
    text = latex.to_latex(ours)
    if kind == "fragment":
        (tmp_path / "fragment.tex").write_text(latex.to_fragment(ours))
        text = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\extrafloats{100}\\begin{document}\n"
        text += "\\input{fragment}\n\\input{fragment}\\end{document}\n"
    (tmp_path / "main.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "main.log").read_text(errors="replace")
    assert "Missing character" not in log and "Overfull" not in log
