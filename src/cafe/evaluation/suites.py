"""Every suite there is, in the order in which they run."""

from cafe.evaluation.captions import CAPTIONS
from cafe.evaluation.geometry import GEOMETRY
from cafe.evaluation.pope import POPE
from cafe.evaluation.retrieval import COCO, FLICKR30K, RETRIEVAL
from cafe.evaluation.vqa import VQA

SUITES = (RETRIEVAL, FLICKR30K, COCO, GEOMETRY, CAPTIONS, VQA, POPE)
