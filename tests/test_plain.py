import csv
import json

from made_records import collected, record

from domainbed_hp.reports import plain, published, report


def made(records, **kwargs):
    return report.make(collected(records), **kwargs)


def two_rows(skip=()):
    rows = (("ERM", 0.5), ("LoRA", 0.7), ("ZeroShotCLIP", 0.6))
    keys = ((name, acc, env, trial) for name, acc in rows for env in range(4) for trial in range(2))
    return [record(e, acc, t, algorithm=name) for name, acc, e, t in keys if (name, e, t) not in skip]


def test_text_is_domainbeds_layout():
    records = [record(env, 0.1 * env, trial, num_envs=2, dataset="Mine") for env in range(2) for trial in range(2)]
    assert plain.to_text(made(records)).startswith(
        "Total records: 4\n"
        "\n"
        "-------- Dataset: Mine, model selection method: training-domain validation set\n"
        "Algorithm             0                     1                     Avg                  \n"
        "ERM                   0.0 +/- 0.0           10.0 +/- 0.0          5.0                  \n"
        "\n"
        "-------- Averages, model selection method: training-domain validation set\n"
        "Algorithm                  Mine                       Avg                       \n"
        "ERM                        5.0 +/- 0.0                5.0                       \n"
        "\n"
    )


def test_long_names_widen_their_own_table_only():
    label = "ERM, of twenty-four char"
    lines = plain.to_text(made([record(0, 0.5, label=label, num_envs=2, dataset="Mine")])).splitlines()
    assert lines[3] == "  ".join(text.ljust(24) for text in ("Algorithm", "0", "1", "Avg")) + " "
    assert lines[4] == "  ".join(text.ljust(24) for text in (label, "50.0 +/- 0.0", "X", "X")) + " "
    assert lines[7] == "  ".join(text.ljust(25) for text in ("Algorithm", "Mine", "Avg")) + " "


def test_markdown_marks_the_best_and_what_is_incomplete():
    text = plain.to_markdown(made(two_rows(skip=[("LoRA", 3, 1)])))
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| LoRA"))
    assert " *60.0 ± 0.0* | " in text
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["**70.0 ± 0.0**"] * 3 + ["**70.0 ± 0.0**†", "**70.0**†"]
    at = lines.index("† Incomplete, for want of:")
    assert lines[at + 2] == "- LoRA, PACS, test\\_envs 3, trial 1, hparams\\_seed 0"


def test_markdown_escapes_names():
    text = plain.to_markdown(made([record(0, 0.5, algorithm=r"a|b*c_<d>\e", dataset="#1 [x]|")]))
    assert r"| a\|b\*c\_\<d\>\\e " in text and r"### \#1 \[x\]\|" in text
    header = next(line for line in text.splitlines() if line.startswith("| Algorithm") and "#1" in line)
    assert r" \#1 \[x\]\| |" in header


def test_csv_has_a_line_for_each_cell():
    lines = list(csv.DictReader(plain.to_csv(made(two_rows(skip=[("LoRA", 3, 1)]))).splitlines()))
    assert len(lines) == 3 * 3 * (5 + 2)
    lora = [
        line for line in lines if (line["row"], line["dataset"]) == ("LoRA", "PACS") and "training" in line["selection"]
    ]
    assert [(line["column"], line["n"], line["missing"]) for line in lora] == [
        *(("A", "2", "0"), ("C", "2", "0"), ("P", "2", "0"), ("S", "1", "1"), ("Avg", "1", "1"))
    ]
    assert float(lora[0]["mean"]) == 70


def test_json_tells_everything():
    report_ = made(two_rows(skip=[("LoRA", 3, 1)]), cost_names=["params"])
    found = json.loads(plain.to_json(report_))
    assert found["records"] == 23 and len(found["cells"]) == 63
    assert found["cells"][0] == {
        **{"selection": "training-domain validation set", "dataset": "PACS", "row": "ZeroShotCLIP", "column": "A"},
        **{"mean": 60.0, "err": 0.0, "n": 2, "missing": 0, "parameters_trained": None},
    }
    assert found["missing"] == ["LoRA, PACS, test_envs 3, trial 1, hparams_seed 0"]
    assert found["provenance"]["runs"] == 23


def test_json_and_csv_are_unrounded():
    report_ = made([record(0, acc, trial, num_envs=2) for trial, acc in enumerate((0.1, 0.1, 0.2))])
    mean = 100 * 0.4 / 3
    assert abs(json.loads(plain.to_json(report_))["cells"][0]["mean"] - mean) < 1e-9
    assert abs(float(next(csv.DictReader(plain.to_csv(report_).splitlines()))["mean"]) - mean) < 1e-9


def test_published_numbers_stand_apart():
    ours = made(two_rows())
    before = plain.to_text(ours)
    ours.published = published.beside({"PACS": "ACPS"})
    text = plain.to_text(ours)
    assert text.startswith(before[:-1])
    assert "-------- Published averages (CLIP ViT-B/16)" in text[len(before) - 1 :]
    assert "Protocols differ" in plain.to_markdown(ours)
    assert [table["title"] for table in json.loads(plain.to_json(ours))["published"]] == [
        "Published on PACS, by environment (CLIP ViT-B/16)",
        "Published averages (CLIP ViT-B/16)",
    ]
