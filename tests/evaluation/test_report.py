from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ldm.evaluation.report import table, write_json


def test_a_table_is_aligned_markdown() -> None:
    assert table(["a", "value"], [["x", 0.12345], ["long", 3]]) == (
        "| a    | value |\n|------|-------|\n| x    | 0.123 |\n| long | 3     |\n"
    )


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="give one a column"):
        table(["a", "b"], [["x"]])


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": [1, 0.5], "ü": None})
    with pytest.raises(ValueError, match=r"result\.json: a result is NaN"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text("utf-8")) == {"a": [1, 0.5], "ü": None}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
