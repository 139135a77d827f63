"""The web application: addresses and status codes around [`~service.RecommendService`].

    POST /recommend        recommend to one user or several
    GET  /health           whether the server is ready, and what it serves
    GET  /metrics          counters in Prometheus' text format
    POST /catalog/add      add items; needs the admin token
    POST /catalog/remove   hide items; needs the admin token

Every error is one sentence, `{"detail": "…"}`.
"""

import logging
import secrets
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ..model.recommender_lasar import Recommender
from .batcher import QueueFullError
from .schemas import (
    AddRequest,
    CatalogCounts,
    Health,
    Recommendation,
    Recommendations,
    RecommendRequest,
    RemoveRequest,
)
from .service import RecommendService


logger = logging.getLogger(__name__)
router = APIRouter()


def create_app(recommender: Recommender, *, admin_token: str | None = None, **options) -> FastAPI:
    """
    The web application of a recommender.

    Args:
        recommender ([`Recommender`]):
            The model with its catalogue.
        admin_token (`str`, *optional*):
            Token for changes of the catalogue, sent as `Authorization: Bearer TOKEN`. Without it, changes are
            refused. They last until the server stops.
        options:
            Arguments of [`~service.RecommendService`] and [`~batcher.Batcher`]: `num_beams`, `max_batch`,
            `max_wait_ms`, `max_queue` and `timeout`.

    Returns:
        `fastapi.FastAPI`: the application, for any ASGI server.

    Raises:
        `ValueError`: if an option is out of range.

    Example:

    ```python
    >>> import uvicorn
    >>> from lasar_hf import Recommender
    >>> from lasar_hf.serving import create_app

    >>> app = create_app(Recommender.from_pretrained("outputs/quickstart/model"), max_batch=32)
    >>> uvicorn.run(app)
    ```
    """
    service = RecommendService(recommender, **options)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with service.batcher:
            await service.warm_up()
            yield

    app = FastAPI(title="lasar_hf", version=version("lasar_hf"), lifespan=lifespan)
    app.state.service, app.state.admin_token = service, admin_token
    app.include_router(router)
    app.middleware("http")(service.metrics.measure)
    app.add_exception_handler(RequestValidationError, invalid_body)  # type: ignore[arg-type]
    return app


async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first problem of a body that does not have the expected form."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"][1:]))
    return JSONResponse({"detail": f"{where}: {first['msg']}." if where else f"{first['msg']}."}, 422)


async def find_service(request: Request) -> RecommendService:
    """The service of the application."""
    return request.app.state.service


async def check_admin(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """Refuse a change of the catalogue without the token."""
    token = request.app.state.admin_token
    if token is None:
        raise HTTPException(403, "Changes of the catalogue are off. Start the server with an admin token.")
    if not secrets.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
        raise HTTPException(
            401,
            "The admin token is missing or wrong. Send it as Authorization: Bearer TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )


Service = Annotated[RecommendService, Depends(find_service)]
ADMIN = [Depends(check_admin)]


@router.post("/recommend")
async def recommend(body: RecommendRequest, service: Service) -> Recommendation | Recommendations:
    """Recommend items to one user or several."""
    try:
        users, settings = service.read(body)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    try:
        results = await service.batcher.submit(users, settings)
    except QueueFullError:
        raise HTTPException(429, "Too many requests wait. Try again later.", {"Retry-After": "1"}) from None
    except TimeoutError:
        raise HTTPException(504, f"The request took longer than {service.batcher.timeout:g} seconds.") from None
    except Exception as error:
        logger.exception("A request failed.")
        raise HTTPException(500, "The model failed at this request. The server's log says why.") from error
    return results[0] if body.histories is None else {"results": results}  # type: ignore[return-value]


@router.get("/health")
async def health(service: Service, response: Response) -> Health:
    """Whether the server is ready, and what it serves."""
    is_running, config = service.batcher.is_running, service.recommender.model.config
    response.status_code = 200 if is_running else 503
    return Health(
        status="ready" if is_running else "stopped",
        queue_length=len(service.batcher),
        model="/".join(Path(config._name_or_path).parts[-2:]),  # of a Hub id, all; of a path on this machine, the end
        max_latent_steps=config.max_latent_steps,
        **service.counts().model_dump(),
    )


@router.get("/metrics")
async def metrics(service: Service) -> Response:
    """Counters in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.post("/catalog/add", dependencies=ADMIN)
async def add(body: AddRequest, service: Service) -> CatalogCounts:
    """Add items to the catalogue: new ones with their Semantic IDs, or removed ones, which return."""
    try:
        await service.add(body.items)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    return service.counts()


@router.post("/catalog/remove", dependencies=ADMIN)
async def remove(body: RemoveRequest, service: Service) -> CatalogCounts:
    """Hide items of the catalogue."""
    try:
        await service.remove(body.item_ids)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    return service.counts()
