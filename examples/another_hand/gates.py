"""Say whether the base is good enough to tell anything by: checked on the development hand, before it is tuned."""

from collections.abc import Mapping

NAMED = 60.0  # percent of single drawings
PRESENCE = 90.0  # AUC of the margin of yes and no, in percent


def check_gates(results: Mapping[str, float], floors: Mapping[str, Mapping[str, float]]) -> str:
    """Format a table of what the base must reach on the development hand.

    Args:
        results: the base's, by name.
        floors: what is reached without learning features, by kind of floor and name of the result.
    """
    floor = floors.get("floor", {}).get("vqa/name", float("nan"))
    gates = [
        (f"single drawings named, at least {NAMED:.0f}%", results["vqa/name"], NAMED),
        ("single drawings named, above the floor", results["vqa/name"], floor),
        (f"presence, AUC at least {PRESENCE:.0f}", results["pope/mean/auc"], PRESENCE),
    ]
    lines = ["| gate | measured | must | |", "|---|---:|---:|---|"]
    for name, value, must in gates:
        lines.append(f"| {name} | {value:.1f} | {must:.1f} | {'met' if value >= must else '**missed**'} |")
    return "\n".join(lines)
