"""Name the results that the tables show, in their order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """Name a result of the table, and say whether less of it is better and whether it is a rate in percent."""

    name: str
    label: str
    less: bool = False
    percent: bool = True


HEADLINES = (
    Headline("retrieval/image_to_text/R@1", "scene finds its description, R@1"),
    Headline("retrieval/text_to_image/R@1", "description finds its scene, R@1"),
    Headline("mmeb/name-image-to-text/P@1", "drawing finds its name, R@1"),
    Headline("mmeb/name-text-to-image/P@1", "name finds its drawing, R@1"),
    Headline("mmeb/keywords-image-to-text/P@1", "drawing finds its keywords, R@1"),
    Headline("mmeb/keywords-text-to-image/P@1", "keywords find their drawing, R@1"),
    Headline("mmeb/language-image-to-text/P@1", "drawing finds its name in another language, R@1"),
    Headline("mmeb/language-text-to-image/P@1", "name in another language finds its drawing, R@1"),
    Headline("vqa/name", "what is it, open"),
    Headline("vqa/choice", "what is it, of four"),
    Headline("vqa/group", "kind of thing, of five"),
    Headline("vqa/count", "how many"),
    Headline("pope/mean/accuracy", "POPE, accuracy"),
    Headline("pope/mean/yes_ratio", "POPE, answered yes (half is right)"),
    Headline("pope/mean/auc", "POPE, AUC"),
    Headline("pope/adversarial/auc", "POPE, adversarial (the absent partner), AUC"),
    Headline("pope/subgroup/auc", "POPE, same subgroup, AUC"),
    Headline("captions/exact", "descriptions exactly right"),
    Headline("objects/recall", "shown concepts named"),
    Headline("objects/hallucinated", "named concepts that are absent", less=True),
    Headline("chair/CHAIR_i", "CHAIR-i", less=True),
    Headline("throne/overall/F1", "THRONE, F1"),
    Headline("partners/named", "absent partners named, of all chances", less=True),
    Headline("partners/others_named", "absent others named, of all chances", less=True),
    Headline("geometry/modality_gap", "modality gap", less=True, percent=False),
)

# What the variants of a sweep are judged by.
VARIED = (
    "retrieval/image_to_text/R@1",
    "retrieval/text_to_image/R@1",
    "pope/mean/accuracy",
    "pope/mean/auc",
    "objects/hallucinated",
    "partners/named",
)
