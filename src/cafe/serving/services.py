"""The parts of a running server that its routes use."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cafe.index.collection import Collection
from cafe.model import Cafe
from cafe.serving.config import ServingConfig
from cafe.serving.encoding import JobEncoder
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """Hold the parts of a running server.

    Attributes:
        model: the model, whose forward passes run in the engine and whose images are read by the workers, so that any
            thread may use it.
        model_id: what clients call the model.
        engine: runs jobs.
        encoder: makes jobs.
        images: the workers that read images.
        collection: what the page searches; None for none.
        config: what is allowed.
        metrics: what is measured.
    """

    model: Cafe
    model_id: str
    engine: Engine
    encoder: JobEncoder
    images: ImageWorkers
    collection: Collection | None
    config: ServingConfig
    metrics: Metrics


async def get_services(request: Request) -> Services:
    """Return the parts of the server that a request came to."""
    # A coroutine, because FastAPI would call a function in a thread.
    return services_of(request)


def services_of(request: Request) -> Services:
    """Return the parts of the server that a request came to."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
