"""The tables of recipes on small photographs: what every row says is a configuration."""

import pytest

from benchmarks.accuracy.photo_tables import TABLES
from tests.conftest import ROOT
from vitcomposer import config

ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_makes_a_configuration(name: str, row: str) -> None:
    table = TABLES[name]
    assert table.baseline in table.rows
    after = table.rows[row].after
    assert after is None or list(table.rows).index(after) < list(table.rows).index(row), "it starts from a row before"
    keys = {**table.shared, **table.rows[row].keys}
    config.load(ROOT / table.rows[row].yaml, [f"{key}={value}" for key, value in keys.items()])
