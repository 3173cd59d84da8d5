"""The console's addresses, and which requests they admit.

Every address begins with a secret of this process. A request without it, one to another host name (a page of another site
that rebinds its name to 127.0.0.1), and a change that another origin asks for are refused. A cookie would be sent to every
port of 127.0.0.1 (RFC 6265, 8.5), also to servers of other users; an address is not.
"""

import asyncio
import mimetypes
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import compare_digest
from typing import Any

from botocore.exceptions import ClientError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_app.stack import StackError
from pipeline.aws import read_object
from tunedrop import object_keys
from tunedrop.plain import printable
from tunedrop_cli.console.live import Live
from tunedrop_cli.console.pages import STATIC, Pages
from tunedrop_cli.console.preview import preview
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.job_log import JobLog
from tunedrop_cli.location import UNREACHABLE

EVERY = 1.0  # seconds between two looks at a run
RUNS_EVERY = 2.0  # the same at all runs
OWN_PAGES = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# A report has a policy of its own. The sandbox gives it an origin of its own, too: its script can ask the console nothing.
REPORTS = "sandbox allow-scripts allow-popups"
FILES = ("data", "config", "tests")


class Guard:
    """Refuses strangers, and adds the headers by which browsers protect the pages."""

    def __init__(self, application: ASGIApp, secret: str):
        self._application, self._secret = application, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self._application(scope, receive, send)
        if not self._admits(scope):
            refused = PlainTextResponse("This console answers under the address that it printed, and nowhere else.\n", 403)
            return await refused(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("content-security-policy", OWN_PAGES)
                headers.setdefault("cache-control", "no-store")
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "same-origin"
            await send(message)

        return await self._application(scope, receive, send_with_headers)

    def _admits(self, scope: Scope) -> bool:
        headers, port = Headers(scope=scope), scope["server"][1]
        host = headers.get("host", "")
        if host not in {f"127.0.0.1:{port}", f"localhost:{port}"}:
            return False
        if scope["method"] not in {"GET", "HEAD"} and headers.get("origin") != f"http://{host}":
            return False
        beginning = scope["path"].removeprefix("/").partition("/")[0]  # of `OPTIONS *`, there is no slash
        return compare_digest(beginning.encode(), self._secret.encode())


class _OfThread(threading.local):
    """The deployment of each thread: boto3's resources are not for several threads.

    https://docs.aws.amazon.com/boto3/latest/guide/resources.html#multithreading-or-multiprocessing-with-resources
    """

    def __init__(self, make: Callable[[], Deployment]):
        self.deployment = make()


class Console:
    """Answers the requests. `make` returns a Deployment, one for each thread."""

    def __init__(self, make: Callable[[], Deployment], secret: str, place: str):
        self._mine = _OfThread(make)
        self.pages = Pages(f"/{secret}", place)
        self.routes = [
            Route("/", self.home),
            Route("/live", self.live),
            Route("/standing", self.standing),
            Route("/check", self.check, methods=["POST"]),
            Route("/drop", self.drop, methods=["POST"]),
            Route("/redrive", self.redrive, methods=["POST"]),
            Route("/compare", self.compare),
            Route("/lines/{line:path}", self.line),
            Route("/runs/index.html", self.index),
            Route("/runs/{run_id}", self.run),
            Route("/runs/{run_id}/live", self.live_run),
            Route("/runs/{run_id}/log", self.log),
            Route("/runs/{run_id}/stop", self.stop, methods=["POST"]),
            Route("/runs/{run_id}/{name:path}", self.file),
            Route("/static/{name}", self.static),
        ]

    @property
    def _deployment(self) -> Deployment:
        return self._mine.deployment

    # --- pages ---

    def home(self, _request: Request) -> Response:
        """Answer with the page of all runs."""
        return HTMLResponse(self.pages.home(self._deployment))

    def standing(self, _request: Request) -> Response:
        """Answer with lines, endpoints and undelivered events."""
        return HTMLResponse(self.pages.standing(self._deployment))

    def run(self, request: Request) -> Response:
        """Answer with the page of a run."""
        live = Live(self._deployment.find(request.path_params["run_id"]))
        live.look(self._deployment)
        return HTMLResponse(self.pages.run(live, self._deployment))

    def line(self, request: Request) -> Response:
        """Answer with the history of a line."""
        return HTMLResponse(self.pages.line(self._deployment, request.path_params["line"]))

    def compare(self, request: Request) -> Response:
        """Answer with the differences of the runs that the query names."""
        runs = [self._deployment.find(name) for name in request.query_params.getlist("run")]
        return HTMLResponse(self.pages.compare(self._deployment, runs))

    # --- files ---

    def index(self, _request: Request) -> Response:
        """Answer with the stack's page of published runs."""
        page = read_object(self._deployment.s3, self._deployment.outputs.artifact_bucket, object_keys.INDEX)
        if page is None:
            raise StackError("No run has been published yet.")
        return HTMLResponse(page, headers={"content-security-policy": REPORTS})

    def file(self, request: Request) -> Response:
        """Answer with a file of a run's folder, such as its report. The browser does not run what is no page of ours."""
        name = request.path_params["name"]
        content = self._deployment.read(self._deployment.find(request.path_params["run_id"]), name)
        if content is None:
            raise StackError(f"The run has no file '{name}'.")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(content, media_type=kind, headers={"content-security-policy": REPORTS})

    def log(self, request: Request) -> Response:
        """Answer with the log of a run's jobs, as `tunedrop logs` prints it."""
        run, log, positions = self._deployment.find(request.path_params["run_id"]), JobLog(), dict[str, str]()
        lines = [
            line
            for job in filter(None, (run.train_job, run.test_job))
            for stream, message in self._deployment.log_events(job, positions)
            for line in log.own_lines(stream, message)
        ]
        text = "\n".join(map(printable, [*lines, *log.unfinished_start()]))
        return PlainTextResponse(text or f"{run.run_id} has no job: it is {in_words(run.state)}.")

    def static(self, request: Request) -> Response:
        """Answer with a script or a style of the pages."""
        path = STATIC.get(request.path_params["name"])
        if path is None:
            raise StackError("There is no such file.")
        return Response(path.read_bytes(), media_type=mimetypes.guess_type(path.name)[0])

    # --- changes ---

    async def check(self, request: Request) -> Response:
        """Validate the sent files as the stack would; answer with the receipt."""
        return await self._with_files(request, self._checked)

    async def drop(self, request: Request) -> Response:
        """Drop the sent files; send the browser to the page of the run."""
        return await self._with_files(request, self._dropped)

    async def _with_files(self, request: Request, use: Callable[[dict[str, Path]], Response]) -> Response:
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            form = await stack.enter_async_context(request.form())
            files = {}
            try:
                for field in FILES:
                    sent = form.get(field)
                    if isinstance(sent, UploadFile) and sent.filename:
                        files[field] = Path(folder, field, Path(sent.filename).name)
                        await run_in_threadpool(_save, sent, files[field])
                if "data" not in files:
                    raise StackError("Choose a dataset first.")
                return await run_in_threadpool(use, files)
            except StackError as error:
                return HTMLResponse(self.pages.problem(str(error)), 400)

    def _checked(self, files: dict[str, Path]) -> Response:
        data, config, tests = (files.get(field) for field in FILES)
        assert data is not None
        contents = [None if path is None else path.read_bytes() for path in (config, tests)]
        receipt = preview(self._deployment, data, *contents)
        named = [None if path is None else Path(path.name) for path in (config, tests)]
        return HTMLResponse(self.pages.receipt(receipt, Path(data.name), *named))

    def _dropped(self, files: dict[str, Path]) -> Response:
        run = self._deployment.drop(files["data"], files.get("config"), files.get("tests"))
        return Response(headers={"hx-redirect": f"{self.pages.base}/runs/{run.run_id}"})

    def stop(self, request: Request) -> Response:
        """Stop a run; answer with how it ended."""
        try:
            ended = self._deployment.stop(self._deployment.find(request.path_params["run_id"]))
        except StackError as error:
            return HTMLResponse(self.pages.problem(str(error)), 400)
        return PlainTextResponse(f"{ended.run_id}: {in_words(ended.state)}")

    def redrive(self, _request: Request) -> Response:
        """Send undelivered events to their functions again; answer with their number."""
        sent = list(self._deployment.redrive())
        return PlainTextResponse(f"{len(sent)} events were sent again.")

    # --- what changes while a page is open ---

    def live(self, request: Request) -> Response:
        """Send the table of all runs whenever it has changed."""
        return _events(request, lambda: ({"runs": self.pages.runs(self._deployment)}, False), RUNS_EVERY)

    def live_run(self, request: Request) -> Response:
        """Send the parts of a run's page that have changed, until the run has ended."""
        live = Live(self._deployment.find(request.path_params["run_id"]))

        def look() -> tuple[dict[str, str], bool]:
            live.look(self._deployment)
            return self.pages.parts(live, self._deployment), live.ended

        return _events(request, look, EVERY)


def _events(request: Request, look: Callable[[], tuple[dict[str, str], bool]], every: float) -> Response:
    """Stream the parts that `look` returns, each when it has changed, until `look` says that nothing more will come.

    A carriage return ends a line of the stream, too, and an answer of a model may have one. If AWS does not answer, the
    stream ends; the browser opens another one.
    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    async def stream() -> AsyncIterator[str]:
        sent: dict[str, str] = {}
        while not await request.is_disconnected():
            try:
                parts, ended = await run_in_threadpool(look)
            except (StackError, ClientError, *UNREACHABLE):
                return
            for name, html in parts.items():
                if sent.get(name) != html:
                    sent[name] = html
                    lines = "".join(f"data: {line}\n" for line in html.replace("\r", "\n").split("\n"))
                    yield f"event: {name}\n{lines}\n"
            if ended:
                yield "event: over\ndata: \n\n"
                return
            await asyncio.sleep(every)

    return StreamingResponse(stream(), media_type="text/event-stream")


def _save(sent: UploadFile, path: Path) -> None:
    """Store a sent file. Raises StackError for a name that no file can have, and for a full disk."""
    try:
        path.parent.mkdir()
        with path.open("wb") as file:
            while part := sent.file.read(2**20):
                file.write(part)
    except (OSError, ValueError) as error:
        raise StackError(f"{sent.filename} could not be stored: {error}") from None


def application(make: Callable[[], Deployment], secret: str, place: str) -> Starlette:
    """Return the console of a stack. Its addresses begin with `/<secret>/`; `place` says where the stack is."""
    console = Console(make, secret, place)

    def not_found(_request: Request, error: Any) -> Response:
        return HTMLResponse(console.pages.error(str(error)), 404)

    def unreachable(_request: Request, error: Any) -> Response:
        return HTMLResponse(console.pages.error(f"AWS does not answer: {error}"), 503)

    def refused(_request: Request, error: Any) -> Response:
        return HTMLResponse(console.pages.error(f"AWS refuses the request: {error}"), 502)

    return Starlette(
        routes=[Mount(f"/{secret}", routes=console.routes)],
        middleware=[Middleware(Guard, secret=secret)],
        exception_handlers={StackError: not_found, ClientError: refused, **dict.fromkeys(UNREACHABLE, unreachable)},
    )
