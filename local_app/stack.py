"""The whole application on this machine, under one folder: `Stack(folder).up()` starts and deploys, `down()` ends it.

Everything that `up` starts carries the folder's path in its environment (`MARKER`). That is how a second `up` finds what
still runs, and how `down` ends all of it, even after a crash, and nothing else: no list of process ids can go stale.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from local_app.certificates import certificates, make_certificates
from local_app.common import MARKER, REGION

PROJECT = Path(__file__).resolve().parent.parent
STACK_NAME = "tunedrop"
# One job at a time is what a laptop can train; a lost event shows after a minute, not fifteen.
PARAMETERS = {"MaxConcurrentJobs": "1", "ReconcileInterval": "rate(1 minute)"}
STARTUP_SECONDS = 60.0
SHUTDOWN_SECONDS = 15.0
ANSWER_SECONDS = 30.0


class StackError(Exception):
    """Something about the local stack that a person has to look at; the message says what and where."""


@dataclass(frozen=True)
class Outputs:
    """The template's outputs that the local app uses."""

    data_bucket: str
    artifact_bucket: str
    event_bus_name: str
    run_table: str
    topic_arn: str
    dead_letter_queue_url: str
    sagemaker_role_arn: str
    model_package_group: str
    training_image_uri: str
    job_prefix: str


@dataclass(frozen=True)
class Build:
    """What `sam build` made in `folder`: the template to deploy, and each function and layer by its logical id."""

    folder: Path
    digest: str

    @property
    def template(self) -> Path:
        """The template to deploy, which names the other folders."""
        return self.folder / "template.yaml"

    def paths(self, function: str) -> list[str]:
        """Return what Lambda has in `sys.path` for a function, for example `validate_dataset`: its code, then its layers."""
        template = yaml.safe_load(self.template.read_text())
        name = "".join(part.title() for part in function.split("_")) + "Function"
        layers = [*template["Globals"]["Function"]["Layers"], *template["Resources"][name]["Properties"].get("Layers", [])]
        return [str(self.folder / name), *(str(self.folder / layer["Ref"] / "python") for layer in layers)]


