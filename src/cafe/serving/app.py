"""The web application: its routes, behind the checks that each request passes."""

from fastapi import FastAPI

from cafe import __version__
from cafe.serving.envelope import Envelope
from cafe.serving.errors import install_error_handlers
from cafe.serving.routes import chat, embeddings, operations, ranking
from cafe.serving.security import Gate, Load
from cafe.serving.services import Services


def create_app(services: Services) -> FastAPI:
    """Make the application that answers requests.

    Its `state` has the services, and the load.
    """
    # The pages that FastAPI makes of the schema load scripts from elsewhere.
    app = FastAPI(title="CAFe", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.services, app.state.load = services, Load()
    for module in (embeddings, chat, ranking, operations):
        app.include_router(module.router)
    install_error_handlers(app)
    # The last one is the outermost.
    app.add_middleware(Gate, config=services.config, load=app.state.load)
    app.add_middleware(Envelope, metrics=services.metrics)
    return app
