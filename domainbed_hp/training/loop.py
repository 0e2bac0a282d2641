"""One run, start to `done`: arguments in, records out. Stopped at any moment, it goes on where it was."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from domainbed_hp import records
from domainbed_hp.algorithms import Algorithm
from domainbed_hp.algorithms.base import Metrics
from domainbed_hp.datasets.loading.loader import EvalLoader, make_eval_loaders
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.files import remove_temporary_files
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.run_dir import DONE, Claim, claim
from domainbed_hp.seeds import seed_hash
from domainbed_hp.training import checkpoint
from domainbed_hp.training.checkpoint import Stop, Stopped, stop_signals
from domainbed_hp.training.cuda_graph import speed_up
from domainbed_hp.training.evaluation import EVAL_BATCH, Score, evaluation, score, scored, validation_loss
from domainbed_hp.training.feature_cache import cached_features
from domainbed_hp.training.metric_log import Logged
from domainbed_hp.training.model_io import Recipe, build, save_model
from domainbed_hp.training.run_log import log_to, print_header, print_row, versions
from domainbed_hp.training.setup import Plan, plan
from domainbed_hp.training.sharpness import find_climb
from domainbed_hp.training.weight_averaging import find_average, holding

PROBE = 64
"""Validation images of an environment that `Algorithm.diagnose` sees."""


def train(args: RunArgs, held: Claim | None = None) -> None:
    """Train one algorithm on all environments but `test_envs`, score all of them, write `output_dir`.

    A run that was stopped goes on: on the CPU its records and weights are bit for bit those of one that was not.
    `held` is the claim on `output_dir`, where the caller has it already.

    Raises:
        UsageError: the arguments do not fit, before a model is built; `Taken` if the run is done or worked on.
        SystemExit: 128 + its number after SIGINT, SIGTERM or SIGUSR1; the state is saved.
    """
    run = plan(args)
    with contextlib.ExitStack() as stack:
        held = held or stack.enter_context(claim(run.output_dir))
        remove_temporary_files(run.output_dir)
        before = find_before(run)
        stack.enter_context(log_to(run.output_dir))
        workers = stack.enter_context(ThreadPool(run.num_workers))
        stop = stack.enter_context(stop_signals())
        print_header(asdict(args), run.hparams, versions(run.device))
        print(f"Images: {run.dataset.source}")
        training: Training | None = None
        try:
            training = Training(run, held, workers, stop)
            training.resume(before)
            training.go()
        except Stopped as stopped:
            where = f"after step {training.step}" if training else "before any step"
            if training:
                training.save_state()
            print(f"{stopped}: stopped {where}; the same command goes on", flush=True)
            raise SystemExit(128 + stopped.number) from None


class Training:
    """The loop and its state: `step` is the last that was updated, `since` what was logged after the last record."""

    def __init__(self, run: Plan, held: Claim, workers: ThreadPool, stop: Stop) -> None:
        self.run, self.held, self.workers, self.stop = run, held, workers, stop
        self.step = -1
        self.since = Logged(run.device)
        self.recorded: list[int] = []
        self.best = -math.inf
        self.started, self.seconds_before = time.time(), 0.0
        self.columns: list[str] = []

        self.algorithm = untrained(run.recipe, run.args.seed).to(run.device)
        trains = [p for p in self.algorithm.parameters() if p.requires_grad]
        self.average = find_average(trains, run.hparams, run.steps)
        self.climb = find_climb(self.algorithm, run.hparams)
        speed_up(self.algorithm, run.device, run.args.compile, run.steps)
        self.trainable = sum(p.numel() for p in trains)
        bf16 = run.args.precision == "bf16"
        # A cached cast would outlive a climb, which moves the weight in place.
        self.cast = torch.autocast(run.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        batch_size, limit = EVAL_BATCH["cuda" if run.on_gpu else "cpu"], run.args.eval_images
        with evaluation(self.algorithm), self.cast, stop.at_once():
            features = cached_features(run, self.algorithm, batch_size, workers)
        if features and run.preprocess.augmentation == "none":
            self.run = run.on(features)
        environments = features or run.dataset.environments
        self.scored = make_eval_loaders(environments, run.scored, batch_size, workers, max_images=limit, pin=run.on_gpu)
        some = min(PROBE, limit or PROBE)
        held_out = [EvalLoader(environments[i], run.split[i]["out"][:some], some) for i in run.train_envs]
        self.probe = [loader[0].to(run.device, run.preprocess) for loader in held_out if len(loader)]
        with evaluation(self.algorithm), self.cast:
            self.diagnosis()  # before training, so that the method can fix its scales

    def go(self) -> None:
        """From the step after `self.step` to the end."""
        run = self.run
        if self.due():
            self.record()
        todo = range(self.step + 1, run.steps)
        unlabeled = run.unlabeled_batches()
        batches = zip(
            todo,
            self.workers.map(run.batches().__getitem__, todo),
            self.workers.map(unlabeled.__getitem__, todo) if unlabeled else [None] * len(todo),
            strict=True,
        )
        self.since.start()
        for step, ours, extra in tqdm(batches, total=run.steps, initial=todo.start, disable=None, unit="step"):
            seed_everything(seed_hash(run.args.seed, "update", step))  # dropout is a function of the step, too
            minibatches = [batch.to(run.device, run.preprocess) for batch in ours]
            unlabeled_x = None if extra is None else [batch.to(run.device, run.preprocess)[0] for batch in extra]
            with self.cast:
                self.since.add(self.update(step, minibatches, unlabeled_x))
            if self.average is not None:
                self.average.step()
            self.step = step
            if self.due():
                self.record()
            self.stop.check()

        if not run.args.skip_model_save:
            self.save_model("model")
        (run.output_dir / DONE).write_text("done")
        (run.output_dir / checkpoint.FILE_NAME).unlink(missing_ok=True)

    def update(self, step: int, minibatches: list[Any], unlabeled: list[Tensor] | None) -> Metrics:
        """One step of the algorithm, and what it logs; errors say what to try."""
        try:
            with self.climb(minibatches):
                return self.algorithm.update(minibatches, unlabeled)
        except torch.cuda.OutOfMemoryError as error:
            parts = "a larger accumulate, " if "accumulate" in self.run.hparams else ""
            hint = f"try {parts}a smaller batch_size, --precision bf16, or --compile off"
            raise UsageError(f"out of GPU memory at step {step}: {hint} ({error})") from error

    def due(self) -> bool:
        """Whether the last step is to be recorded and is not."""
        step = self.step
        at_checkpoint = step % self.run.checkpoint_freq == 0 or step == self.run.steps - 1
        return step >= 0 and at_checkpoint and step not in self.recorded

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """With the weights to score and to save, where those are not the ones that train."""
        average = self.average
        return contextlib.nullcontext() if average is None else holding(average.parameters, average.weights())

    def validate(self) -> None:
        """Tell an average that asks for it how the weights that train do; once a record, even one that is stopped."""
        if self.average is None or not self.average.VALIDATES or "raw_val_loss" in self.since.values:
            return
        with self.stop.at_once(), evaluation(self.algorithm), self.cast:
            scores = self.scores(self.validation_splits())
        loss = validation_loss(scores, self.run.train_envs)
        self.since.values["raw_val_loss"].append(loss)
        self.average.validated(loss)  # out of `at_once`: no signal leaves it half done

    def validation_splits(self) -> list[str]:
        return [name for i in self.run.train_envs if (name := f"env{i}_out") in self.scored]

    def scores(self, names: Iterable[str]) -> dict[str, Score]:
        run = self.run
        return {name: score(self.algorithm, self.scored[name], run.device, run.preprocess) for name in names}

    def diagnosis(self) -> dict[str, float]:
        """What the method says of validation images, where there are any."""
        return self.algorithm.diagnose(self.probe) if self.probe else {}

    def record(self) -> None:
        """Score every split, append the record, save the state."""
        self.since.read(self.step)
        self.validate()
        run, step = self.run, self.step
        record: dict[str, Any] = {"step": step, "epoch": step / run.steps_per_epoch}
        record |= self.since.means()
        with self.averaged(), self.stop.at_once(), evaluation(self.algorithm), self.cast:
            record |= scored(self.scores(self.scored), run.train_envs)
            record |= self.diagnosis()
        record["mem_gb"] = torch.cuda.max_memory_allocated(run.device) / 2**30 if run.on_gpu else 0.0
        record["elapsed_s"] = self.elapsed_s()
        self.held.check()
        self.columns = print_row(record, self.columns)
        record |= {"hparams": run.hparams, "args": asdict(run.args), "versions": versions(run.device)}
        record |= {"image_size": run.preprocess.size, "trainable_params": self.trainable, "protocol": run.protocol}
        records.append(run.output_dir, record)
        self.recorded.append(step)
        self.keep_models(record)
        self.save_state()  # with `since`: a record that is lost later is written again
        self.since.clear()

    def keep_models(self, record: dict[str, Any]) -> None:
        args, score = self.run.args, validation(record, self.run.train_envs)
        if args.save_model_every_checkpoint and not args.skip_model_save:
            self.save_model(f"model_step{record['step']}")
        if args.keep == "best" and not args.skip_model_save and score > self.best:
            self.best = score
            self.save_model("model_best")

    def save_model(self, name: str) -> None:
        full = self.run.args.save == "full"
        with self.averaged():
            save_model(self.run.output_dir / f"{name}.safetensors", self.algorithm, self.run.recipe, full=full)

    def save_state(self) -> None:
        if self.step < 0:
            return
        self.since.read(self.step)
        progress: dict[str, Any] = {"step": self.step, "since": dict(self.since.values), "best": self.best}
        progress |= {"elapsed_s": self.elapsed_s(), "average": self.average and self.average.state()}
        self.held.check()
        checkpoint.save(self.run.output_dir, self.algorithm, progress | {"args": records_args(self.run.args)})

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; records that it does not know of are dropped."""
        self.recorded = records.truncate(self.run.output_dir, state["step"] if state else -1)
        if state is None:
            return
        self.algorithm.load_training_state(state["algorithm"])
        if self.average is not None:
            self.average.load_state(state["average"])
        self.step, self.best, self.seconds_before = state["step"], state["best"], state["elapsed_s"]
        self.since.values.update({} if self.step in self.recorded else state["since"])
        print(f"Resumed after step {self.step}")

    def elapsed_s(self) -> float:
        """Wall-clock seconds of the run, over all times that it was resumed."""
        return self.seconds_before + time.time() - self.started


def find_before(run: Plan) -> dict[str, Any] | None:
    """The checkpoint in the run's folder, if any; `UsageError` where the folder holds another run."""
    # DEVIATION: DomainBed appends a second run to the records of the first.
    state = checkpoint.load(run.output_dir)
    written = records.load_run(run.output_dir)
    if state or written:
        there = state["args"] if state else written[0].get("args", {})
        checkpoint.check_same_run(run.output_dir, there, records_args(run.args))
    return state


def records_args(args: RunArgs) -> dict[str, Any]:
    """The arguments as records have them."""
    return {key: checkpoint.plain(value) for key, value in asdict(args).items()}


def validation(record: dict[str, Any], train_envs: list[int]) -> float:
    """Training-domain validation: mean accuracy on the `out` splits of the training environments."""
    return float(np.mean([record.get(f"env{i}_out_acc", math.nan) for i in train_envs]))


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def untrained(recipe: Recipe, seed: int) -> Algorithm:
    """The algorithm as a run of this seed starts, on the CPU: what has random weights has the same."""
    seed_everything(seed)
    return build(recipe)
