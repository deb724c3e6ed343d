"""What a server measures, as Prometheus reads it: base units, and labels of few values."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Count and time what a server does.

    Each server has its own: the library's registry would be shared by all servers of a process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        # Requests.
        self.requests = Counter("cafe_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "cafe_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS, registry=registry
        )
        # Images.
        self.image_seconds = Histogram(
            "cafe_image_seconds",
            "Time to decode and process the images of an input.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.image_worker_restarts = Counter(
            "cafe_image_worker_restarts", "Image workers restarted.", registry=registry
        )
        # Jobs for the model.
        self.queue_depth = Gauge("cafe_queue_depth", "Jobs that wait for the model.", ["task"], registry=registry)
        self.queue_seconds = Histogram(
            "cafe_queue_seconds", "Time that a job waits for the model.", ["task"], buckets=_SECONDS, registry=registry
        )
        self.running_chats = Gauge("cafe_running_chats", "Chats that are decoded now.", registry=registry)
        # Steps of the model.
        self.step_tokens = Histogram(
            "cafe_step_tokens", "Tokens of jobs read in a step.", buckets=_TOKENS, registry=registry
        )
        self.step_jobs = Histogram("cafe_step_jobs", "Jobs read in a step.", buckets=_SIZES, registry=registry)
        self.model_seconds = Counter(
            "cafe_model_seconds", "Time that the model reads jobs or decodes.", ["task"], registry=registry
        )
        self.idle_seconds = Counter("cafe_idle_seconds", "Time that the model waits for jobs.", registry=registry)
        self.heartbeat_age = Gauge("cafe_heartbeat_age_seconds", "Time since the model's last step.", registry=registry)
        self.engine_restarts = Counter("cafe_engine_restarts", "Restarts of the model's thread.", registry=registry)
        self.cache_hits = Counter("cafe_cache_hits", "Lookups in a cache.", ["cache", "hit"], registry=registry)
        # What a reader of streamed answers feels.
        self.first_token_seconds = Histogram(
            "cafe_time_to_first_token_seconds", "From a chat's arrival to its first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.token_seconds = Histogram(
            "cafe_time_between_tokens_seconds", "Between two tokens of a chat.", buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("cafe_tokens", "Tokens read or generated.", ["kind"], registry=registry)

    def render(self) -> bytes:
        """Return all values in Prometheus' text format."""
        return generate_latest(self.registry)