class Stack:
    """Tunedrop on this machine. State, logs and ports live under `folder` and survive `down` and crashes.

    `host` is the address that its servers listen on; `parameters` are template parameters on top of the local defaults;
    `progress` is told in one line what goes on.
    """

    access_key_id = "test"
    secret_access_key = "test"  # noqa: S105 - the emulator has no secrets; any non-empty value does
    region = REGION

    def __init__(
        self,
        folder: Path = PROJECT / ".tunedrop",
        *,
        host: str = "127.0.0.1",
        parameters: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.folder = folder.resolve()
        self.logs = self.folder / "logs"
        self.tls = certificates(self.folder / "tls")
        self._host = host
        self._parameters = {**PARAMETERS, **(parameters or {})}
        self._progress = progress

    # ---- for users of a running stack --------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """URL of every AWS service but SageMaker."""
        return f"https://{self._address['host']}:{self._address['aws']}"

    @property
    def sagemaker_endpoint(self) -> str:
        """URL of SageMaker."""
        return f"http://{self._address['host']}:{self._address['sagemaker']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which boto3, `sam` and `python -m release` talk to this stack and to nothing else."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return ours | {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_SAGEMAKER": self.sagemaker_endpoint,
            "AWS_CA_BUNDLE": str(self.tls.authority),
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def connect(self, kind: str, service: str) -> Any:
        """Return this stack's boto3 `client` or `resource` (the `kind`) of a service."""
        import boto3

        session = boto3.Session(self.access_key_id, self.secret_access_key, region_name=self.region)
        endpoint = self.sagemaker_endpoint if service == "sagemaker" else self.endpoint
        return getattr(session, kind)(service, endpoint_url=endpoint, verify=str(self.tls.authority))

    def client(self, service: str) -> Any:
        """Return a boto3 client of this stack, for example `client("s3")`."""
        return self.connect("client", service)

    @functools.cached_property
    def outputs(self) -> Outputs:
        """The deployed stack's outputs; StackError when it is not up."""
        self.check_running()
        outputs = outputs_of(self.client("cloudformation"), STACK_NAME)
        if outputs is None:
            raise StackError(f"Tunedrop is running in {self.folder} but not deployed. Finish with `tunedrop up`.")
        return outputs

    def function_environments(self, authority: str) -> dict[str, dict[str, str]]:
        """Return the variables of each deployed function, by its logical id, for one that runs outside of this stack.

        `authority` is where the certificate of this stack's authority lies there. Raises StackError when it is not up.
        """
        self.check_running()
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=STACK_NAME)
        resources = [resource for page in pages for resource in page["StackResourceSummaries"]]
        functions = [resource for resource in resources if resource["ResourceType"] == "AWS::Lambda::Function"]
        reached = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_CA_BUNDLE": authority}
        configuration = self.client("lambda").get_function_configuration
        return {
            function["LogicalResourceId"]: (
                configuration(FunctionName=function["PhysicalResourceId"])["Environment"]["Variables"] | reached
            )
            for function in functions
        }

    @property
    def running(self) -> bool:
        """Whether both servers answer."""
        return (self.folder / "address.json").exists() and all(map(self._healthy, (self.endpoint, self.sagemaker_endpoint)))

    def check_running(self) -> None:
        """Raise StackError unless both servers answer."""
        if not self.running:
            raise StackError(f"Tunedrop is not running in {self.folder}. Start it with `tunedrop up`.")

    # ---- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> Outputs:
        """Start what does not run, build and deploy what has changed, and return the outputs. Safe to repeat."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            started = time.monotonic()
            self._choose_address()
            servers = self._start_servers()
            built = build(self._progress, self.logs / "sam.log")
            for name, url in (("aws", self.endpoint), ("sagemaker", self.sagemaker_endpoint)):
                self._wait(name, url, servers.get(name))
            self._deploy(built)
            self.__dict__.pop("outputs", None)  # a deploy may have changed them
            outputs = self.outputs
            self._progress(f"up after {time.monotonic() - started:.1f} s: AWS at {self.endpoint}")
            return outputs

    def down(self) -> None:
        """End everything that was started in this folder, in order where it still runs in order; state stays."""
        # SageMaker first: it stops jobs and notes their state while there is an S3 to write to.
        for module in ("local_app.sagemaker.server", "local_app.aws.server"):
            self._end([process for process in self.processes() if module in process.cmdline()])
        self._end(self.processes())
        self._progress(f"down: nothing runs in {self.folder} any more")

    def _end(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            _signal(process.terminate)
        for process in _wait_gone(processes):
            _signal(process.kill)
        _wait_gone(processes)

    def processes(self) -> list[psutil.Process]:
        """Return every live process that was started in this folder, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # another user's, or gone since it was listed
                continue
        return [process for process in found if process.pid != os.getpid()]

    def interrupt(self, job: str) -> None:
        """Take the machine of a spot job away, as AWS may: it starts again with its checkpoints. Raises StackError."""
        request = urllib.request.Request(f"{self.sagemaker_endpoint}/_tunedrop/interrupt/{job}", method="POST")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - our own URL
                pass
        except urllib.error.HTTPError as error:
            raise StackError(json.load(error)["message"]) from None

    # ---- servers -----------------------------------------------------------------------------------------------------

    @property
    def _address(self) -> dict[str, Any]:
        try:
            address: dict[str, Any] = json.loads((self.folder / "address.json").read_text())
        except FileNotFoundError:
            raise StackError(f"Tunedrop has never run in {self.folder}. Start it with `tunedrop up`.") from None
        return address

    def _choose_address(self) -> None:
        """Keep the ports of the last time where we still hold them or they are free: the functions know them."""
        file = self.folder / "address.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        held = {name for name in ("aws", "sagemaker") if self._server(name)}
        if held and known["host"] != self._host:
            raise StackError(f"Tunedrop already listens on {known['host']}. End it with `tunedrop down` to move it.")
        if known.get("host") != self._host or not self.tls.authority.exists():
            make_certificates(self.folder / "tls", self._host)
        ports = {
            name: port
            if (port := known.get(name)) and (name in held or _is_free(self._host, port))
            else _free_port(self._host)
            for name in ("aws", "sagemaker")
        }
        file.write_text(json.dumps({"host": self._host, **ports}))

    def _server(self, name: str) -> psutil.Process | None:
        return next((p for p in self.processes() if f"local_app.{name}.server" in p.cmdline()), None)

    def _start_servers(self) -> dict[str, subprocess.Popen[bytes]]:
        address, state = self._address, self.folder
        own = f"{self.endpoint}/_tunedrop"
        options = {
            "aws": ["--tls-dir", str(self.folder / "tls")],
            "sagemaker": [
                "--s3-endpoint",
                self.endpoint,
                "--event-sink",
                f"{own}/events",
                "--authorizer",
                f"{own}/authorize",
            ],
        }
        started = {}
        for name, more in options.items():
            if self._server(name):
                continue
            command = [
                sys.executable,
                "-m",
                f"local_app.{name}.server",
                "--host",
                self._host,
                "--port",
                str(address[name]),
            ]
            command += ["--state-dir", str(state / name), *more]
            with (self.logs / f"{name}.log").open("ab") as log:
                started[name] = subprocess.Popen(  # noqa: S603 - our own command
                    command,
                    cwd=self.folder,
                    env={**self.environment, MARKER: str(self.folder)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal is for `tunedrop`, which ends these in order
                )
        return started

    def _wait(self, name: str, url: str, process: subprocess.Popen[bytes] | None) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._healthy(url):
            if (process and process.poll() is not None) or time.monotonic() > deadline:
                log = self.logs / f"{name}.log"
                raise StackError(f"The {name} emulator does not answer at {url}. The end of {log}:\n{_tail(log)}")
            time.sleep(0.1)

    def _healthy(self, url: str) -> bool:
        try:
            trust = ssl.create_default_context(cafile=self.tls.authority)
            # Where nobody listens the refusal comes at once; who is busy may take long to answer.
            with urllib.request.urlopen(f"{url}/_tunedrop/health", timeout=ANSWER_SECONDS, context=trust):  # noqa: S310 - our own URL
                return True
        except (urllib.error.URLError, OSError):
            return False

    # ---- deploy ------------------------------------------------------------------------------------------------------

    def _deploy(self, built: Build) -> None:
        parameters = self._parameters | {"SageMakerEndpointUrl": self.sagemaker_endpoint}
        wanted = hashlib.sha256(json.dumps([built.digest, parameters], sort_keys=True).encode()).hexdigest()
        stamp = self.folder / "deployed"
        if stamp.exists() and stamp.read_text() == wanted and outputs_of(self.client("cloudformation"), STACK_NAME):
            self._progress("stack: nothing changed since it was deployed")
            return
        self._progress("stack: sam deploy")
        overrides = [f'{name}="{value}"' for name, value in parameters.items()]
        options = ["--template-file", str(built.template), "--stack-name", STACK_NAME, "--parameter-overrides", *overrides]
        _sam(["deploy", *options], self.environment, self.logs / "sam.log")
        stamp.write_text(wanted)


def outputs_of(cloudformation: Any, stack_name: str) -> Outputs | None:
    """Return the outputs of a stack, local or on AWS; None when there is no such stack in working order."""
    good = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")
    stacks = cloudformation.get_paginator("describe_stacks").paginate().build_full_result()["Stacks"]
    stack = next((s for s in stacks if s["StackName"] == stack_name and s["StackStatus"] in good), None)
    if stack is None:
        return None
    values = {output["OutputKey"].lower(): output.get("OutputValue", "") for output in stack["Outputs"]}
    return Outputs(**{field.name: values[field.name.replace("_", "")] for field in dataclasses.fields(Outputs)})


def build(progress: Callable[[str], None] = lambda _line: None, log: Path = PROJECT / ".aws-sam/local.log") -> Build:
    """Run `sam build`, unless neither the template nor anything under functions/ or layers/ has changed since last time.

    The functions run here with this Python, so their layers are built for it; `sam build` alone builds for Lambda's.
    """
    python = "{}.{}".format(*sys.version_info)
    folder = PROJECT / ".aws-sam" / "local"
    built = Build(folder, _source_digest(python))
    stamp = folder / "built"
    folder.parent.mkdir(exist_ok=True)
    with _locked(folder.parent / "local.lock"):
        if stamp.exists() and stamp.read_text() == built.digest:
            progress("functions: nothing changed since they were built")
            return built
        progress("functions: sam build")
        _sam(["build"], {**os.environ, "LAMBDA_PYTHON": python, "PIP": f"{shlex.quote(sys.executable)} -m pip"}, log)
        stamp.write_text(built.digest)
    return built


def _source_digest(python: str) -> str:
    digest = hashlib.sha256(python.encode())
    folders = (PROJECT / "functions", PROJECT / "layers")
    sources = [p for f in folders for p in f.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for file in [PROJECT / "template.yaml", PROJECT / "samconfig.toml", *sorted(sources)]:
        digest.update(f"{file.relative_to(PROJECT)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sam(arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run `sam`, from its own environment beside ours, with the settings of samconfig.toml's `local`."""
    sam = PROJECT / ".venv-sam" / "bin" / "sam"
    if not sam.exists():
        raise StackError(f"{sam} is missing. `make install` puts aws-sam-cli there.")
    config = ["--config-file", str(PROJECT / "samconfig.toml"), "--config-env", "local"]
    command = [str(sam), *arguments[:1], *config, *arguments[1:]]
    with log.open("ab") as output:
        done = subprocess.run(  # noqa: S603 - our own command
            command,
            cwd=PROJECT,
            env={**environment, "SAM_CLI_TELEMETRY": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise StackError(f"`sam {arguments[0]}` failed. The end of {log}:\n{_tail(log)}")


# ---- small things ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that other processes of this machine respect; the system frees it when a process dies."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
        send()


def _wait_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait until the processes have ended and return those that have not; one its parent has not reaped has ended."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    while True:
        alive = [process for process in processes if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _tail(file: Path, lines: int = 30) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
