"""The routes of a collection: search it, ask it, look at it."""

from typing import Annotated, NoReturn, get_args

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from cafe.content import Content, ImageRef
from cafe.errors import CafeError, RecordError
from cafe.index.collection import Collection
from cafe.index.filters import Predicate, is_part_of_any
from cafe.index.query import EmptyQueryError, Query, Term
from cafe.index.searching import Hit, Sort
from cafe.serving.answers import ERROR_ANSWERS, ErrorAnswer
from cafe.serving.config import RequestLimits
from cafe.serving.contents import ContentReader
from cafe.serving.errors import ApiError, request_id_of
from cafe.serving.gallery import Gallery, GalleryReader
from cafe.serving.place_images import source_refs
from cafe.serving.questions import answer_events, submit_question
from cafe.serving.schemas import Item
from cafe.serving.search_schemas import (
    AskRequest,
    CollectionAnswer,
    CollectionFacts,
    SearchAnswer,
    SearchFilters,
    SearchRequest,
)
from cafe.serving.services import Services, ServicesDep
from cafe.serving.streaming import EventStream, while_connected
from cafe.serving.thumbnails import Thumbnails, ThumbnailSize, read_thumbnail

EXCLUDED_WEIGHT = -0.5  # of words for what is not wanted: the full weight would look for their opposite
_CODES = {400: "invalid_value", 404: "not_found", 410: "gone", 503: "collection_unavailable"}  # of errors
THUMBNAIL_SECONDS = 3600  # that a browser may keep one
router = APIRouter(responses={**ERROR_ANSWERS, 410: {"model": ErrorAnswer, "description": "The image is gone."}})


def get_thumbnails(request: Request) -> Thumbnails:
    """Return the thumbnails that this server keeps."""
    thumbnails: Thumbnails = request.app.state.thumbnails
    return thumbnails


def get_gallery(request: Request, services: ServicesDep) -> Gallery:
    """Return the collection as it is now.

    Raises:
        ApiError: the server has none, or it cannot be read.
    """
    reader: GalleryReader = request.app.state.gallery_reader
    try:
        return reader.read(_collection(services))
    except CafeError:
        _refuse(503, "The collection cannot be read now.")


GalleryDep = Annotated[Gallery, Depends(get_gallery)]


@router.get("/collection")
def collection_facts(request: Request, services: ServicesDep) -> CollectionAnswer:
    """Tell what is searched here; the collection is null where there is none."""
    if services.collection is None:
        return CollectionAnswer(model=services.model_id, collection=None)
    gallery = get_gallery(request, services)
    first_day, last_day = gallery.dates or (None, None)
    facts = CollectionFacts(
        name=services.collection.name,
        images=len(gallery.snapshot),
        first_day=first_day,
        last_day=last_day,
        folders=gallery.folders,
        columns=gallery.columns,
        sorts=list(get_args(Sort)),
    )
    return CollectionAnswer(model=services.model_id, collection=facts)


@router.post("/search")
def search(request: SearchRequest, services: ServicesDep, gallery: GalleryDep) -> SearchAnswer:
    """Find the images that match words, an image, or both; without either, show the latest."""
    query = _parse_query(request, services, gallery)
    if query is None:
        predicate = _parse_filters(request)
        is_public = _is_public(request, predicate, gallery)
        hits = gallery.latest(predicate, request.k, request.sort) if is_public else []
        return SearchAnswer(results=[gallery.describe(hit, None) for hit in hits])
    hits = _search(services, gallery, query, request.k, request, sort=request.sort)
    return SearchAnswer(results=[gallery.describe(hit, hit.score) for hit in hits])


