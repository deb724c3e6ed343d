"""A server from its beginning to its end: load the model, listen, and finish what was taken before it ends."""

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from types import FrameType

import numpy as np
import torch
import uvicorn
from jaxtyping import Float32

from cafe.checkpoint import resolve_checkpoint, shipped_name
from cafe.errors import CafeError
from cafe.index.collection import Collection
from cafe.index.golden import MIN_COSINE, golden_vectors, load_recorded_model, lowest_cosine
from cafe.model import Cafe
from cafe.serving.app import create_app
from cafe.serving.config import ServingConfig
from cafe.serving.connection import Connection
from cafe.serving.encoding import NO_LIMIT, JobEncoder
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.metrics import Metrics
from cafe.serving.security import is_loopback
from cafe.serving.served_model import ServedModel
from cafe.serving.services import Services

BACKLOG = 512  # connections that the system accepts before the server does
KEEP_ALIVE = 30  # seconds for which a connection without requests is kept
HEADER_BYTES = 64 * 2**10  # the longest headers
SEND_SECONDS = 5  # that a client may take for the rest of its answer when the server ends

# Seconds after which Python has a thread pass the interpreter on. By default, the event loop would keep it for so long
# after each step that the model's thread waits more than it works.
SWITCH_INTERVAL = 0.001


def check_config(config: ServingConfig) -> None:
    """Refuse to be reached from other machines without a key.

    Raises:
        CafeError: the host is no loopback address, and there is no key.
    """
    if not is_loopback(config.host) and not config.api_key:
        raise CafeError(
            f"Whoever reaches {config.host} could use the server: give a key by --api-key-file or CAFE_API_KEY, or "
            "listen on 127.0.0.1 alone."
        )


@contextmanager
def loaded_services(config: ServingConfig, model: str | None, collection: str | None) -> Iterator[Services]:
    """Load a model and a collection, and run the engine and the image workers until the context ends.

    Args:
        config: what is allowed.
        model: a run, a directory, a Hub id, or a model that a package ships; None for the collection's.
        collection: a name or a directory; None for none.

    Raises:
        CafeError: there is neither, or they cannot be loaded or do not fit each other.
    """
    if model is None and collection is None:
        raise CafeError("There is nothing to serve: give --model, --collection or both.")
    opened = Collection.open(collection, model) if collection is not None else None
    if opened is not None:
        loaded = load_recorded_model(model, opened.manifest, opened.name)
    else:
        loaded = Cafe.load(resolve_checkpoint(str(model)))
    with running_services(config, loaded, opened.directory if opened else None) as services:
        yield services


@contextmanager
def running_services(config: ServingConfig, model: Cafe, collection: Path | None = None) -> Iterator[Services]:
    """Run the engine and the image workers of a model until the context ends.

    Args:
        config: what is allowed.
        model: the model.
        collection: the directory of a collection; None for none.

    Raises:
        CafeError: the model is not the one that made the collection.
    """
    metrics, limits = Metrics(), config.limits
    with ExitStack() as stack:
        images = ImageWorkers(
            model.chat_processor, config.image_workers, cache_bytes=config.engine.cache_bytes // 3, metrics=metrics
        )
        stack.callback(images.close)
        expected = golden_vectors(model)
        engine = Engine(model, config.engine, metrics)
        engine.start()
        stack.callback(engine.stop)
        # From here on, no image is decoded in this process, and the model runs in the engine's thread alone.
        served = ServedModel.of(engine, images, limits.timeout)
        check_served(served, expected)
        opened = Collection.open(collection, served) if collection else None
        if opened is not None:
            _ = opened.model  # compares the golden vectors of the collection
        context_length = getattr(model.lvlm.config.get_text_config(), "max_position_embeddings", None)
        encoder = JobEncoder(served.chat_processor, limits, context_length or NO_LIMIT)
        yield Services(served, model_id_of(model), engine, encoder, images, opened, config, metrics)


def check_served(served: ServedModel, expected: Float32[np.ndarray, "contents dim"]) -> None:
    """Make sure that what is served is what the model gives by itself.

    Raises:
        CafeError: the engine gives other embeddings of the golden contents.
    """
    cosine = lowest_cosine(golden_vectors(served), expected)
    if not cosine >= MIN_COSINE:  # also of NaN
        raise CafeError(
            f"The server would give other embeddings than the model (cosine {cosine:.4f}): it is not started."
        )


def model_id_of(model: Cafe) -> str:
    """Return what clients call a model.

    This is its Hub id, the name under which a package ships it, or the name of its directory or of the run it is in.
    """
    path = Path(model.name).expanduser()
    if not model.name or not path.is_dir():
        return model.name or "cafe"  # of a model that was made in memory
    if shipped := shipped_name(path):
        return shipped
    path = path.absolute()
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name


class Server(uvicorn.Server):
    """Serve until a signal, and then until what was taken is done.

    Attributes:
        ready: is set once requests are taken.
    """

    def __init__(self, services: Services) -> None:
        self.app = create_app(services)
        self.ready = Event()
        config = uvicorn.Config(
            self.app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=HEADER_BYTES,
            # What was taken is waited for before, see `on_tick`; this is for what is still being sent then.
            timeout_graceful_shutdown=SEND_SECONDS,
        )
        super().__init__(config)
        # All requests have a deadline of their own, but a client that does not read its answer has none.
        self._patience = services.config.limits.timeout + SEND_SECONDS
        self._stop_at = math.inf  # by time.monotonic: whatever is not done by then is cancelled

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests. A second signal ends the process at once."""
        self.stop()
        signal.signal(sig, signal.SIG_DFL)

    def stop(self) -> None:
        """Stop taking requests, and end once those that were taken are done."""
        self._stop_at = min(self._stop_at, time.monotonic() + self._patience)
        self.app.state.load.is_stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: once the server is stopping, and no request is answered or it takes too long."""
        is_done = not self.server_state.tasks or time.monotonic() > self._stop_at
        self.should_exit = self.app.state.load.is_stopping and is_done
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one.

    Raises:
        CafeError: that cannot be done.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CafeError(f"There is no address {host}: {error.strerror}.") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise CafeError(f"The server cannot listen on {host}, port {port}: {error.strerror}.") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the address of a server, with the port that it has."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(config: ServingConfig, model: str | None, collection: str | None) -> None:
    """Serve a model and a collection until a signal comes, and print the address once requests are taken.

    Args:
        config: what is allowed.
        model, collection: see `loaded_services`.

    Raises:
        CafeError: see `check_config`, `loaded_services` and `bind`.
    """
    check_config(config)
    listening = bind(config.host, config.port)  # an address that is taken is reported before the model is loaded
    with listening, loaded_services(config, model, collection) as services:
        sys.setswitchinterval(SWITCH_INTERVAL)
        server = Server(services)
        announcer = Thread(target=_announce, args=(server, url_of(listening)), daemon=True)
        announcer.start()
        server.run([listening])


def leave_a_core() -> None:
    """Leave a core to HTTP and to the image workers: the model's threads wait for the one that shares its core."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() - 1, 1))


def _announce(server: Server, url: str) -> None:
    """Print where the server is, once it is there."""
    server.ready.wait()
    print(f"Serving on {url}", flush=True)


@contextmanager
def running_server(services: Services) -> Iterator[str]:
    """Serve in a thread until the context ends, on a free port unless the configuration says which.

    Yields:
        The address.
    """
    listening = bind(services.config.host, services.config.port)
    server = Server(services)
    thread = Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    server.ready.wait()
    try:
        yield url_of(listening)
    finally:
        server.stop()
        thread.join()
