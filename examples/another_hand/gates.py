"""Say whether the base is good enough to tell anything by: checked on the development hand, before it is tuned."""

from collections.abc import Mapping

NAMED = 60.0  # percent of single drawings
PRESENCE = 90.0  # AUC of the margin of yes and no, in percent
CONVERGED = 10.0  # percent of its hallucination that another fifth of the steps may take away


def check_gates(
    results: Mapping[str, float], further: Mapping[str, float], floors: Mapping[str, Mapping[str, float]]
) -> str:
    """Format a table of what the base must reach on the development hand.

    Args:
        results: the base's, by name.
        further: those of the base after another fifth of its steps.
        floors: what is reached without learning features, by kind of floor and name of the result.
    """
    floor = floors.get("floor", {}).get("vqa/name", float("nan"))
    named, presence = results["vqa/name"], results["pope/mean/auc"]
    now, later = results["objects/hallucinated"], further["objects/hallucinated"]
    change = 100 * (later - now) / now if now else 0.0
    gates = [
        (f"single drawings named, at least {NAMED:.0f}%", f"{named:.1f}", named >= NAMED),
        (f"single drawings named, above the floor of {floor:.1f}%", f"{named:.1f}", named > floor),
        (f"presence, AUC at least {PRESENCE:.0f}", f"{presence:.1f}", presence >= PRESENCE),
        (
            f"converged: another 20% of the steps lowers hallucination by less than {CONVERGED:.0f}%",
            f"{now:.1f} → {later:.1f} ({change:+.1f}%)".replace("-", "−"),
            change > -CONVERGED,
        ),
    ]
    lines = ["| on the development hand | measured | |", "|---|---:|---|"]
    lines += [f"| {claim} | {value} | {'met' if holds else '**missed**'} |" for claim, value, holds in gates]
    return "\n".join(lines)
