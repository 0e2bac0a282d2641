"""Check a sweep before its first job: names, hparams and their types, data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_hp import registry
from domainbed_hp.plugins import import_plugins
from domainbed_hp.registry import UsageError
from domainbed_hp.sweep.spec import Row, SweepSpec


def resolve_rows(spec: SweepSpec) -> tuple[Row, ...]:
    """Return the rows with all their hparams, checked on every data set. The algorithms are imported.

    A row's own hparams win over the spec's for its algorithm, and these over the spec's general ones.

    Raises:
        UsageError: a name that no algorithm of the sweep knows, or a value of the wrong type or out of range.
    """
    from domainbed_hp import hparams_registry
    from domainbed_hp.datasets.open import find_spec

    import_plugins(spec.run_args.imports)
    for name in spec.datasets:
        find_spec(name, spec.run_args.data_dir)
    algorithms = list(dict.fromkeys(row.algorithm for row in spec.rows))
    general = {key: value for key, value in spec.hparams.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in spec.hparams.items() if isinstance(value, dict)}
    for name in tables:
        if name not in algorithms:
            raise registry.unknown_name("algorithm in [hparams]", name, algorithms)
    known = [list_hparams(row, spec, {**general, **tables.get(row.algorithm, {}), **row.hparams}) for row in spec.rows]
    for name in general:
        if not any(name in names for names in known):
            raise registry.unknown_name("hparam", name, sorted(set().union(*known)))

    rows = []
    for row, names in zip(spec.rows, known, strict=True):
        # Hparams of an algorithm may be for some of its rows only: prompt_tokens for rows with learned prompts.
        same = [k for other, k in zip(spec.rows, known, strict=True) if other.algorithm == row.algorithm]
        others = set().union(*same) - names
        own = {k: v for k, v in tables.get(row.algorithm, {}).items() if k not in others}
        hparams = {name: value for name, value in general.items() if name in names} | own | row.hparams
        for dataset in spec.datasets:
            try:
                resolved = hparams_registry.resolve_hparams(row.algorithm, dataset, spec.n_hparams_from, 0, hparams)
                hparams_registry.check_validation_images(resolved, spec.run_args.holdout_fraction > 0)
            except UsageError as error:
                raise UsageError(f"{row.name} on {dataset}: {error}") from error
        rows.append(replace(row, hparams=hparams))
    return tuple(rows)


def list_hparams(row: Row, spec: SweepSpec, choices: Mapping[str, Any]) -> set[str]:
    """Return the names of a row's hparams under its `choices`; prompt=coop, for example, brings more hparams."""
    from domainbed_hp.hparams_registry import known_hparams

    try:
        return set().union(*(known_hparams(row.algorithm, dataset, choices) for dataset in spec.datasets))
    except UsageError as error:
        raise UsageError(f"{row.name}: {error}") from error


def check_data(spec: SweepSpec, rows: Sequence[Row]) -> None:
    """Open every data set. `UsageError` where one is not there; a note on stderr where prepared data is out of date."""
    from domainbed_hp.algorithms import get_algorithm_class
    from domainbed_hp.datasets.open import find_spec, open_dataset
    from domainbed_hp.hparams_registry import resolve_hparams

    data_dir = spec.run_args.data_dir
    for dataset in [find_spec(name, data_dir) for name in spec.datasets]:
        if dataset.build is not None:  # it needs no files
            continue
        hparams = [resolve_hparams(row.algorithm, dataset.name, spec.n_hparams_from, 0, row.hparams) for row in rows]
        classes = [get_algorithm_class(row.algorithm) for row in rows]
        for preprocess in {c.preprocess(h, dataset.image_size) for c, h in zip(classes, hparams, strict=True)}:
            open_dataset(dataset, Path(data_dir) if data_dir else None, preprocess)
