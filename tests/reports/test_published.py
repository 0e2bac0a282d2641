from domainbed_hp.registry import DATASETS
from domainbed_hp.reports import published
from domainbed_hp.reports.published import load_published, make_published_tables


def test_every_row_has_a_source_that_is_named_and_accuracies_in_percent():
    sources, rows = load_published()
    assert len(rows) == 41 and len({(row.method, row.source) for row in rows}) == 41
    for row in rows:
        assert set(row.source.split(", ")) <= sources.keys(), row
        assert row.accs and all(20 < acc < 100 for acc in row.accs.values()), row
        assert set(row.errs) <= set(row.accs) - {"Avg"}, row
        assert row.weights and row.target and row.selection
    assert set(published.DATASETS) <= set(DATASETS)


def test_averages_are_those_of_the_five_data_sets_as_far_as_sources_round():
    """A wrong digit in a row with all five data sets makes its average wrong."""
    for row in load_published()[1]:
        five = [row.accs[name] for name in published.DATASETS if name in row.accs]
        if len(five) == 5 and "Avg" in row.accs:
            assert abs(sum(five) / 5 - row.accs["Avg"]) < 0.11, row


def test_environments_agree_with_their_average():
    for row in load_published()[1]:
        for dataset, accs in row.environments.items():
            assert abs(sum(accs) / len(accs) - row.accs[dataset]) < 0.06


def test_only_columns_that_are_asked_for():
    (averages,) = make_published_tables({"OfficeHome": "ACPR", "Mine": "01"})
    assert averages.columns == ("OfficeHome", "Avg")
    line = next(line for line in averages.format_lines() if line[0] == "AHP")
    assert line[1:] == ["87.0", "78.2", "A", "OpenAI", "not stated", "not stated"]
    assert "CORAL (DPL)" in [row.method for row in averages.rows]
    assert make_published_tables({"Mine": "01"}) == []


def test_notes_name_the_sources_that_are_used():
    environments, averages = make_published_tables({"PACS": "ACPS"})
    assert [line[:5] for line in environments.format_lines()][1] == ["MIRO", "95.6", "96.6", "99.7", "90.7"]
    assert environments.list_notes()[0].startswith("Sources: M: MIRO") and "; A:" not in environments.list_notes()[0]
    assert "MIRO (M): " not in averages.list_notes()[1] and "TA-IB (T): unverified" in averages.list_notes()[1]
    assert next(line for line in averages.format_lines() if line[0] == "MIRO")[1] == "95.6 ± 0.8"
