import json

from made_records import collected, record

from domainbed_hp.reports import report, text_formats


def made(**kwargs):
    """ERM, LoRA without its last trial, and a name that is full of Markdown."""
    keys = [(n, a, e, t) for n, a in (("ERM", 0.5), ("LoRA", 0.7), ("a_b|c", 0.6)) for e in range(4) for t in range(2)]
    records = [record(e, acc, t, algorithm=name) for name, acc, e, t in keys if (name, e, t) != ("LoRA", 3, 1)]
    return report.make_report(collected(records), **kwargs)


def test_markdown_marks_the_best_and_what_is_incomplete():
    text = text_formats.to_markdown(made())
    assert text.startswith(
        "# Results\n\n23 records.\n\n## Model selection: training-domain validation set\n\n### PACS\n"
    )
    (lora, other) = (line for line in text.splitlines()[8:13] if "LoRA" in line or line[2:3] == "a")
    assert [cell.strip() for cell in lora.split("|")[1:-1]] == [
        "LoRA",
        *["**70.0 ± 0.0**"] * 3,
        "**70.0 ± 0.0**†",
        "**70.0**†",
    ]
    assert other.startswith(r"| a\_b\|c") and other.count("*60.0 ± 0.0*") == 4
    assert text.count("† Incomplete, for want of:\n\n- LoRA, PACS, test\\_envs 3, trial 1, hparams\\_seed 0\n") == 6


def test_csv_and_json_have_every_cell_unrounded():
    ours = made(statistics=["step_time", "step"])
    lines = text_formats.to_csv(ours).splitlines()
    assert lines[0] == "selection,dataset,row,column,mean,err,n,missing,step_ms,step"
    cells = json.loads(text_formats.to_json(ours))["cells"]
    assert len(lines) - 1 == len(cells) == 3 * (3 * 5 + 3 * 2)
    assert cells[0] == {
        **{"selection": "training-domain validation set", "dataset": "PACS", "row": "ERM", "column": "A"},
        **{"mean": 50.0, "err": 0.0, "n": 2, "missing": 0, "step_ms": None, "step": 0.0},
    }
