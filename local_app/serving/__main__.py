"""The server process that stands for the vLLM container on this machine: an OpenAI API with LoRA adapters, on the CPU.

    SERVING_TOKEN=… python -m local_app.serving --model .tunedrop/models/SmolLM2-135M-Instruct --port 8080

It listens on 127.0.0.1 as soon as the model is loaded. SIGTERM ends it after the requests under way. The settings of vLLM's
container that it has: SM_VLLM_MODEL and SM_VLLM_SERVED_MODEL_NAME (names of the base model), SM_VLLM_DTYPE,
SM_VLLM_MAX_MODEL_LEN, SM_VLLM_ENABLE_LORA, SM_VLLM_MAX_LORA_RANK and VLLM_ALLOW_RUNTIME_LORA_UPDATING.

`transformers serve` (5.23) has no adapters, no DELETE and no limit of the context, which the contract needs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from local_app.asgi import Application, server_config
from local_app.serving.app import ServingApp
from local_app.serving.model import ServedModel

# The longest that SIGTERM waits for an answer: SageMaker lets an invocation stream for 8 minutes.
GRACE_SECONDS = 8 * 60


async def serve(application: Application, port: int) -> None:
    """Serve an application on 127.0.0.1 until SIGTERM or SIGINT, and then finish the requests under way."""
    from hypercorn.asyncio import serve as run

    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    config = server_config(bind=[f"127.0.0.1:{port}"], graceful_timeout=GRACE_SECONDS, loglevel="WARNING")
    await run(application, config, shutdown_trigger=end.wait)  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> None:
    """Load the model and serve it. Exits with a message if the model or the token is missing."""
    parser = argparse.ArgumentParser(prog="python -m local_app.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    token = os.environ.get("SERVING_TOKEN")
    if not token:
        sys.exit("SERVING_TOKEN is not set: every request must carry this token.")
    if not (options.model / "config.json").is_file():
        sys.exit(f"There is no model in {options.model}: config.json is missing.")
    model = ServedModel(options.model, os.environ)
    logging.getLogger("serving").info("model=%s http://127.0.0.1:%d", model.name, options.port)
    asyncio.run(serve(ServingApp(model, token), options.port))


if __name__ == "__main__":
    main()
