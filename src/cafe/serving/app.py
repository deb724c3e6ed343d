"""The web application: its routes, behind the checks that each request passes."""

from typing import Any

from fastapi import FastAPI

from cafe import __version__
from cafe.serving.envelope import Envelope
from cafe.serving.errors import install_error_handlers
from cafe.serving.gallery import GalleryReader
from cafe.serving.lru import Lru
from cafe.serving.routes import chat, collection, embeddings, operations, page, ranking
from cafe.serving.security import OPEN_PATHS, Gate, ServerLoad
from cafe.serving.services import Services
from cafe.serving.thumbnails import CACHE_BYTES


def create_app(services: Services) -> FastAPI:
    """Make the application that answers requests.

    Its `state` has the services, the load, and what is kept of a collection.
    """
    # The pages that FastAPI makes of the schema load scripts from elsewhere.
    app = FastAPI(title="CAFe", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.services, app.state.load = services, ServerLoad()
    app.state.gallery_reader, app.state.thumbnails = GalleryReader(), Lru(CACHE_BYTES)
    for module in (embeddings, chat, ranking, collection, operations, page):
        app.include_router(module.router)
    install_error_handlers(app)
    if services.config.api_key:
        add_key(app.openapi())  # which is kept, and returned each time
    # The last one is the outermost.
    app.add_middleware(Gate, config=services.config, load=app.state.load)
    app.add_middleware(Envelope, metrics=services.metrics)
    return app


def add_key(schema: dict[str, Any]) -> None:
    """Say in the description of the routes that they need a key, for generated clients."""
    schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        if path not in OPEN_PATHS:
            for operation in methods.values():
                operation["security"] = [{"key": []}]
