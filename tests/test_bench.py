import json

import pytest

import bench


@pytest.mark.parametrize("name", bench.MARKDOWN)
def test_the_committed_table_is_the_one_drawn_from_the_committed_numbers(name):
    result = json.loads((bench.ROOT / "results" / f"{name}.json").read_text())
    assert (bench.ROOT / "results" / f"{name}.md").read_text() == bench.MARKDOWN[name](result)


def test_a_run_is_judged_where_the_line_between_two_evaluations_falls_to_the_target():
    rows = [{"step": 0, "val_loss": 4.0}, *({"step": i, "ms": 10.0} for i in range(1, 101))]
    rows += [{"step": 100, "val_loss": bench.TARGET + 0.3}, *({"step": i, "ms": 20.0} for i in range(101, 201))]
    missed = bench.summary(rows)
    assert (missed["reached"], missed["steps"], missed["seconds"]) == (False, 200, 3.0)
    found = bench.summary([*rows, {"step": 200, "val_loss": bench.TARGET - 0.1}])
    assert (found["reached"], found["steps"]) == (True, 175)  # 3 / 4 of the way
    assert found["seconds"] == pytest.approx(2.5)  # 100 steps of 10 ms and 75 of 20
