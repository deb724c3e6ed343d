"""The suites, in the order in which they run."""

from cafe.evaluation.suites.aro import ARO
from cafe.evaluation.suites.captions import CAPTIONS
from cafe.evaluation.suites.chair import CHAIR
from cafe.evaluation.suites.cider import CIDER
from cafe.evaluation.suites.geometry import GEOMETRY
from cafe.evaluation.suites.mmeb import MMEB
from cafe.evaluation.suites.pope import POPE
from cafe.evaluation.suites.retrieval import COCO, FLICKR30K, PARAGRAPHS, RETRIEVAL
from cafe.evaluation.suites.sugarcrepe import SUGARCREPE
from cafe.evaluation.suites.throne import THRONE
from cafe.evaluation.suites.vqa import VQA
from cafe.evaluation.suites.vqav2 import VQAV2
from cafe.evaluation.suites.winoground import WINOGROUND

SUITES = (
    # Embeddings, and captions chosen by embedding or by likelihood.
    *(RETRIEVAL, FLICKR30K, COCO, PARAGRAPHS, GEOMETRY, MMEB, SUGARCREPE, ARO, WINOGROUND),
    # Generated captions, answers and descriptions.
    *(CAPTIONS, CIDER, VQA, VQAV2, POPE, CHAIR, THRONE),
)