@router.get("/thumbnails/{id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
def thumbnail(
    id: str,
    services: ServicesDep,
    gallery: GalleryDep,
    thumbnails: Annotated[Thumbnails, Depends(get_thumbnails)],
    size: ThumbnailSize = ThumbnailSize.MEDIUM,
) -> Response:
    """Return an image of the collection as a small JPEG file."""
    hit = _known_hit(gallery, id)
    try:
        data = read_thumbnail(hit, size, services.images, gallery.roots, thumbnails)
    except (CafeError, OSError):
        _refuse(410, "The image is gone, or cannot be read any more.")
    headers = {"Cache-Control": f"private, max-age={THUMBNAIL_SECONDS}", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type="image/jpeg", headers=headers)


@router.post("/ask", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
async def ask(body: AskRequest, request: Request, services: ServicesDep, gallery: GalleryDep) -> Response:
    """Answer a question about images, as a stream of events.

    The first event has the images that the answer cites by their numbers (`sources`), those after it pieces of the
    answer (`text`), and the last `done` with the reason why it ended, or an `error`.
    """
    return await while_connected(request, _answer(body, request, services, gallery))


async def _answer(body: AskRequest, request: Request, services: Services, gallery: Gallery) -> Response:
    """Begin to answer a question."""
    _check_question(body, services.config.limits)

    def read_images() -> tuple[list[Hit], list[ImageRef]]:
        """Find the images, and read those that are still there."""
        return source_refs(_hits_to_ask(body, services, gallery), gallery.roots, services.images)

    hits, refs = await run_in_threadpool(read_images)
    question = await submit_question(body, hits, refs, services)
    sources = [gallery.describe(hit, None if body.ids else hit.score) for hit in hits]
    events = answer_events(sources, question, request_id_of(request))
    return EventStream(events, question.job if question else None)


def _check_question(request: AskRequest, limits: RequestLimits) -> None:
    """Refuse a question that asks for too much, before anything is done for it."""
    if not request.question.strip():
        _refuse(400, "There is no question to answer.")
    if max(len(request.ids), request.k) > limits.max_images:
        _refuse(400, f"A question can be about {limits.max_images} images at most.")
    if request.max_tokens > limits.max_new_tokens:
        _refuse(400, f"An answer can have {limits.max_new_tokens:,} tokens at most.")


def _hits_to_ask(request: AskRequest, services: Services, gallery: Gallery) -> list[Hit]:
    """Return the images that were chosen, or those that a search finds."""
    if request.ids:
        return [_known_hit(gallery, id) for id in dict.fromkeys(request.ids)]
    return _search(services, gallery, Query.of(request.query.strip() or request.question), request.k, request)


def _known_hit(gallery: Gallery, id: str) -> Hit:
    """Return an image of the collection, and nothing else that an id could name."""
    hit = gallery.hit(id)
    if hit is None:
        _refuse(404, "There is no such image in the collection.")
    return hit


def _parse_query(request: SearchRequest, services: Services, gallery: Gallery) -> Query | None:
    """Make a query of what is wanted and what is not; None if nothing is searched for."""
    terms: list[Term] = []
    if request.query.strip():
        terms.append(Term(Content.of(request.query)))
    if request.image:
        terms.append(Term(ContentReader(services.config).read_input(Item(image=request.image), "image")))
    if request.like:
        _, refs = source_refs([_known_hit(gallery, request.like)], gallery.roots, services.images)
        if not refs:
            _refuse(410, "The image is gone, or cannot be read any more.")
        terms.append(Term(Content(tuple(refs))))
    if not terms:
        return None
    if request.exclude.strip():
        terms.append(Term(Content.of(request.exclude), EXCLUDED_WEIGHT))
    return Query(tuple(terms))


def _search(
    services: Services, gallery: Gallery, query: Query, k: int, request: SearchFilters, sort: Sort = "score"
) -> list[Hit]:
    """Search the collection, and refuse what cannot be searched for."""
    if not _is_public(request, _parse_filters(request), gallery):
        return []
    try:
        return _collection(services).search(query, k, min_score=request.min_score, sort=sort, **vars(request.filters))
    except EmptyQueryError:
        _refuse(400, "The query's parts cancel out, so that nothing is searched for.")
    except RecordError:
        if any(term.content.images for term in query.terms):
            raise ApiError(400, "image_decode_failed", "The image of the query cannot be read.", "image") from None
        _refuse(400, "The words of the query cannot be read.")
    except CafeError:
        _refuse(503, "The collection cannot be searched now.")


def _parse_filters(request: SearchFilters) -> Predicate:
    """Parse the filters of a request."""
    folder = request.folder
    # A path would tell where on the machine the images are.
    if folder and (folder in (".", "..", "~") or "/" in folder or "\\" in folder):
        _refuse(400, "A folder is given by a part of its name, not by a path.")
    try:
        return request.filters.compile()
    except CafeError as error:  # of filters alone, so that the message names nothing but what the client sent
        _refuse(400, str(error))


def _is_public(request: SearchFilters, predicate: Predicate, gallery: Gallery) -> bool:
    """Return whether filters are about what clients may know.

    By the folders above those that were indexed, and by columns that name files, one could find out paths bit by bit.
    """
    if request.folder and not is_part_of_any(request.folder, gallery.folders):
        return False
    return all(condition.column in gallery.columns for condition in predicate.conditions)


def _collection(services: Services) -> Collection:
    """Return the collection, which not every server has."""
    if services.collection is None:
        _refuse(404, "This server has no collection to search: it was started without one.")
    return services.collection


def _refuse(status: int, message: str) -> NoReturn:
    """Answer a request with an error.

    Raises:
        ApiError: always.
    """
    raise ApiError(status, _CODES[status], message)
