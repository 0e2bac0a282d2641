import re

import pytest
from made_records import record, write

from domainbed_hp.scripts import list_top_hparams, run


@pytest.fixture
def sweep(tmp_path):
    for seed, acc in ((0, 0.5), (1, 0.9), (2, 0.7)):
        for env in range(4):
            accs = {f"env{i}_out_acc": acc for i in range(4)}
            one = record(env, acc - 0.1, hparams_seed=seed) | accs | {"hparams": {"lr": seed, "batch_size": 8}}
            write(tmp_path / f"{seed}-{env}", one, one | {"step": 5, "env1_out_acc": 0.0})
    return tmp_path


def listed(sweep, capsys, *more):
    argv = ["--input_dir", str(sweep), "--dataset", "PACS", "--algorithm", "ERM", "--test_env", "2", *more]
    code = run(list_top_hparams.main, argv)
    return code, *capsys.readouterr()


def test_runs_are_ranked_under_every_method(sweep, capsys):
    code, out, _ = listed(sweep, capsys)
    assert code == 0
    iid, leave_one_out, oracle = (part for part in out.split("Model selection: ") if part)
    assert iid.startswith("training-domain validation set\ntrial_seed: 0\n")
    assert re.findall(r"val_acc: ([\d.]+)  test_acc: ([\d.]+)  step: (\d)", iid) == [
        *(("90.0", "80.0", "0"), ("70.0", "60.0", "0"), ("50.0", "40.0", "0"))
    ]
    assert re.findall(r"lr: (\d)", oracle) == ["1", "2", "0"] and "step: 5" in oracle
    assert f"\t\toutput_dirs:\n\t\t\t{sweep / '1-2'}\n" in iid
    assert leave_one_out.strip().endswith("cross-validation")


def test_pairs_are_listed_where_they_chose(sweep, capsys):
    for seed in range(3):
        for envs in ((0, 2), (1, 2), (2, 3)):
            accs = {f"env{i}_{split}_acc": 0.5 for i in range(4) for split in ("in", "out")}
            args = record(0, 0)["args"] | {"test_envs": list(envs), "hparams_seed": seed}
            write(sweep / f"pair{seed}-{envs[0]}{envs[1]}", {"args": args, "step": 0, **accs})
    _, out, _ = listed(sweep, capsys)
    assert [part.count("/pair") for part in out.split("Model selection: ")[1:]] == [0, 9, 0]


def test_only_the_top(sweep, capsys):
    _, out, _ = listed(sweep, capsys, "--top", "1")
    assert out.count("val_acc") == 2 and "val_acc: 90.0" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--algorithm", "Erm"], "unknown row 'Erm'. Did you mean 'ERM'"),
        (["--dataset", "VLCS"], "unknown data set 'VLCS'"),
        (["--test_env", "7"], "--test_env: got 7, known for ERM: [0, 1, 2, 3]"),
        (["--top", "0"], "--top: got 0"),
    ],
)
def test_mistakes(sweep, capsys, more, message):
    code, out, err = listed(sweep, capsys, *more)
    assert (code, out) == (2, "") and message in err
