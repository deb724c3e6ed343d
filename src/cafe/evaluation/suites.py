"""Every suite there is, in the order in which they run."""

from cafe.evaluation.aro import ARO
from cafe.evaluation.captions import CAPTIONS
from cafe.evaluation.chair import CHAIR
from cafe.evaluation.cider import CIDER
from cafe.evaluation.geometry import GEOMETRY
from cafe.evaluation.mmeb import MMEB
from cafe.evaluation.pope import POPE
from cafe.evaluation.retrieval import COCO, FLICKR30K, PARAGRAPHS, RETRIEVAL
from cafe.evaluation.sugarcrepe import SUGARCREPE
from cafe.evaluation.throne import THRONE
from cafe.evaluation.vqa import VQA
from cafe.evaluation.vqav2 import VQAV2
from cafe.evaluation.winoground import WINOGROUND

SUITES = (
    *(RETRIEVAL, FLICKR30K, COCO, PARAGRAPHS, GEOMETRY, MMEB, SUGARCREPE, ARO, WINOGROUND),
    *(CAPTIONS, CIDER, VQA, VQAV2, POPE, CHAIR, THRONE),
)
