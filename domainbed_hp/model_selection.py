"""Rules of model selection: which run and which checkpoint stand for a trial. The three are DomainBed's.

A new rule is a subclass of `SelectionMethod` and one line of `registry.SELECTION_RULES`.
"""

import numpy as np
import pandas as pd

from domainbed_hp.registry import SELECTION_RULES, load

GROUP = ["row", "dataset", "trial_seed", "test_env"]
"""Columns of a group of records, in which a rule chooses a run (hparams_seed) and a step."""


class SelectionMethod:
    """A rule of model selection. It is never instantiated, as in DomainBed."""

    key: str
    """The name on the command line, as in `registry.SELECTION_RULES`."""
    name: str
    """The name that is printed."""
    num_test_envs: tuple[int, ...] = (1,)
    """Numbers of test environments of the runs that the rule reads."""

    @classmethod
    def candidates(cls, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the records that the rule may choose, from the `frame` of `reports.load.CollectedRuns`.

        New columns are `test_env` (index), `test_acc` (the accuracy that counts) and `val_acc` (the score: the highest
        is chosen), both in [0, 1].
        """
        raise NotImplementedError

    @classmethod
    def explain(cls, frame: pd.DataFrame) -> str:
        """Return the reason why records of complete runs may have no candidate, for a note; "" for none."""
        return ""

    @classmethod
    def select(cls, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the best candidate of each group; a group without candidates has none."""
        return cls.rank_runs(frame).drop_duplicates(GROUP).sort_values(GROUP, ignore_index=True)

    @classmethod
    def rank_runs(cls, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the best candidate of each hparams_seed of each group, best first.

        Among equal `val_acc`, a higher hparams_seed comes first, then an earlier step. NaN comes last.
        """
        # DEVIATION: among the steps of one run, DomainBed's max() would keep a NaN that comes first.
        order = ["val_acc", "hparams_seed", "step"]
        ranked = cls.candidates(frame).sort_values(order, ascending=[False, False, True], na_position="last")
        return ranked.drop_duplicates([*GROUP, "hparams_seed"])


def load_selection_methods() -> list[type[SelectionMethod]]:
    return [load(SELECTION_RULES, "selection_rule", key) for key in SELECTION_RULES]


class IIDAccuracy(SelectionMethod):
    """Training-domain validation: `val_acc` is the mean of env{i}_out_acc over the training environments i."""

    key = "iid"
    name = "training-domain validation set"

    @classmethod
    def candidates(cls, frame: pd.DataFrame) -> pd.DataFrame:
        single = take_single(frame)
        out = stack_accs(single, "out")  # (records, envs)
        env = np.arange(out.shape[1])
        used = (env < single["num_envs"].to_numpy()[:, None]) & (env != single["test_env"].to_numpy()[:, None])
        return single.assign(val_acc=np.where(used, out, 0).sum(axis=1) / used.sum(axis=1))


class LeaveOneOut(SelectionMethod):
    """Leave-one-domain-out cross-validation over the training environments v of a run that left out t.

    `val_acc` is the mean over v of env{v}_in_acc of the run that left out {t, v}, at the same step. A step is a
    candidate only if all these pairs recorded it, and the run that left out t alone recorded it once.
    """

    key = "leave_one_out"
    name = "leave-one-domain-out cross-validation"
    num_test_envs = (1, 2)

    @classmethod
    def explain(cls, frame: pd.DataFrame) -> str:
        if (frame["test_envs"].map(len) == 2).any():
            return "finds no step that a run and its pairs recorded once"
        return "needs runs with two test environments, and there are none (a sweep with single_test_envs makes none)"

    @classmethod
    def candidates(cls, frame: pd.DataFrame) -> pd.DataFrame:
        same = ["row", "dataset", "trial_seed", "hparams_seed", "step"]
        frame = frame.assign(together=frame.groupby(same, sort=False).ngroup())  # one number for a run and its pairs
        pairs = frame[frame["test_envs"].map(len) == 2]
        single = take_single(frame).drop_duplicates(["together", "test_env"], keep=False)
        if pairs.empty or single.empty:
            return single.iloc[:0].assign(val_acc=0.0)
        env = np.arange(stack_accs(frame, "in").shape[1])

        def make_index(together: np.ndarray, t: np.ndarray, v: np.ndarray) -> np.ndarray:
            """Return (together, t, v) as one number."""
            return np.asarray((together * len(env) + t) * len(env) + v)

        # env{v}_in_acc of the run that left out t and v, sorted by the index of (together, t, v).
        a, b = np.array([*pairs["test_envs"]]).T
        together, accs, record = pairs["together"].to_numpy(), stack_accs(pairs, "in"), np.arange(len(pairs))
        both_orders = np.concatenate([make_index(together, a, b), make_index(together, b, a)])
        indices, first = np.unique(both_orders, return_index=True)
        left_out = np.concatenate([accs[record, b], accs[record, a]])[first]

        t = single["test_env"].to_numpy()[:, None]
        other = (env != t) & (env < single["num_envs"].to_numpy()[:, None])  # (records, envs)
        wanted = make_index(single["together"].to_numpy()[:, None], t, env)  # (records, envs)
        at = np.searchsorted(indices, wanted).clip(max=len(indices) - 1)
        complete: np.ndarray = ((indices[at] == wanted) | ~other).all(axis=1)
        total = np.zeros(len(single))
        for v in env:  # in DomainBed's order: sums that are equal there must be equal here
            total += np.where(other[:, v], left_out[at[:, v]], 0)
        return single[complete].assign(val_acc=(total / other.sum(axis=1))[complete])


class Oracle(SelectionMethod):
    """Test-domain validation: `val_acc` is env{t}_out_acc of the test environment t, at the last checkpoint only."""

    key = "oracle"
    name = "test-domain validation set (oracle)"

    @classmethod
    def candidates(cls, frame: pd.DataFrame) -> pd.DataFrame:
        single = take_single(frame).sort_values("step", kind="stable")
        last = single.drop_duplicates([*GROUP, "hparams_seed"], keep="last")
        return last.assign(val_acc=stack_accs(last, "out")[np.arange(len(last)), last["test_env"]])


def take_single(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the records of runs with one test environment t, with `test_env` = t and `test_acc` = env{t}_in_acc."""
    single = frame[frame["test_envs"].map(len) == 1]
    test_env = single["test_envs"].map(lambda envs: envs[0]).to_numpy(dtype=int)
    return single.assign(test_env=test_env, test_acc=stack_accs(single, "in")[np.arange(len(single)), test_env])


def stack_accs(frame: pd.DataFrame, split: str) -> np.ndarray:
    """Return env{i}_{split}_acc of all environments i, (records, envs); NaN where a record has none."""
    num_envs = int(frame["num_envs"].max()) if len(frame) else 0
    return frame.reindex(columns=[f"env{i}_{split}_acc" for i in range(num_envs)]).to_numpy(dtype=float)
