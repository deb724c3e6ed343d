"""One source of data, as a recipe describes it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cafe.content import DEFAULT_LIMITS, PILLOW_MAX_PIXELS, ImageLimits
from cafe.data.files import folder_of
from cafe.utils.paths import expand_home
from cafe.utils.ranges import Above, Between

Format = Literal["llava", "karpathy", "mmeb", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of a record's fields.

    Attributes:
        query, query_image: text and images that search; `<image>` in the text marks where an image stands.
        positive, positive_image: the match. Of a list of texts, one is chosen at random.
        negatives, negative_images: hard negatives.
        negative_scores: for each negative the probability (0 to 1) that it matches after all: soft targets.
        image, conversations: the images and turns of the llava format.
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
            `{000..012}.tar`), or a folder or `dataset:NAME` for the datasets library; local, or a URL of an object
            store.
        images: the folder that image paths are relative to; by default the file's own.
        format: what a record means: "llava", "karpathy", "mmeb" or "pairs".
        split: the split of a Karpathy file or a dataset to read; "train" of a Karpathy file includes "restval".
        subset: the configuration of a dataset that has several.
        columns: the names of a record's fields, where they differ from the default.
        answer_prompt: in the formats mmeb and pairs, what the user says after the query so that the positive, if it is
            text alone, is what the assistant answers. "" adds nothing; null makes no dialogue.
        max_frames: the most images taken from one list or folder, evenly spaced: frames of a video; null for all.
        allow_urls: the schemes of URLs that records may name images by, such as [s3, gs]. Those of the store that the
            images are on need no entry.
        allow_outside: let records name images outside of the folder of images: by `..`, and where the records come from
            elsewhere (tar, parquet, a dataset, an object store) by absolute paths and links.
        max_image_bytes, max_image_pixels: the largest image that is read; null for the limits of `data`.
        use_pairs: train on the pairs of its records. false reads dialogues alone, as of instruction data whose answers
            ("yes") are not captions.
        weight: how often the source is drawn, relative to its share by size.
        shuffle_window: the number of parquet row groups or tar files that are read and shuffled together.
    """

    path: str
    images: str = ""
    format: Format = "llava"
    split: str = "train"
    subset: str = ""
    columns: Columns = field(default_factory=Columns)
    answer_prompt: str | None = None
    max_frames: Annotated[int | None, Above(0)] = None
    allow_urls: tuple[str, ...] = ()
    allow_outside: bool = False
    max_image_bytes: Annotated[int | None, Above(0)] = None
    max_image_pixels: Annotated[int | None, Between(1, PILLOW_MAX_PIXELS)] = None
    use_pairs: bool = True
    weight: float = 1.0
    shuffle_window: Annotated[int, Above(0)] = 8

    def __post_init__(self) -> None:
        expand_home(self, "path", "images")

    @property
    def folder(self) -> str:
        """Return the folder that image paths are relative to."""
        return self.images or folder_of(self.path)

    @property
    def image_limits(self) -> ImageLimits:
        """Return the limits on each image; the defaults where the source has none."""
        max_bytes = self.max_image_bytes or DEFAULT_LIMITS.max_bytes
        return ImageLimits(max_bytes, self.max_image_pixels or DEFAULT_LIMITS.max_pixels)
