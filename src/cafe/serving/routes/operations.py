"""What operators ask: which model this is, whether it is well, and what it does."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from cafe.serving.answers import ERROR_ANSWERS, Health, ModelCard, ModelList, Readiness
from cafe.serving.jobs import NotReadyError
from cafe.serving.requests import check_model_id
from cafe.serving.services import Services, ServicesDep

router = APIRouter(responses={status: ERROR_ANSWERS[status] for status in (401, 403, 404, 405, 500, 503)})

MAX_HEARTBEAT_AGE = 60.0  # seconds; no step of the model takes longer
MAX_IMAGES_DOWN = 5.0  # seconds without a process that reads images
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/v1/models", response_model=ModelList, summary="Name the model")
async def list_models(services: ServicesDep) -> Response:
    """List the one model that is served."""
    return JSONResponse({"object": "list", "data": [_model_card(services)]})


@router.get("/v1/models/{model:path}", response_model=ModelCard, summary="Describe the model")
async def retrieve_model(model: str, services: ServicesDep) -> Response:
    """Describe the model, if it is the one that is served."""
    check_model_id(model, services)
    return JSONResponse(_model_card(services))


@router.get("/health", response_model=Health, responses={503: {"model": Health}}, summary="Is the server well?")
async def health(services: ServicesDep) -> Response:
    """Say whether the model's thread lives, has not stopped in the midst of its work, and images can be read."""
    # None of these waits for the engine: a server whose model hangs still answers here.
    engine, images = services.engine, services.images
    age, waiting = engine.heartbeat_age, engine.num_waiting
    is_well = (
        engine.is_alive
        and age <= MAX_HEARTBEAT_AGE
        # A bad image may end its process, whose place another takes at once.
        and images.seconds_down <= MAX_IMAGES_DOWN
    )
    body = {
        "status": "ok" if is_well else "error",
        "heartbeat_age": age,
        "waiting": waiting,
        "image_workers": images.num_alive,
    }
    return JSONResponse(body, 200 if is_well else 503)


@router.get("/ready", response_model=Readiness, summary="Are requests taken?")
async def ready(services: ServicesDep) -> Response:
    """Say whether requests are taken now."""
    if not services.engine.is_alive:
        raise NotReadyError
    return JSONResponse({"status": "ready"})


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, summary="Read the metrics"
)
async def metrics(services: ServicesDep) -> Response:
    """Return what Prometheus reads."""
    # An age is right only at the moment it is asked for.
    services.metrics.heartbeat_age.set(services.engine.heartbeat_age)
    return Response(services.metrics.render(), media_type=METRICS_TYPE)


def _model_card(services: Services) -> dict[str, str | int]:
    """Describe the model."""
    return {"id": services.model_id, "object": "model", "created": 0, "owned_by": "cafe"}
