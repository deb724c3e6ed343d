"""The routes of a collection: search it, ask it, look at it."""

import base64
import binascii
from typing import Annotated, NoReturn

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from cafe.content import Content, ImageLimits, ImageRef
from cafe.errors import CafeError, RecordError
from cafe.index.collection import Collection
from cafe.index.filters import Predicate, is_part_of_any
from cafe.index.query import EmptyQueryError, Query, Term
from cafe.index.searching import Hit, Sort
from cafe.serving.config import RequestLimits
from cafe.serving.gallery import Gallery, GalleryReader, source_refs
from cafe.serving.questions import answer_events, submit_question
from cafe.serving.search_schemas import (
    AskRequest,
    CollectionAnswer,
    CollectionFacts,
    SearchAnswer,
    SearchFilters,
    SearchRequest,
)
from cafe.serving.services import Services, ServicesDep
from cafe.serving.thumbnails import Thumbnails, ThumbnailSize

EXCLUDED_WEIGHT = -0.5  # of words for what is not wanted: the full weight would look for their opposite
THUMBNAIL_SECONDS = 3600  # that a browser may keep one
router = APIRouter(tags=["collection"])


def get_thumbnails(request: Request) -> Thumbnails:
    """Return the thumbnails that this server keeps."""
    state = request.app.state
    if not hasattr(state, "thumbnails"):
        state.thumbnails = Thumbnails()
    thumbnails: Thumbnails = state.thumbnails
    return thumbnails


def get_gallery(request: Request, services: ServicesDep) -> Gallery:
    """Return the collection as it is now.

    Raises:
        HTTPException: the server has none, or it cannot be read.
    """
    state = request.app.state
    if not hasattr(state, "gallery_reader"):
        state.gallery_reader = GalleryReader()
    try:
        gallery: Gallery = state.gallery_reader.read(_collection(services))
    except CafeError:
        _refuse(503, "The collection cannot be read now.")
    return gallery


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
        sorts=["score", "newest", "oldest", "name"],
    )
    return CollectionAnswer(model=services.model_id, collection=facts)


@router.post("/search")
def search(request: SearchRequest, services: ServicesDep, gallery: GalleryDep) -> SearchAnswer:
    """Find the images that match words, an image, or both; without either, show the latest."""
    query = _parse_query(request, gallery, services.config.limits)
    if query is None:
        hits = gallery.latest(_parse_filters(request), request.k, request.sort) if _is_in(request, gallery) else []
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
        data = thumbnails.get(hit, size, services.images, gallery.roots)
    except (CafeError, OSError):
        _refuse(410, "The image is gone, or cannot be read any more.")
    headers = {"Cache-Control": f"private, max-age={THUMBNAIL_SECONDS}", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type="image/jpeg", headers=headers)


@router.post("/ask", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
async def ask(request: AskRequest, services: ServicesDep, gallery: GalleryDep) -> StreamingResponse:
    """Answer a question about images, as a stream of events.

    The first event has the images that the answer cites by their numbers (`sources`), those after it pieces of the
    answer (`text`), and the last `done` with the reason why it ended, or an `error`.
    """
    _check_question(request, services.config.limits)
    hits = await run_in_threadpool(_hits_to_ask, request, services, gallery)
    hits, refs = await run_in_threadpool(source_refs, hits, gallery.roots)
    question = await submit_question(request, hits, refs, services)
    sources = [gallery.describe(hit, None if request.ids else hit.score) for hit in hits]
    # A proxy that waits for the end of the answer would show nothing until then.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(answer_events(sources, question), media_type="text/event-stream", headers=headers)


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


def _parse_query(request: SearchRequest, gallery: Gallery, limits: RequestLimits) -> Query | None:
    """Make a query of what is wanted and what is not; None if nothing is searched for."""
    terms: list[Term] = []
    if request.query.strip():
        terms.append(Term(Content.of(request.query)))
    if request.image:
        terms.append(Term(Content((_parse_image(request.image, limits),))))
    if request.like:
        _, refs = source_refs([_known_hit(gallery, request.like)], gallery.roots)
        if not refs:
            _refuse(410, "The image is gone, or cannot be read any more.")
        terms.append(Term(Content(tuple(refs))))
    if not terms:
        return None
    if request.exclude.strip():
        terms.append(Term(Content.of(request.exclude), EXCLUDED_WEIGHT))
    return Query(tuple(terms))


def _parse_image(uri: str, limits: RequestLimits) -> ImageRef:
    """Return the image in a data URI."""
    head, comma, data = uri.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        _refuse(400, "The image should be a data URI in base64.")
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        _refuse(400, "The image is not in base64.")
    return ImageRef(decoded, ImageLimits(limits.max_image_bytes, limits.max_image_pixels))


def _search(
    services: Services, gallery: Gallery, query: Query, k: int, request: SearchFilters, sort: Sort = "score"
) -> list[Hit]:
    """Search the collection, and refuse what cannot be searched for."""
    _parse_filters(request)
    if not _is_in(request, gallery):
        return []
    try:
        return _collection(services).search(query, k, min_score=request.min_score, sort=sort, **vars(request.filters))
    except EmptyQueryError:
        _refuse(400, "The query's parts cancel out, so that nothing is searched for.")
    except RecordError:
        _refuse(400, "The image cannot be read.")
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


def _is_in(request: SearchFilters, gallery: Gallery) -> bool:
    """Return whether the folder of a request is one that was indexed: of those above it, nothing is told."""
    return not request.folder or is_part_of_any(request.folder, gallery.folders)


def _collection(services: Services) -> Collection:
    """Return the collection, which not every server has."""
    if services.collection is None:
        _refuse(404, "This server has no collection to search: it was started without one.")
    return services.collection


def _refuse(status: int, message: str) -> NoReturn:
    """Answer a request with an error.

    Raises:
        HTTPException: always.
    """
    raise HTTPException(status, message)
