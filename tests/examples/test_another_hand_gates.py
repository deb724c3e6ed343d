"""What the base must reach before it is tuned."""

from another_hand.gates import check_gates

GOOD = {"vqa/name": 60.0, "pope/mean/auc": 90.0, "objects/hallucinated": 40.0}


def judge(floor: float = 54.9, further: float = 39.0, **changed: float) -> list[bool]:
    """Return which gates are met, in the table's order."""
    results = {**GOOD, **{name.replace("__", "/"): value for name, value in changed.items()}}
    table = check_gates(results, {"objects/hallucinated": further}, {"floor": {"vqa/name": floor}})
    rows = table.splitlines()[2:]
    assert all(("met" in row) != ("**missed**" in row) for row in rows)
    return ["met" in row for row in rows]


def test_each_gate_is_met_or_missed_by_itself():
    assert judge() == [True] * 4
    assert judge(vqa__name=59.9) == [False, True, True, True]
    assert judge(floor=60.0) == [True, False, True, True]
    assert judge(pope__mean__auc=89.9) == [True, True, False, True]


def test_converged_is_what_more_steps_hardly_change():
    assert judge(further=36.0)[-1] is False  # a tenth less
    assert judge(further=36.1)[-1] is True
    assert judge(further=50.0)[-1] is True  # more steps make it worse
    assert judge(objects__hallucinated=0.0, further=0.0)[-1] is True
