"""The command line: overrides may stand before and behind options, and what is unknown is refused."""

import pytest

from cafe.cli import parse


@pytest.mark.parametrize(
    "line",
    [
        "ablate recipe.yaml a=1 b.c=2 --seeds 5",
        "ablate recipe.yaml --seeds 5 a=1 b.c=2",
        "ablate recipe.yaml a=1 --seeds 5 b.c=2",
        "ablate --seeds 5 recipe.yaml a=1 b.c=2",
    ],
)
def test_overrides_stand_anywhere(line):
    options = parse(line.split())
    assert (str(options.recipe), options.overrides, options.seeds) == ("recipe.yaml", ["a=1", "b.c=2"], 5)


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("train recipe.yaml --sed=1", "--sed=1"),
        ("ablate recipe.yaml --seeds 5 more", "more"),
        ("report runs/a --output x.html --log l.jsonl --colour=red", "--colour=red"),
    ],
)
def test_what_is_unknown_is_refused(line, unknown, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err
