"""What an overload came to is told, however bad it was."""

import pytest

from benchmarks.overload import Answer, figures, report

GOOD = [Answer(sent=float(number), took=1.0, status=200) for number in range(4)]
REFUSED = Answer(sent=0.0, took=0.01, status=429)
LATE = Answer(sent=0.0, took=13.0, status=504)


@pytest.mark.parametrize(
    ("answers", "goodput", "refused", "late"),
    [
        ([*GOOD, REFUSED], "1.0 (50% of the most)", "10.0 / 10.0 ms", "0, the longest took 1.00 s"),
        (GOOD, "1.0 (50% of the most)", "none", "0, the longest took 1.00 s"),
        ([LATE, REFUSED], "0.0 (0% of the most)", "10.0 / 10.0 ms", "1, the longest took 13.00 s"),
        ([REFUSED], "0.0 (0% of the most)", "10.0 / 10.0 ms", "0, the longest took 0.00 s"),
    ],
    ids=["as it should be", "nothing refused", "nothing answered in time", "everything refused"],
)
def test_any_outcome_is_reported(answers: list[Answer], goodput: str, refused: str, late: str) -> None:
    found = figures(answers, peak=2.0, batch=1.0, after=1.0, offered=20.0, limit=12.0)
    assert not found.good
    told = report(found, seconds=1.0, limit=12.0)
    for cell in (goodput, refused, late):
        assert f"| {cell} |" in told
