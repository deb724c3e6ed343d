"""What a recipe says of one source of data."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cafe.data.files import folder_of
from cafe.utils.ranges import Above

Format = Literal["llava", "karpathy", "mmeb", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names under which a source's records keep what we read.

    Attributes:
        query, query_image: text and pictures that search; a mark <image> in the text is a picture's place.
        positive, positive_image: the match. Of a list of texts, one is taken by lot.
        negatives, negative_images: hard negatives.
        negative_scores: how likely each matches after all, 0 to 1: soft targets.
        image, conversations: the pictures and turns of the llava format.
    """

    query: str = "query"
    query_image: str = "query_image"
    positive: str = "positive"
    positive_image: str = "positive_image"
    negatives: str = "negatives"
    negative_images: str = "negative_images"
    negative_scores: str = "negative_scores"
    image: str = "image"
    conversations: str = "conversations"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of records, and how to read them.

    Attributes:
        path: a file (.json, .jsonl, .csv, .tsv, .parquet, .tar), several by a pattern (`train-*.parquet`,
            `{000..012}.tar`), a folder or `dataset:NAME` that the datasets library reads; local, or a URL of an
            object store.
        images: the folder that image paths are relative to; by default the file's own.
        format: what a record means: "llava", "karpathy", "mmeb" or "pairs".
        split: of a Karpathy file or a dataset, which split to read; "train" of a Karpathy file reads "restval" too.
        subset: of a dataset that has several.
        columns: the names of a record's fields, where they are others than ours.
        answer_prompt: in the formats mmeb and pairs, what the user says behind the query so that the positive, where it is text
            alone, is what the assistant answers; "" adds nothing; null makes no dialogue.
        max_frames: the most pictures taken of one list or folder of pictures, evenly spaced: frames of a video; null for
            all.
        use_pairs: take the pairs of its records; false reads dialogues alone, as of instruction data whose answers
            ("yes") are no captions.
        weight: how often the source is drawn, beside its share by size.
        shuffle_window: parquet row groups or tar files that are read and shuffled together.
    """

    path: str
    images: str = ""
    format: Format = "llava"
    split: str = "train"
    subset: str = ""
    columns: Columns = field(default_factory=Columns)
    answer_prompt: str | None = None
    max_frames: Annotated[int | None, Above(0)] = None
    use_pairs: bool = True
    weight: float = 1.0
    shuffle_window: Annotated[int, Above(0)] = 8

    @property
    def folder(self) -> str:
        """The folder that image paths are relative to."""
        return self.images or folder_of(self.path)
