"""What clients send to search and ask a collection, and what they are sent."""

from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from cafe.index.filters import Filters
from cafe.index.searching import Sort
from cafe.serving.schemas import Count, Items, Strict

MAX_RESULTS = 200
MAX_TURNS = 16  # earlier turns of a conversation
MAX_WORDS = 2000  # characters that are searched for


def _check_unicode(text: str) -> str:
    """Refuse halves of characters, which JSON can hold and no model can read.

    Raises:
        ValueError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("The text holds half a character.") from None
    return text


# Checked here and not where it is used: a tokenizer, a log or a file name would each fail in its own way.
Text = Annotated[str, AfterValidator(_check_unicode)]
Words = Annotated[Text, Field(max_length=MAX_WORDS)]
Size = Annotated[int, Field(ge=0, le=10**9)]


class SearchFilters(Strict):
    """Hold which images are looked for."""

    after: Words | None = Field(None, description="Taken at this time or later: 2024, 2024-05, 2024-05-31.")
    before: Words | None = Field(None, description="Taken before this year, month or day.")
    folder: Words | None = Field(None, description="In a folder with this in its name.")
    min_width: Size = Field(0, description="Least width, in pixels.")
    min_height: Size = Field(0, description="Least height, in pixels.")
    where: Items[Words] = Field(default=[], max_length=16, description="Conditions on columns, as in year>=2020.")
    min_score: float | None = Field(None, description="Least score.")

    @property
    def filters(self) -> Filters:
        """Return the filters as a search takes them."""
        # An empty field of the page's form is no filter.
        return Filters(
            after=self.after or None,
            before=self.before or None,
            folder=self.folder or None,
            min_width=self.min_width,
            min_height=self.min_height,
            where=tuple(self.where),
        )


class SearchRequest(SearchFilters):
    """Ask for the images that match words, an image, or both."""

    # Words and an image may come together; without any of these, the latest images are found.
    query: Words = Field("", description="The words that are searched for.")
    image: Text = Field("", description="An image that is searched for, as a data URI.")
    like: Words = Field("", description="The id of an image of the collection that is searched for.")
    exclude: Words = Field("", description="Words for what is not wanted.")
    k: int = Field(60, ge=1, le=MAX_RESULTS, description="The most images to find.")
    sort: Sort = Field("score", description="The order of the images found.")


class EarlierTurn(Strict):
    """Hold an earlier question of a conversation, and its answer."""

    question: Words
    answer: Text


class AskRequest(SearchFilters):
    """Ask a question about chosen images, or about those that a search finds."""

    # Images that were selected, or else those that a search finds.
    question: Words = Field(description="The question.")
    ids: Items[Words] = Field(default=[], description="The images to ask about; by default, those that are found.")
    query: Words = Field("", description="The words that are searched for; by default, the question.")
    k: Count = Field(4, description="The most images to ask about, if none are named.")
    # The client keeps the conversation, so that the server has nothing to forget.
    history: Items[EarlierTurn] = Field(default=[], max_length=MAX_TURNS, description="Earlier turns about the images.")
    max_tokens: Count = Field(256, description="The maximum length of the answer, in tokens.")


class FoundImage(BaseModel):
    """Tell about an image of the collection."""

    id: str = Field(description="Names the image for /thumbnails, /ask and further searches.")
    name: str = Field(description="The name of its file.")
    folder: str = Field(description="The folder of its file, within what was indexed.")
    page: int | None = Field(description="The number of the page, from 1; none for an image.")
    score: float | None = Field(description="How well it matches, from 0 to 1; none if it was not searched for.")
    taken_at: str = Field(description="When it was taken: an ISO time without a zone, as images have it.")
    width: int
    height: int
    caption: str
    columns: dict[str, Any] = Field(description="What came along with a record.")


class SearchAnswer(BaseModel):
    """Hold the images that a search found, the best first."""

    results: list[FoundImage]


class CollectionFacts(BaseModel):
    """Tell about the collection."""

    name: str
    images: int
    first_day: date | None = Field(description="The day of the oldest image.")
    last_day: date | None = Field(description="The day of the newest image.")
    folders: list[str] = Field(description="Names of folders, for the filter.")
    columns: list[str] = Field(description="Names of columns, for the filter.")
    sorts: list[Sort]


class CollectionAnswer(BaseModel):
    """Tell what the server searches and with what."""

    model: str
    collection: CollectionFacts | None
