"""Load a checkpoint and serve it on a port."""

import logging
import os
import socket
from contextlib import suppress

import uvicorn
from safetensors import SafetensorError
from transformers.utils import cached_file

from ..model.recommender_lasar import Recommender
from ..onednn import onednn_linear
from .app import create_app


logger = logging.getLogger("uvicorn.error")  # the server's own log, which shows this line


def serve(
    model: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    admin_token: str | None = None,
    revision: str | None = None,
    **options,
) -> None:
    """
    Serve a checkpoint until the process is interrupted or terminated; requests that wait are answered first.

    There is one process and one model. Encryption, users and limits per user are the work of a proxy before it.

    Args:
        model (`str`):
            Folder of a checkpoint, or a model id on the Hub.
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*, defaults to `8000`):
            Address to listen on; `"0.0.0.0"` for all networks, and port 0 for a free one.
        device (`str`, *optional*):
            Where to compute. Defaults to the accelerator, if there is one.
        admin_token (`str`, *optional*):
            As for [`create_app`]. Defaults to the environment variable `LASAR_ADMIN_TOKEN`.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub.
        options:
            As for [`create_app`].

    Raises:
        `SystemExit`: with one sentence, if the port is in use or the model cannot be loaded.

    Example:

    ```python
    >>> from lasar_hf.serving import serve

    >>> serve("outputs/quickstart/model", port=8000)
    ```
    """
    # The port first: loading a model may take minutes.
    with open_socket(host, port) as listener:
        try:
            cached_file(model, "config.json", revision=revision)  # says best what is wrong with a name
            recommender = Recommender.from_pretrained(model, device=device, revision=revision)
            token = admin_token or os.environ.get("LASAR_ADMIN_TOKEN") or None
            app = create_app(recommender, admin_token=token, **options)
        except (OSError, ValueError, SafetensorError) as error:
            name = model if os.path.isdir(model) else f"{model}, which is not a folder"
            raise SystemExit(f"Cannot serve {name}: {str(error).splitlines()[0]}") from error
        server = uvicorn.Server(uvicorn.Config(app, access_log=False))
        address = f"[{host}]" if ":" in host else host
        logger.info("Serving %s on http://%s:%d", model, address, listener.getsockname()[1])
        with onednn_linear(recommender.model), suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, or an exit with one sentence."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror.split(" (")[0]  # without the address, which follows in brackets
        raise SystemExit(f"Cannot listen on {host}, port {port}: {reason}. Choose another address.") from error
