"""What a sweep asks for, checked before its first job: names, hparams and their types, data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_hp import registry
from domainbed_hp.registry import UsageError
from domainbed_hp.sweep.spec import Row, SweepSpec


def resolve_rows(spec: SweepSpec) -> tuple[Row, ...]:
    """The rows with every hparam that applies to them, checked for all data sets; imports the algorithms.

    Later wins: the spec's general hparams that the algorithm knows, those for this algorithm, the row's own.
    `UsageError` for a name that no algorithm of the sweep knows, and for a value of the wrong type.
    """
    from domainbed_hp import hparams_registry
    from domainbed_hp.datasets.open import find_spec
    from domainbed_hp.plugins import import_plugin

    for module in spec.imports:
        import_plugin(module)
    for name in spec.datasets:
        find_spec(name, spec.data_dir)
    algorithms = list(dict.fromkeys(row.algorithm for row in spec.rows))
    general = {key: value for key, value in spec.hparams.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in spec.hparams.items() if isinstance(value, dict)}
    for name in tables:
        if name not in algorithms:
            raise registry.unknown_name("algorithm with [hparams] of its own", name, algorithms)
    known = [known_to(row, spec, {**general, **tables.get(row.algorithm, {}), **row.hparams}) for row in spec.rows]
    for name in general:
        if not any(name in names for names in known):
            raise registry.unknown_name("hparam", name, sorted(set().union(*known)))

    rows = []
    for row, names in zip(spec.rows, known, strict=True):
        of_kind = [k for other, k in zip(spec.rows, known, strict=True) if other.algorithm == row.algorithm]
        elsewhere = set().union(*of_kind) - names  # e.g. prompt_tokens for the rows of FrozenCLIP that have prompts
        own = {k: v for k, v in tables.get(row.algorithm, {}).items() if k not in elsewhere}
        hparams = {name: value for name, value in general.items() if name in names} | own | row.hparams
        for dataset in spec.datasets:
            try:
                found = hparams_registry.resolve_hparams(row.algorithm, dataset, spec.n_hparams_from, 0, hparams)
                hparams_registry.check_validation_images(found, spec.holdout_fraction > 0)
            except UsageError as error:
                raise UsageError(f"{row.name} on {dataset}: {error}") from error
        rows.append(replace(row, hparams=hparams))
    return tuple(rows)


def known_to(row: Row, spec: SweepSpec, choices: Mapping[str, Any]) -> set[str]:
    """The hparams that a row knows: a choice such as prompt=coop brings hparams of its own."""
    from domainbed_hp import hparams_registry

    try:
        return {
            name
            for dataset in spec.datasets
            for name in hparams_registry.known_hparams(row.algorithm, dataset, choices)
        }
    except UsageError as error:
        raise UsageError(f"{row.name}: {error}") from error


def check_data(spec: SweepSpec, rows: Sequence[Row]) -> None:
    """`UsageError` where a data set cannot be opened; says on stderr where prepared data is out of date."""
    from domainbed_hp.algorithms import get_algorithm_class
    from domainbed_hp.datasets.open import find_spec, open_dataset
    from domainbed_hp.hparams_registry import resolve_hparams

    for dataset in [find_spec(name, spec.data_dir) for name in spec.datasets]:
        if dataset.build is not None:  # what is made cannot be missing
            continue
        hparams = [resolve_hparams(row.algorithm, dataset.name, spec.n_hparams_from, 0, row.hparams) for row in rows]
        classes = [get_algorithm_class(row.algorithm) for row in rows]
        for preprocess in {c.preprocess(h, dataset.image_size) for c, h in zip(classes, hparams, strict=True)}:
            open_dataset(dataset, Path(spec.data_dir) if spec.data_dir else None, preprocess)
