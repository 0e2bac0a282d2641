import errno
import json
import math
import os
import signal
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import photo
from leases import leave_lease
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import CPU, MINI, Run, crash, go, stop_at, terminate, without_times

from domainbed_hp import hparams_registry, records
from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.datasets.loading.transforms import DecodedViews
from domainbed_hp.datasets.open import find_spec, open_dataset
from domainbed_hp.datasets.spec import ArrayImages
from domainbed_hp.datasets.splits import split_environments
from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import RunTaken, State, read_failure, read_state
from domainbed_hp.scripts import run
from domainbed_hp.scripts.train import main
from domainbed_hp.training import checkpoint, evaluation, loop, setup
from domainbed_hp.training.model_io import load_model


@pytest.fixture(scope="module")
def purification(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("purification")
    go(folder)
    return Run(folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    go(folder, algorithm="LoRA")
    return Run(folder)


def test_records_have_what_domainbed_reads(tmp_path: Path) -> None:
    records = go(tmp_path / "run", test_envs=(1,), label="mine")
    assert [r["step"] for r in records] == [0, 2, 3]
    for r in records:
        assert {"trial_seed", "dataset", "algorithm", "test_envs", "hparams_seed", "output_dir"} <= r["args"].keys()
        assert {f"env{i}_{s}_acc" for i in range(3) for s in ("in", "out")} <= r.keys()
        assert {"epoch", "step_time", "mem_gb", "hparams", "versions", "ce", "mmd", "val_mmd", "gate_shift"} <= r.keys()
        assert r["args"]["test_envs"] == [1] and r["hparams"]["batch_size"] == 4
        assert r["epoch"] == pytest.approx(r["step"] / (13 / 4))  # 16 images, 3 held out
    assert (tmp_path / "run" / "done").read_text() == "done"
    out = (tmp_path / "run" / "out.txt").read_text()
    assert "HParams:" in out and "env0_in_acc" in out


def test_same_arguments_same_records(purification: Run, tmp_path: Path) -> None:
    assert without_times(go(tmp_path / "run")) == without_times(purification.read())


@pytest.mark.parametrize("algorithm", ["HeadPurification", "ERM"])
def test_checkpoint_freq_never_changes_the_weights(tmp_path: Path, algorithm: str) -> None:
    hparams = MINI if algorithm != "ERM" else '{"batch_size": 4, "resnet_dropout": 0.5}'
    weights = []
    for freq in (1, 4):
        go(tmp_path / f"{freq}", checkpoint_freq=freq, algorithm=algorithm, hparams=hparams)
        weights.append(load_file(tmp_path / f"{freq}" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.slow
def test_saved_model_predicts_as_recorded(tmp_path: Path) -> None:
    records = go(tmp_path / "run", dataset="ShapesDG", eval_images=40, save_model_every_checkpoint=True)
    algorithm, recipe = load_model(tmp_path / "run")
    assert recipe.algorithm == "HeadPurification" and len(recipe.class_names) == 10
    assert (tmp_path / "run" / "model_step2.safetensors").is_file()
    preprocess = type(algorithm).preprocess(recipe.hparams, 64)
    dataset = open_dataset(find_spec("ShapesDG"), None, preprocess)
    split = split_environments([len(e) for e in dataset.environments], (0,), 0)
    loader = loop.make_eval_loaders(dataset.environments, split, 64, max_images=40)["env0_out"]
    assert evaluation.score_split(algorithm, loader, CPU, preprocess).accuracy == records[-1]["env0_out_acc"]


def test_a_model_file_without_a_trained_tensor_is_refused(tmp_path: Path) -> None:
    go(tmp_path / "run", steps=1, eval_images=2)
    path = tmp_path / "run" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != lost}, path, metadata)
    with pytest.raises(UsageError, match=rf"got no tensors \['{lost}'\], which HeadPurification trains: load the file"):
        load_model(tmp_path / "run")


def test_without_validation_images_gates_alone_are_diagnosed(tmp_path: Path) -> None:
    some, none = (
        go(tmp_path / f"{fraction}", steps=1, eval_images=2, holdout_fraction=fraction)[0] for fraction in (0.2, 0.0)
    )
    assert "val_mmd" in some and "val_mmd" not in none
    assert np.shape(none["gates"]) == np.shape(some["gates"]) and len(none["gates"]) > 1  # layers, heads
    assert "gates" not in (tmp_path / "0.0" / "out.txt").read_text().splitlines()[-2]  # the header of numbers


@pytest.mark.parametrize("algorithm", ["HeadPurification", "LoRA"])
def test_a_statistic_that_backward_returns_is_recorded_and_trains_nothing(
    lora: Run, purification: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    kind, plain = get_algorithm_class(algorithm), lora if algorithm == "LoRA" else purification
    backward = kind.backward

    def with_norm(self: Any, *args: Any) -> dict[str, torch.Tensor]:
        trained = [p for p in self.parameters() if p.requires_grad]
        return backward(self, *args) | {"norm": torch.stack([p.square().sum() for p in trained]).sum()}

    monkeypatch.setattr(kind, "backward", with_norm)
    lines = go(tmp_path / "run", algorithm=algorithm)
    assert all(record.pop("norm") > 0 for record in lines)
    assert without_times(lines) == without_times(plain.read())
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", plain.folder))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_split_smaller_than_the_batch_trains(tmp_path: Path) -> None:
    go(tmp_path / "run", hparams=MINI.replace("4", "32"), steps=1)  # Debug28 has 13 training images


def test_methods_that_do_not_train_run_for_one_step(tmp_path: Path) -> None:
    assert [r["step"] for r in go(tmp_path / "run", algorithm="ZeroShotCLIP", steps=50)] == [0]


def test_domain_adaptation_gives_unlabeled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    update = get_algorithm_class("LoRA").update
    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", lambda s, m, u: (seen.append(u), update(s, m))[1])
    records = go(tmp_path / "a", algorithm="LoRA", task="domain_adaptation", uda_holdout_fraction=0.5, test_envs=(2,))
    assert all(len(u) == 1 and u[0].shape == (4, 3, 64, 64) for u in seen)
    assert "env2_uda_acc" in records[0]
    with pytest.raises(UsageError, match="uda"):
        go(tmp_path / "b", algorithm="LoRA", task="domain_adaptation")


def test_random_hparams_are_json_and_bf16_runs(tmp_path: Path) -> None:
    records = go(tmp_path / "run", hparams_seed=3, precision="bf16", steps=1, eval_images=2)
    drawn = hparams_registry.random_hparams("HeadPurification", "Debug28", loop.seed_hash(3, 0)) | json.loads(MINI)
    assert records[0]["hparams"] == drawn


def test_nan_stops_the_run_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", lambda *_: {"ce": float("nan")})
    with pytest.raises(FloatingPointError, match="ce is nan at step 0"):
        go(tmp_path / "run", algorithm="LoRA")
    assert "ce is nan" in (tmp_path / "run" / "err.txt").read_text()
    assert not (tmp_path / "run" / "done").exists()


def test_the_first_bad_step_is_named_although_metrics_are_read_at_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ce = iter([1.0, 2.0, math.inf, math.nan, 1.0])
    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", lambda *_: {"ok": 0.0, "ce": torch.tensor(next(ce))})
    with pytest.raises(FloatingPointError, match="ce is inf at step 2: try a smaller lr, or --precision fp32"):
        go(tmp_path / "run", algorithm="LoRA", steps=9, checkpoint_freq=4)
    assert next(ce, None) is None and [r["step"] for r in list(records.read_records(tmp_path / "run"))] == [0]


def test_what_is_logged_is_read_at_records_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and numbers alike, of any kind, on average over the steps since the last record."""
    read, reads = evaluation.read_floats, []
    monkeypatch.setattr(evaluation, "read_floats", lambda *args: (reads.append(len(args[0])), read(*args))[1])
    whole = go(tmp_path / "run", algorithm="LoRA", steps=6, checkpoint_freq=3, eval_images=1)
    assert reads == [1, 3, 2]
    update, seen, counter = get_algorithm_class("LoRA").update, [], torch.zeros(())

    def numbers(*args: Any) -> dict[str, Any]:
        seen.append(update(*args)["ce"].item())
        counter.add_(1)  # as an optimizer moves a parameter
        odd = {"odd": torch.ones(1, requires_grad=True), "half": torch.tensor(2.5).half(), "count": counter}
        return {"ce": seen[-1], **odd}

    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", numbers)
    again = go(tmp_path / "again", algorithm="LoRA", steps=6, checkpoint_freq=3, eval_images=1)
    assert [r["ce"] for r in whole] == [r["ce"] for r in again] == [seen[0], np.mean(seen[1:4]), np.mean(seen[4:])]
    assert (again[1]["odd"], again[1]["half"]) == (1.0, 2.5)
    assert [r["count"] for r in again] == [1, (2 + 3 + 4) / 3, (5 + 6) / 2]


def test_step_time_is_that_of_loading_and_steps_and_not_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def takes(name: str, where: Any, seconds: float) -> None:
        before = getattr(where, name)
        later = lambda *a: (clock.__setitem__(0, clock[0] + seconds), before(*a))[1]  # noqa: E731
        monkeypatch.setattr(where, name, later)

    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", lambda *_: {"ce": 1.0})
    for name, where, seconds in (
        ("__getitem__", loop.EvalLoader, 100.0),
        ("make_minibatch", setup.TrainLoader, 1.0),
        ("update", get_algorithm_class("LoRA"), 4.0),
        ("read_floats", evaluation, 6.0),
    ):
        takes(name, where, seconds)
    settings = {"algorithm": "LoRA", "steps": 5, "checkpoint_freq": 3, "eval_images": 1}
    times = [r["step_time"] for r in go(tmp_path / "run", **settings)]
    assert times == [2 + 4 + 6, 2 + 4 + 6 / 3, 2 + 4 + 6 / 1]  # two environments; three steps, then one
    stop_at(2, monkeypatch, terminate)
    with pytest.raises(SystemExit):
        go(tmp_path / "stopped", **settings)
    times = [r["step_time"] for r in go(tmp_path / "stopped", **settings)]
    assert times[1] == pytest.approx(2 + 4 + (6 + 6) / 3)  # read where it was stopped, too


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--algorithm", "HeadPurificaton"], "Did you mean 'HeadPurification'"),
        (["--dataset", "PAC"], "Did you mean 'PACS'"),
        (["--hparams", '{"lora_rnk": 2}'], "Did you mean 'lora_rank'"),
        (["--hparams", '{"lora_rank": "2"}'], "expected int"),
        (["--hparams", '{"gates": "soft"}'], "known: 'softmax'"),
        (["--hparams", "lr=1"], "expected a JSON object"),
        (["--hparams", "[1]"], "expected a JSON object"),
        (["--hparams", '{"clip_model": "RN50"}'], "has a ResNet tower"),
        (["--hparams", '{"clip_pretrained": "/nowhere.pt"}'], "is no file and no known tag"),
        (["--dataset", "PACS"], "pass --data_dir"),
        (["--dataset", "PACS", "--data_dir", "/nowhere"], "/nowhere"),
        (["--test_envs", "4"], "0 to 3"),
        (["--test_envs", "0", "1", "2", "3"], "no environment to train on"),
        (["--steps", "0"], "at least 1"),
        (["--num_workers", "-1"], "at least 0"),
        (["--dataset", "folder:/nowhere"], "cannot read /nowhere"),
        (["--device", "tpu"], "Known here: cpu"),
        (["--import", "no_such_module"], "No module named"),
        (["--holdout_fraction", "1.5"], "holdout_fraction"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_algorithm", lambda *_: pytest.fail("a model was built"))
    if not any("clip_" in a for a in argv):
        argv = [*argv, *([] if "--hparams" in argv else ["--hparams", MINI])]
    assert run(main, [*argv, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    a, b = (without_times(go(tmp_path / str(n), num_workers=n)) for n in (0, 2))
    for record in a + b:
        del record["args"]["num_workers"]
    assert a == b


@pytest.fixture
def two_styles(tmp_path: Path) -> Path:
    """A user's own data: two environments, two classes."""
    for env, side in (("day", 90), ("night", 70)):
        for i in range(12):
            path = tmp_path / "mine" / env / ("tawny_owl" if i % 2 else "fox") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(side + i, side, i).save(path)
    return tmp_path


@pytest.mark.parametrize("algorithm", ["HeadPurification", "ERM", "ZeroShotCLIP"])
def test_a_folder_of_ones_own_with_two_environments_trains(two_styles: Path, algorithm: str) -> None:
    hparams = MINI if algorithm != "ERM" else '{"batch_size": 4, "backbone": "small"}'
    own = {"dataset": f"folder:{two_styles / 'mine'}", "test_envs": (1,), "hparams": hparams, "algorithm": algorithm}
    records = go(two_styles / "run", **own)
    assert {"env0_in_acc", "env1_out_acc"} <= records[-1].keys() and "env2_out_acc" not in records[-1]
    assert records[0]["args"]["dataset"] == own["dataset"]
    assert "Images: image files" in (two_styles / "run" / "out.txt").read_text()


def test_scoring_halves_the_batch_until_it_fits() -> None:
    class Small(Algorithm):
        sizes: list[int] = []

        def predict(self, x: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(x))
            if len(x) > self.hparams["most"]:
                raise torch.cuda.OutOfMemoryError
            return torch.eye(2)[(x.mean(dim=(1, 2, 3)) > 0.5).long()]

    levels = np.array([0] * 9 + [255] * 3, np.uint8)
    views = DecodedViews(ArrayImages(np.tile(levels[:, None, None, None], (1, 8, 8, 3)), levels > 0), Preprocess(8))
    loader = loop.EvalLoader(views, range(12), 16)
    small = Small((3, 8, 8), 2, 1, {"most": 5})
    assert evaluation.score_split(small, loader, CPU, Preprocess(8)).accuracy == 1.0
    assert small.sizes == [12, 8, 4, 4, 4] and loader.batch_size == 4
    with pytest.raises(torch.cuda.OutOfMemoryError):
        evaluation.score_split(Small((3, 8, 8), 2, 1, {"most": 0}), loader, CPU, Preprocess(8))


def test_a_run_that_is_done_is_never_touched(tmp_path: Path) -> None:
    before = go(tmp_path / "run", algorithm="ZeroShotCLIP")
    with pytest.raises(RunTaken, match="already holds a run that is done"):
        go(tmp_path / "run", algorithm="ZeroShotCLIP")
    assert list(records.read_records(tmp_path / "run")) == before


@pytest.mark.parametrize(
    ("target", "write"),
    [
        ("make_weight_average", "truncation"),
        ("evaluation.make_score_columns", "record"),
        ("records.append_record", "checkpoint"),
        ("save_checkpoint", "model"),
        ("save_model", "done"),
    ],
)
def test_who_lost_the_run_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, write: str
) -> None:
    folder = tmp_path / "run"
    settings = {"algorithm": "LoRA", "steps": 1}
    if write == "truncation":
        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", lambda *_: crash())
            with pytest.raises(RuntimeError):
                go(folder, **settings)
        assert len(list(records.read_records(folder))) == 1  # it would be dropped, as no checkpoint knows of it
    function = attrgetter(target)(loop)
    before: dict[str, bytes] = {}

    def lose(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        leave_lease(folder)
        before.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return result

    monkeypatch.setattr(f"domainbed_hp.training.loop.{target}", lose)
    with pytest.raises(RunTaken, match="process 12 on node7"):
        go(folder, **settings)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    del before["out.txt"], after["out.txt"]
    assert after == before


@pytest.mark.parametrize(
    ("algorithm", "how", "step"),
    [
        ("HeadPurification", terminate, 3),
        pytest.param("HeadPurification", crash, 5, marks=pytest.mark.slow),
        ("LoRA", crash, 0),
        pytest.param("LoRA", terminate, 6, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, how: Callable[[], object], step: int
) -> None:
    settings = {"algorithm": algorithm, "steps": 7, "checkpoint_freq": 3, "keep": "best"}
    whole = go(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(step, patch, how, algorithm)
        with pytest.raises((SystemExit, RuntimeError)) as caught:
            go(tmp_path / "run", **settings)
    if how is terminate:
        assert caught.value.code == 128 + signal.SIGTERM
        assert read_state(tmp_path / "run") == State.INCOMPLETE
    else:
        assert read_state(tmp_path / "run") == State.FAILED and read_failure(tmp_path / "run") == "RuntimeError: boom"
    resumed = go(tmp_path / "run", **settings)
    assert without_times(resumed) == without_times(whole)
    for name in ("model", "model_best"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"done", "out.txt", "results.jsonl", "model.safetensors", "model_best.safetensors"}
    if step > (0 if how is crash else -1):
        assert "Resumed after step" in (tmp_path / "run" / "out.txt").read_text()


def test_a_run_that_is_stopped_while_it_scores_saves_its_state(
    lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, whole = {"algorithm": "LoRA"}, lora.read()
    score, calls = evaluation.score_split, [0]

    def stopping(*args: Any) -> evaluation.SplitScore:
        calls[0] += 1
        if calls[0] == 9:  # the third split of the second record
            terminate()
        return score(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_split", stopping)
        with pytest.raises(SystemExit):
            go(tmp_path / "run", **settings)
    assert [r["step"] for r in list(records.read_records(tmp_path / "run"))] == [0]
    assert checkpoint.load_checkpoint(tmp_path / "run")["step"] == 2  # no step is done twice
    assert without_times(go(tmp_path / "run", **settings)) == without_times(whole)


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(1, monkeypatch, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", algorithm="LoRA")
    assert read_state(tmp_path / "run") == State.INCOMPLETE
    assert checkpoint.load_checkpoint(tmp_path / "run")["step"] == 0, "that of the last record"


@pytest.mark.parametrize("second", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_another_signal_after_the_first_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    signals = [signal.SIGUSR1, getattr(signal, second)]  # the order of Slurm
    stop_at(1, monkeypatch, lambda: [signal.raise_signal(number) for number in signals])
    with pytest.raises(SystemExit) as caught:
        go(tmp_path / "run", algorithm="LoRA")
    assert caught.value.code == 128 + signal.SIGUSR1
    assert checkpoint.load_checkpoint(tmp_path / "run")["step"] == 1


def test_a_torn_record_is_dropped_and_written_again(lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, whole = {"algorithm": "LoRA"}, lora.read()
    with monkeypatch.context() as patch:
        stop_at(3, patch, crash)
        with pytest.raises(RuntimeError):
            go(tmp_path / "run", **settings)
    path = tmp_path / "run" / "results.jsonl"
    assert [r["step"] for r in list(records.read_records(path.parent))] == [0, 2]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="not a whole record"):
        resumed = go(tmp_path / "run", **settings)
    assert without_times(resumed) == without_times(whole)


def test_another_run_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(2, patch, crash)
        with pytest.raises(RuntimeError):
            go(tmp_path / "run", algorithm="LoRA")
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds another run .seed: there 3, here 4."):
        go(tmp_path / "run", algorithm="LoRA", seed=4)
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="eval: there 'full', here 'fast'"):  # its records would have other columns
        go(tmp_path / "run", algorithm="LoRA", eval="fast")
    go(tmp_path / "run", algorithm="LoRA", num_workers=1)


@pytest.mark.parametrize("whole", [True, False], ids=["by its records", "by its checkpoint"])
def test_a_run_of_a_version_that_had_loaders_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Their records and checkpoints name a loader; `batched` is what there is now."""
    with monkeypatch.context() as patch:
        stop_at(2, patch, crash)
        with pytest.raises(RuntimeError):
            go(tmp_path / "run", algorithm="LoRA")
    path, file = tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "results.jsonl"
    if whole:
        path.unlink()
        text = file.read_text()
        file.write_text(text.replace('"args": {', '"args": {"loader": "reference", '))
    else:
        state = torch.load(path, weights_only=True)
        torch.save(state | {"args": state["args"] | {"loader": "reference"}}, path)
    with pytest.raises(UsageError, match="loader: there 'reference', here 'batched'"):
        go(tmp_path / "run", algorithm="LoRA")
    if whole:
        file.write_text(text.replace('"args": {', '"args": {"loader": "batched", '))
    else:
        torch.save(state | {"args": state["args"] | {"loader": "batched"}}, path)
    go(tmp_path / "run", algorithm="LoRA")


def test_fast_scores_all_but_the_images_that_are_trained_on(tmp_path: Path) -> None:
    settings = {"steps": 2, "checkpoint_freq": 1, "test_envs": (1,), "hparams": MINI[:-1] + ', "average": "swad"}'}
    full, fast = (go(tmp_path / kind, eval=kind, **settings) for kind in ("full", "fast"))
    for more, less in zip(without_times(full), without_times(fast), strict=True):
        assert more.keys() - less.keys() == {"env0_in_acc", "env2_in_acc"}
        assert less | {"args": 0} == {key: more[key] for key in less} | {"args": 0}


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(3, patch, crash)
        with pytest.raises(RuntimeError):
            go(tmp_path / "run", algorithm="LoRA")
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read .*Remove it: the run then starts anew"):
        go(tmp_path / "run", algorithm="LoRA")
    path.unlink()
    assert [r["step"] for r in go(tmp_path / "run", algorithm="LoRA")] == [0, 2, 3]


@pytest.mark.parametrize(("number", "after", "stay"), [(errno.ENOSPC, 3, [0]), (errno.EIO, 4, [0, 2])])
def test_an_error_of_the_disk_is_named_and_loses_nothing(
    lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int, stay: list[int]
) -> None:
    fsync, calls = os.fsync, [0]

    def failing(fd: int) -> None:
        calls[0] += 1
        if calls[0] > after:  # each record is synced, then the checkpoint and its folder
            raise OSError(number, os.strerror(number))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError):
            go(tmp_path / "run", algorithm="LoRA")
    assert os.strerror(number) in read_failure(tmp_path / "run")
    assert [r["step"] for r in list(records.read_records(tmp_path / "run"))] == stay
    assert without_times(go(tmp_path / "run", algorithm="LoRA")) == without_times(lora.read())


def test_numbers_of_numpy_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = get_algorithm_class("LoRA").update
    numbers = lambda *args: {name: np.float32(value) for name, value in update(*args).items()}  # noqa: E731
    monkeypatch.setattr(get_algorithm_class("LoRA"), "update", numbers)
    with monkeypatch.context() as patch:
        stop_at(1, patch, terminate)
        with pytest.raises(SystemExit):
            go(tmp_path / "run", algorithm="LoRA")
    assert [r["step"] for r in go(tmp_path / "run", algorithm="LoRA")] == [0, 2, 3]


def test_out_of_gpu_memory_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    stop_at(1, monkeypatch, full)
    with pytest.raises(
        UsageError, match="at step 1: try a larger accumulate, a smaller batch_size, --precision bf16, or"
    ):
        go(tmp_path / "run", algorithm="LoRA")
    assert "smaller batch_size" in read_failure(tmp_path / "run")


def test_save_full_has_every_weight(lora: Run, tmp_path: Path) -> None:
    go(tmp_path / "all", algorithm="LoRA", save="full")
    some, everything = (load_file(folder / "model.safetensors") for folder in (lora.folder, tmp_path / "all"))
    assert len(everything) > 3 * len(some) and all(torch.equal(everything[k], some[k]) for k in some)
    load_model(tmp_path / "all")


def test_no_model_is_saved_where_none_is_wanted(tmp_path: Path) -> None:
    go(tmp_path / "run", algorithm="LoRA", skip_model_save=True, save_model_every_checkpoint=True, keep="best")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"done", "out.txt", "results.jsonl"}


def test_elapsed_time_adds_up_over_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])
    with monkeypatch.context() as patch:
        stop_at(2, patch, lambda: clock.__setitem__(0, 1050.0) or terminate())
        with pytest.raises(SystemExit):
            go(tmp_path / "run", algorithm="LoRA")
    clock[0] = 5000.0
    assert go(tmp_path / "run", algorithm="LoRA")[-1]["elapsed_s"] == 50.0
