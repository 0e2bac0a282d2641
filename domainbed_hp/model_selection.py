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
    same = ["row", "dataset", "trial_seed", "hparams_seed", "step"]
    frame = frame.assign(together=frame.groupby(same, sort=False).ngroup())  # a number for a run and its pairs
    pairs = frame[frame["test_envs"].map(len) == 2]
    single = _single(frame).drop_duplicates(["together", "test_env"], keep=False)
    if pairs.empty or single.empty:
        return single.iloc[:0].assign(val_acc=0.0)
    env = np.arange(_accs(frame, "in").shape[1])

    def place(together: np.ndarray, t: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(together, t, v) as one number."""
        found: np.ndarray = (together * len(env) + t) * len(env) + v
        return found

    # env{v}_in_acc where t and v were left out, by place.
    a, b = np.array([*pairs["test_envs"]]).T
    together, accs, record = pairs["together"].to_numpy(), _accs(pairs, "in"), np.arange(len(pairs))
    places, first = np.unique(np.concatenate([place(together, a, b), place(together, b, a)]), return_index=True)
    left_out = np.concatenate([accs[record, b], accs[record, a]])[first]

    t = single["test_env"].to_numpy()[:, None]
    other = (env != t) & (env < single["num_envs"].to_numpy()[:, None])  # (records, envs)
    wanted = place(single["together"].to_numpy()[:, None], t, env)
    at = np.searchsorted(places, wanted).clip(max=len(places) - 1)
    complete: np.ndarray = ((places[at] == wanted) | ~other).all(axis=1)
    total = np.zeros(len(single))
    for v in env:  # in this order: sums that DomainBed finds equal must be
        total += np.where(other[:, v], left_out[at[:, v]], 0)
    return single[complete].assign(val_acc=(total / other.sum(axis=1))[complete])


def _oracle(frame: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint only; val_acc = env{t}_out_acc, which looks at the test environment."""
    last = _single(frame).sort_values("step", kind="stable").drop_duplicates([*GROUP, "hparams_seed"], keep="last")
    return last.assign(val_acc=_accs(last, "out")[np.arange(len(last)), last["test_env"]])


IIDAccuracy = SelectionMethod("training-domain validation set", _iid)
LeaveOneOut = SelectionMethod("leave-one-domain-out cross-validation", _leave_one_out)
Oracle = SelectionMethod("test-domain validation set (oracle)", _oracle)
METHODS = (IIDAccuracy, LeaveOneOut, Oracle)
