"""A goal is reached, missed or not measured."""

from benchmarks.goals import Goal, lines_of


def test_goals():
    lines = lines_of([Goal("a", "<=", 6, 5.0), Goal("b", ">=", 2, 1.0), Goal("c", ">=", 2, None)])
    assert [line.split(": ")[1] for line in lines] == ["5.00, reached", "1.00, MISSED", "not measured"]
