"""`flashrt serve` on many GPUs: Ray Serve starts the replicas, spreads the requests and counts them.

    pip install 'flashrt-runtime[server,ray]'
    serve run examples.ray_serve.policy:build checkpoint=DIR            # one replica a GPU, scaled by demand
    serve run examples.ray_serve.policy:build checkpoint=DIR gpus=0 max_replicas=2   # on a CPU
    serve run examples/ray_serve/config.yaml                            # the same, written down

Every replica is the server of `flashrt serve`: the same routes, checks and metrics, one observation at a time
on the model's own thread. What Ray adds is in front of it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from flashrt_runtime.loading import load_model
from flashrt_runtime.serving import ModelWorker, ServerSettings, create_app

# One is computed and one is decoded meanwhile; more would only wait inside a replica that another could help.
ONGOING = 3
QUEUED = 64  # at each of Ray's proxies; beyond it 503


class Arguments(BaseModel):
    """What `serve run` may be given, as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    config: str = "auto"
    views: int = 2
    hardware: str = "auto"
    precision: str | None = None
    layout: str = "auto"
    prompt: str | None = None
    gpus: float = 1.0  # of each replica; 0.5 lets two share one
    cpus: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 8


@serve.ingress()
class PolicyReplica:
    """One loaded policy with its server; made in a process of its own by Ray."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        given = Arguments(**arguments)
        self.settings = ServerSettings(
            queue_size=ONGOING, layout=given.layout, default_prompt=given.prompt
        )
        digests: list[str] = []

        def load() -> Any:
            policy = load_model(
                given.checkpoint,
                config=given.config,
                num_views=given.views,
                hardware=given.hardware,
                precision=given.precision,
            )
            digests.append(policy.checkpoint_digest)
            return policy

        self.worker = ModelWorker(load, self.settings.queue_size)
        self.digest = digests[0]

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray after the constructor."""
        app = create_app(self.worker, self.settings, self.digest)
        replica = serve.get_replica_context().replica_id.unique_id

        @app.middleware("http")
        async def name_replica(request: Any, answer: Any) -> Any:
            response = await answer(request)
            response.headers["X-Replica"] = replica
            return response

        return app

    def check_health(self) -> None:
        """Called by Ray every few seconds; a replica that raises is replaced."""
        problem = self.worker.problem(self.settings.stuck_after_s)
        if problem is not None:
            raise RuntimeError(problem)


def build(arguments: Arguments) -> serve.Application:
    """The application of `serve run examples.ray_serve.policy:build`."""
    deployment = serve.deployment(
        PolicyReplica,
        name="policy",
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": 1.5,  # a robot waits for one inference, rarely for two
            "upscale_delay_s": 3,
            "downscale_delay_s": 300,  # loading and capturing graphs takes longer than a pause of the robots
            "look_back_period_s": 15,
        },
    )
    return deployment.bind(arguments.model_dump())
