"""DomainBed's three rules (model_selection.py there): which run and checkpoint stands for a trial.

A rule sees the records of one (row, dataset, trial_seed, test_env), scores (hparams_seed, step) by `val_acc`, and the
best one's `test_acc` = env{t}_in_acc counts. Input is the frame of `reports.collected`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

GROUP = ["row", "dataset", "trial_seed", "test_env"]
CHOICE = [*GROUP, "hparams_seed", "step", "val_acc", "test_acc"]


@dataclass(frozen=True)
class SelectionMethod:
    """A rule: its printed name, and the candidates that it scores."""

    name: str
    candidates: Callable[[pd.DataFrame], pd.DataFrame]

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The best candidate of each group, columns `CHOICE`; a group without candidates has no row."""
        return self.ranked(frame).drop_duplicates(GROUP).sort_values(GROUP, ignore_index=True)

    def ranked(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The best step of each hparams_seed of each group, best first, columns `CHOICE`.

        Equal `val_acc`: the higher hparams_seed, then the earlier step. NaN counts as -inf.
        """
        # DEVIATION: among the steps of one run, DomainBed's max() would keep a NaN that comes first.
        order = ["val_acc", "hparams_seed", "step"]
        found = self.candidates(frame).sort_values(order, ascending=[False, False, True], na_position="last")
        return found.drop_duplicates([*GROUP, "hparams_seed"])[CHOICE]


def _accs(frame: pd.DataFrame, split: str) -> np.ndarray:
    """env{i}_{split}_acc of all environments, NaN where there is none. Shape (records, envs)."""
    num_envs = int(frame["num_envs"].max()) if len(frame) else 0
    return frame.reindex(columns=[f"env{i}_{split}_acc" for i in range(num_envs)]).to_numpy(dtype=float)


def _single(frame: pd.DataFrame) -> pd.DataFrame:
    """The records of runs with one test environment, with `test_env` and `test_acc`."""
    single = frame[frame["test_envs"].map(len) == 1]
    test_env = single["test_envs"].map(lambda envs: envs[0]).to_numpy(dtype=int)
    return single.assign(test_env=test_env, test_acc=_accs(single, "in")[np.arange(len(single)), test_env])


def _iid(frame: pd.DataFrame) -> pd.DataFrame:
    """All checkpoints; val_acc = mean of env{i}_out_acc over the training environments i."""
    single = _single(frame)
    out = _accs(single, "out")  # (records, envs)
    env = np.arange(out.shape[1])
    used = (env < single["num_envs"].to_numpy()[:, None]) & (env != single["test_env"].to_numpy()[:, None])
    return single.assign(val_acc=np.where(used, out, 0).sum(axis=1) / used.sum(axis=1))


def _leave_one_out(frame: pd.DataFrame) -> pd.DataFrame:
    """val_acc = mean over the other environments v of env{v}_in_acc of the run that left out both {t, v}, same step.

    Only where all these pairs exist, and one record of the run that left out t alone.
    """
    together = frame.groupby(["row", "dataset", "trial_seed", "hparams_seed", "step"], sort=False).ngroup()
    frame = frame.assign(together=together)  # a number for what must be equal in a run and its pairs
    pairs = frame[frame["test_envs"].map(len) == 2]
    left_out: dict[tuple[int, int, int], float] = {}  # (together, t, v) -> env{v}_in_acc
    for key, (a, b), accs in zip(pairs["together"], pairs["test_envs"], _accs(pairs, "in").tolist(), strict=True):
        left_out[key, a, b], left_out[key, b, a] = accs[b], accs[a]
    single = _single(frame).drop_duplicates(["together", "test_env"], keep=False)
    complete, val_accs = [], []
    for key, t, num_envs in zip(single["together"], single["test_env"], single["num_envs"], strict=True):
        others = [(key, t, v) for v in range(num_envs) if v != t]
        complete.append(all(other in left_out for other in others))
        if complete[-1]:
            val_accs.append(sum(left_out[other] for other in others) / len(others))
    return single[np.array(complete, dtype=bool)].assign(val_acc=np.array(val_accs, dtype=float))


def _oracle(frame: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint only; val_acc = env{t}_out_acc, which looks at the test environment."""
    last = _single(frame).sort_values("step", kind="stable").drop_duplicates([*GROUP, "hparams_seed"], keep="last")
    return last.assign(val_acc=_accs(last, "out")[np.arange(len(last)), last["test_env"]])


IIDAccuracy = SelectionMethod("training-domain validation set", _iid)
LeaveOneOut = SelectionMethod("leave-one-domain-out cross-validation", _leave_one_out)
Oracle = SelectionMethod("test-domain validation set (oracle)", _oracle)
METHODS = (IIDAccuracy, LeaveOneOut, Oracle)
