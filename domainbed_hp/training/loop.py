"""The training loop of one run, which resumes where it was stopped."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from domainbed_hp import records
from domainbed_hp.algorithms.base import Metrics, Minibatch
from domainbed_hp.datasets.loading.loader import EvalLoader, make_eval_loaders
from domainbed_hp.datasets.loading.prefetch import ThreadPool
from domainbed_hp.files import remove_temporary_files
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.run_dir import BEST_MODEL, CHECKPOINT, DONE, MODEL, OUT, STEP_MODEL, RunLock
from domainbed_hp.seeds import seed_hash
from domainbed_hp.training import evaluation
from domainbed_hp.training.checkpoint import Stopped, StopSignals, catch_stop_signals, find_checkpoint, save_checkpoint
from domainbed_hp.training.cuda_graph import speed_up_training
from domainbed_hp.training.evaluation import EVAL_BATCH, MetricLog, evaluation_mode
from domainbed_hp.training.feature_cache import load_features
from domainbed_hp.training.model_io import build_algorithm, save_model, seed_everything
from domainbed_hp.training.run_log import copy_stdout, find_versions, print_header, print_row
from domainbed_hp.training.setup import RunSetup, set_up_run
from domainbed_hp.training.sharpness import make_perturbation
from domainbed_hp.training.weight_averaging import make_weight_average, swap_weights

DIAGNOSED_IMAGES = 64
"""Number of validation images of each environment that `Algorithm.diagnose` gets."""


def train(args: RunArgs, lock: RunLock | None = None) -> None:
    """Train one algorithm on all environments but `test_envs`, score it on all of them, write to `output_dir`.

    On the CPU, a resumed run ends with the same records and weights, bit for bit, as one that was never stopped.
    `lock` is the lock on `output_dir`, if the caller holds it already.

    Raises:
        UsageError: the arguments do not fit, or the GPU's memory is too small.
        RunTaken: the run is done, or another process works on it.
        SystemExit: 128 + its number after SIGINT, SIGTERM or SIGUSR1; a checkpoint is written once a step is done.
    """
    run = set_up_run(args)
    with contextlib.ExitStack() as stack:
        lock = lock or stack.enter_context(RunLock(run.output_dir))
        remove_temporary_files(run.output_dir)
        checkpoint = find_checkpoint(run.output_dir, asdict(args))
        stack.enter_context(copy_stdout(run.output_dir / OUT))
        threads = stack.enter_context(ThreadPool(run.num_workers))
        stop = stack.enter_context(catch_stop_signals())
        print_header(asdict(args), run.hparams, find_versions(run.device))
        print(f"Images: {run.dataset.source}")
        loop: TrainingLoop | None = None
        try:
            loop = TrainingLoop(run, lock, threads, stop)
            loop.resume(checkpoint)
            loop.train()
        except Stopped as stopped:
            if loop:
                loop.save_checkpoint()
            where = f"after step {loop.step}" if loop else "before any step"
            print(f"{stopped}: stopped {where}; the same command resumes the run", flush=True)
            raise SystemExit(128 + stopped.number) from None


class TrainingLoop:
    """The state of a run in training: its algorithm, loaders, metrics and weight average."""

    def __init__(self, run: RunSetup, lock: RunLock, threads: ThreadPool, stop: StopSignals) -> None:
        self.run, self.lock, self.threads, self.stop = run, lock, threads, stop
        self.step = -1
        """The last step that is done."""
        self.metrics = MetricLog(run.device)
        self.recorded: list[int] = []
        """Steps that have a record."""
        self.best_accuracy = -math.inf
        """Highest validation accuracy of a record, for `--keep best`."""
        self.started, self.elapsed_before_s = time.time(), 0.0
        self.columns: list[str] = []

        self.algorithm = build_algorithm(run.model_spec, run.args.seed).to(run.device)
        trainable = [p for p in self.algorithm.parameters() if p.requires_grad]
        self.num_trainable = sum(p.numel() for p in trainable)
        self.average = make_weight_average(trainable, run.hparams, run.steps)
        self.perturb = make_perturbation(self.algorithm, run.hparams)
        speed_up_training(self.algorithm, run.device, run.args.compile, run.steps)
        bf16 = run.args.precision == "bf16"
        # Without a cache, since a cached cast would not follow a weight that a perturbation changes in place.
        self.cast = torch.autocast(run.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

        batch_size, limit = EVAL_BATCH["cuda" if run.on_gpu else "cpu"], run.args.eval_images
        with evaluation_mode(self.algorithm), self.cast, stop.raise_immediately():
            features = load_features(run, self.algorithm, batch_size, threads)
        environments = features or run.dataset.environments
        if run.preprocess.augmentation == "none":
            self.run = run.with_environments(environments)
        images = environments, run.scored_splits
        self.eval_loaders = make_eval_loaders(*images, batch_size, threads, max_images=limit, pin=run.on_gpu)
        count = min(DIAGNOSED_IMAGES, limit or DIAGNOSED_IMAGES)
        loaders = [EvalLoader(environments[i], run.splits[i]["out"][:count], count) for i in run.train_envs]
        self.diagnosed = [loader[0].to(run.device, run.preprocess) for loader in loaders if len(loader)]
        with evaluation_mode(self.algorithm), self.cast:
            self.algorithm.diagnose(self.diagnosed)  # before training, so that the method can fix its scales

    def train(self) -> None:
        """Do the steps that are left, save the model and mark the run as done."""
        if self.is_record_due():
            self.record()
        self.metrics.restart_timer()
        for step, minibatches, unlabeled in self.load_batches():
            seed_everything(seed_hash(self.run.args.seed, "update", step))  # dropout is a function of the step
            self.metrics.add(self.update(step, minibatches, unlabeled))
            if self.average is not None:
                self.average.step()
            self.step = step
            if self.is_record_due():
                self.record()
            self.stop.check()
        if not self.run.args.skip_model_save:
            self.save_model(MODEL)
        self.lock.check()
        (self.run.output_dir / DONE).write_text("done")
        (self.run.output_dir / CHECKPOINT).unlink(missing_ok=True)

    def load_batches(self) -> Iterator[tuple[int, list[Minibatch], list[Tensor] | None]]:
        """Yield the number of every step that is left, its minibatches and its unlabeled images, on the device."""
        run, steps = self.run, range(self.step + 1, self.run.steps)
        labeled, unlabeled = run.make_train_loader(), run.make_unlabeled_loader()
        batches = zip(
            steps,
            self.threads.map(labeled.__getitem__, steps),
            self.threads.map(unlabeled.__getitem__, steps) if unlabeled else [None] * len(steps),
            strict=True,
        )
        for step, pairs, images in tqdm(batches, total=run.steps, initial=steps.start, disable=None, unit="step"):
            minibatches = [batch.to(run.device, run.preprocess) for batch in pairs]
            x = None if images is None else [batch.to(run.device, run.preprocess)[0] for batch in images]
            yield step, minibatches, x

    def update(self, step: int, minibatches: list[Minibatch], unlabeled: list[Tensor] | None) -> Metrics:
        """Do one update of the algorithm and return its metrics."""
        try:
            with self.cast, self.perturb(minibatches):
                return self.algorithm.update(minibatches, unlabeled)
        except torch.cuda.OutOfMemoryError as error:
            parts = "a larger accumulate, " if "accumulate" in self.run.hparams else ""
            hint = f"try {parts}a smaller batch_size, --precision bf16, or --compile off"
            raise UsageError(f"out of GPU memory at step {step}: {hint} ({error})") from error

    def is_record_due(self) -> bool:
        """Return True if the last step needs a record and has none."""
        step = self.step
        at_checkpoint = step % self.run.checkpoint_freq == 0 or step == self.run.steps - 1
        return step >= 0 and at_checkpoint and step not in self.recorded

    def record(self) -> None:
        """Append a record of the last step, and save models and the checkpoint."""
        self.metrics.read(self.step)
        self.validate_average()
        record = self.make_record()
        self.lock.check()
        self.columns = print_row(record, self.columns)
        records.append_record(self.run.output_dir, record)
        self.recorded.append(self.step)
        self.save_models(record)
        self.save_checkpoint()  # with the metrics: if the record is lost, a resumed run writes it again
        self.metrics.clear()

    def make_record(self) -> dict[str, Any]:
        """Score all splits and return the record of the last step."""
        run = self.run
        with self.use_averaged_weights(), self.stop.raise_immediately(), evaluation_mode(self.algorithm), self.cast:
            scores = self.score(self.eval_loaders)
            diagnosis = self.algorithm.diagnose(self.diagnosed)
        return {
            "step": self.step,
            "epoch": self.step / run.steps_per_epoch,
            **self.metrics.compute_means(),
            **evaluation.make_score_columns(scores, run.train_envs),
            **diagnosis,
            "mem_gb": torch.cuda.max_memory_allocated(run.device) / 2**30 if run.on_gpu else 0.0,
            "args": asdict(run.args),
            "hparams": run.hparams,
            "versions": find_versions(run.device),
            "elapsed_s": self.elapsed_s,
            "image_size": run.preprocess.size,
            "trainable_params": self.num_trainable,
            "protocol": run.protocol,
        }

    def validate_average(self) -> None:
        """Give the validation loss of the current weights, once per record, to an average that needs it."""
        if self.average is None or not self.average.VALIDATES or "raw_val_loss" in self.metrics.values:
            return
        names = [name for i in self.run.train_envs if (name := f"env{i}_out") in self.eval_loaders]
        with self.stop.raise_immediately(), evaluation_mode(self.algorithm), self.cast:
            loss = evaluation.compute_validation_loss(self.score(names), self.run.train_envs)
        self.metrics.values["raw_val_loss"].append(loss)
        self.average.add_validation_loss(loss)  # outside the context, so that no signal interrupts it

    def score(self, names: Iterable[str]) -> dict[str, evaluation.SplitScore]:
        """Score the splits called `names`."""
        where = self.run.device, self.run.preprocess
        return {name: evaluation.score_split(self.algorithm, self.eval_loaders[name], *where) for name in names}

    def use_averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the algorithm has the weights to score and save: the average's, if there is one."""
        if self.average is None:
            return contextlib.nullcontext()
        return swap_weights(self.average.parameters, self.average.compute_weights())

    def save_models(self, record: dict[str, Any]) -> None:
        """Save the models that the flags ask for at a record."""
        args, accuracy = self.run.args, evaluation.compute_validation_accuracy(record, self.run.train_envs)
        if args.save_model_every_checkpoint and not args.skip_model_save:
            self.save_model(STEP_MODEL.format(step=self.step))
        if args.keep == "best" and not args.skip_model_save and accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.save_model(BEST_MODEL)

    def save_model(self, name: str) -> None:
        run = self.run
        self.lock.check()
        with self.use_averaged_weights():
            save_model(run.output_dir / name, self.algorithm, run.model_spec, full=run.args.save == "full")

    def save_checkpoint(self) -> None:
        """Write the state after the last step."""
        if self.step < 0:  # nothing is done
            return
        self.metrics.read(self.step)
        self.lock.check()
        progress = {
            "step": self.step,
            "since": dict(self.metrics.values),
            "best": self.best_accuracy,
            "elapsed_s": self.elapsed_s,
            "average": self.average and self.average.state_dict(),
            "args": asdict(self.run.args),
        }
        save_checkpoint(self.run.output_dir, self.algorithm, progress)

    def resume(self, checkpoint: dict[str, Any] | None) -> None:
        """Restore the state of a checkpoint, or of the start without one; remove the records of later steps."""
        self.lock.check()
        self.recorded = records.truncate_records(self.run.output_dir, checkpoint["step"] if checkpoint else -1)
        if checkpoint is None:
            return
        self.algorithm.load_training_state(checkpoint["algorithm"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        self.step, self.best_accuracy = checkpoint["step"], checkpoint["best"]
        self.elapsed_before_s = checkpoint["elapsed_s"]
        if self.step not in self.recorded:
            self.metrics.values.update(checkpoint["since"])
        print(f"Resumed after step {self.step}")

    @property
    def elapsed_s(self) -> float:
        """Wall-clock seconds of the run, without the time between a stop and the next start."""
        return self.elapsed_before_s + time.time() - self.started
