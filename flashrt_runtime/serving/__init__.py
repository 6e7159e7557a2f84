"""A policy behind HTTP and openpi's websocket protocol, in one process on one port (extra `[server]`)."""

from __future__ import annotations

from .app import create_app
from .server import listen, serve
from .settings import ServerSettings
from .worker import ModelWorker, Prediction

__all__ = ["ModelWorker", "Prediction", "ServerSettings", "create_app", "listen", "serve"]
