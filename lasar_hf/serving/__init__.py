"""A web server that recommends: `lasar serve MODEL`."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f'Serving needs the package {error.name}: pip install "lasar_hf[serve]".') from error

from .app import create_app
from .server import serve


__all__ = ["create_app", "serve"]
