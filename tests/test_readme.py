"""What README.md says of the tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_reliability_table_says_how_many_named_tests_there_are() -> None:
    whole = (ROOT / "README.md").read_text()
    table = whole.split("## Nothing lost, nobody let in")[1].split("\n## ")[0]
    said = {name: int(number) for name, number in re.findall(r"`(test_\w+)` (\d+)", table)}
    assert said == {name: count(name) for name in re.findall(r"`(test_\w+)`", table)}
    assert f"{sum(said.values())} named tests" in table


def count(name: str) -> int:
    """The test functions of a file; one may run with several parameters and databases."""
    return len(re.findall(r"^def test_", (ROOT / f"tests/{name}.py").read_text(), re.MULTILINE))
