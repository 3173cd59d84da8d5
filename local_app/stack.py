"""The whole application on this machine, under one folder: `Stack(folder).up()` starts and deploys it, `down()` ends it.

Every process that `up` starts has the folder's path in its environment (`MARKER`). By this variable, a second `up` finds the
running servers, and `down` ends every process of this folder and no other, even after a crash. No list of process ids can
become outdated.

The command imports this module, and starts the emulators as processes through it: neither imports an emulator.
"""

import dataclasses
import functools
import hashlib
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from local_app.build import Build, build, sam
from local_app.certificates import certificates, make_certificates
from local_app.common import MARKER, PROJECT, REGION, STACK_NAME, StackError
from local_app.credentials import FILE as CREDENTIALS_FILE
from local_app.credentials import Credentials, post_signed, root_credentials
from local_app.processes import end, end_of, free_port, is_free, locked, processes_of

__all__ = ["PROJECT", "STACK_NAME", "Outputs", "Stack", "StackError", "read_outputs"]

SERVERS = ("aws", "sagemaker")
# A laptop trains one job at a time. `reconcile` recovers from a lost event within a minute instead of 15.
PARAMETERS = {"MaxConcurrentJobs": "1", "ReconcileInterval": "rate(1 minute)"}
# The services that the SageMaker emulator answers for, with the ends of the variables of their URLs.
OF_SAGEMAKER = {
    "sagemaker": "SAGEMAKER",
    "sagemaker-runtime": "SAGEMAKER_RUNTIME",
    "application-autoscaling": "APPLICATION_AUTO_SCALING",
    "bedrock": "BEDROCK",
    "bedrock-runtime": "BEDROCK_RUNTIME",
}
STARTUP_SECONDS = 60.0
RESPONSE_SECONDS = 30.0


@dataclass(frozen=True)
class Outputs:
    """The outputs of a deployed stack that the command and the local app use, and its parameters."""

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
    parameters: Mapping[str, str]


def read_outputs(cloudformation: Any, stack_name: str) -> Outputs | None:
    """Return the outputs of a stack, local or on AWS; None without a stack of this name that is completely deployed."""
    complete = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")
    stacks = cloudformation.get_paginator("describe_stacks").paginate().build_full_result()["Stacks"]
    stack = next((s for s in stacks if s["StackName"] == stack_name and s["StackStatus"] in complete), None)
    if stack is None:
        return None
    values: dict[str, Any] = {each["OutputKey"].lower(): each.get("OutputValue", "") for each in stack["Outputs"]}
    values["parameters"] = {each["ParameterKey"]: each.get("ParameterValue", "") for each in stack.get("Parameters", [])}
    return Outputs(**{field.name: values[field.name.replace("_", "")] for field in dataclasses.fields(Outputs)})


class Stack:
    """Tunedrop on this machine. State, logs and ports are under `folder` and survive `down` and crashes.

    The servers listen on the address `host`. `parameters` are template parameters that replace the local defaults.
    `progress` is called with one line for each step.
    """

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

    @functools.cached_property
    def credentials(self) -> Credentials:
        """The root credentials of the account. Only this user may read their file."""
        return root_credentials(self.folder)

    @property
    def endpoint(self) -> str:
        """URL of every AWS service except those of `sagemaker_endpoint`."""
        return f"https://{self._address['host']}:{self._address['aws']}"

    @property
    def sagemaker_endpoint(self) -> str:
        """URL of SageMaker, Application Auto Scaling and Bedrock."""
        return f"http://{self._address['host']}:{self._address['sagemaker']}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which boto3, `sam` and `python -m release` reach this stack and nothing else."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return ours | self.variables

    @property
    def variables(self) -> dict[str, str]:
        """The variables by which AWS's tools reach this stack."""
        return self.credentials.environment | {
            "AWS_ENDPOINT_URL": self.endpoint,
            **{f"AWS_ENDPOINT_URL_{name}": self.sagemaker_endpoint for name in OF_SAGEMAKER.values()},
            "AWS_CA_BUNDLE": str(self.tls.authority),
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def connect(self, kind: str, service: str) -> Any:
        """Return this stack's boto3 `client` or `resource` (the `kind`) of a service."""
        import boto3

        endpoint = self.sagemaker_endpoint if service in OF_SAGEMAKER else self.endpoint
        session = boto3.Session(*self.credentials, region_name=self.region)
        return getattr(session, kind)(service, endpoint_url=endpoint, verify=str(self.tls.authority))

    def client(self, service: str) -> Any:
        """Return a boto3 client of this stack, for example `client("s3")`."""
        return self.connect("client", service)

    @functools.cached_property
    def outputs(self) -> Outputs:
        """The deployed stack's outputs. Raises StackError when the stack is not up."""
        self.check_running()
        outputs = read_outputs(self.client("cloudformation"), STACK_NAME)
        if outputs is None:
            raise StackError(f"Tunedrop runs in {self.folder}, but is not deployed. Deploy it with `tunedrop up`.")
        return outputs

    def function_environments(self, authority: str) -> dict[str, dict[str, str]]:
        """Return the variables of each deployed function, by logical id, for a function that runs outside of this stack.

        `authority` is the path of this stack's CA certificate for that function. Raises StackError when the stack is not up.
        """
        self.check_running()
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=STACK_NAME)
        resources = [resource for page in pages for resource in page["StackResourceSummaries"]]
        functions = [resource for resource in resources if resource["ResourceType"] == "AWS::Lambda::Function"]
        endpoint = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_CA_BUNDLE": authority}
        configuration = self.client("lambda").get_function_configuration
        return {
            function["LogicalResourceId"]: (
                configuration(FunctionName=function["PhysicalResourceId"])["Environment"]["Variables"] | endpoint
            )
            for function in functions
        }

    @property
    def running(self) -> bool:
        """Whether both servers respond."""
        return (self.folder / "address.json").exists() and all(map(self._healthy, (self.endpoint, self.sagemaker_endpoint)))

    def check_running(self) -> None:
        """Raise StackError unless both servers respond."""
        if not self.running:
            raise StackError(f"Tunedrop is not running in {self.folder}. Start it with `tunedrop up`.")

    def interrupt(self, job: str) -> None:
        """Take a spot job's machine away, as AWS may: the job starts again from its checkpoints. Raises StackError."""
        try:
            post_signed(f"{self.sagemaker_endpoint}/_tunedrop/interrupt/{job}", self.credentials, b"{}")
        except urllib.error.HTTPError as error:
            raise StackError(json.load(error)["message"]) from None

    # ---- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> Outputs:
        """Start the servers, build and deploy the changes, and return the outputs. Idempotent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # data, credentials and keys of this user
        self.logs.mkdir(exist_ok=True)
        if not ipaddress.ip_address(socket.gethostbyname(self._host)).is_loopback:
            self._progress(
                f"listening on {self._host}: whatever reaches this address can send requests; only requests that are signed "
                f"with the credentials in {self.folder / CREDENTIALS_FILE}, or with a role's, do anything"
            )
        with locked(self.folder / "lock"):
            started = time.monotonic()
            self._choose_address()
            servers = self._start_servers()
            built = build(self._progress, self.logs / "sam.log")
            for name, url in (("aws", self.endpoint), ("sagemaker", self.sagemaker_endpoint)):
                self._wait(name, url, servers.get(name))
            self.outputs = self._deploy(built)
            self._progress(f"up after {time.monotonic() - started:.1f} s: AWS at {self.endpoint}")
            return self.outputs

    def down(self) -> None:
        """End every process of this folder. State stays."""
        # SageMaker first: it stops its jobs and writes their state to S3, which the AWS emulator serves.
        for module in ("local_app.sagemaker.server", "local_app.aws.server"):
            end([process for process in self.processes() if module in process.cmdline()])
        end(self.processes())
        self._progress(f"down: no process of {self.folder} is left")

    def processes(self) -> list[psutil.Process]:
        """Return every live process that was started in this folder, whatever its parent is."""
        return processes_of(self.folder)

    # ---- servers -----------------------------------------------------------------------------------------------------

    @property
    def _address(self) -> dict[str, Any]:
        try:
            address: dict[str, Any] = json.loads((self.folder / "address.json").read_text())
        except FileNotFoundError:
            raise StackError(f"Tunedrop has never run in {self.folder}. Start it with `tunedrop up`.") from None
        return address

    def _choose_address(self) -> None:
        """Keep the ports of the last start where possible: the deployed functions have them in their environment."""
        file = self.folder / "address.json"
        last = json.loads(file.read_text()) if file.exists() else {}
        running = {name for name in SERVERS if self._server(name)}
        if running and last["host"] != self._host:
            raise StackError(f"Tunedrop already listens on {last['host']}. To move it, end it with `tunedrop down` first.")
        if last.get("host") != self._host or not self.tls.authority.exists():
            make_certificates(self.folder / "tls", self._host)
        ports = {
            name: port
            if (port := last.get(name)) and (name in running or is_free(self._host, port))
            else free_port(self._host)
            for name in SERVERS
        }
        file.write_text(json.dumps({"host": self._host, **ports}))

    def _server(self, name: str) -> psutil.Process | None:
        return next((p for p in self.processes() if f"local_app.{name}.server" in p.cmdline()), None)

    def _start_servers(self) -> dict[str, subprocess.Popen[bytes]]:
        """Start the servers that do not run yet, and return their processes."""
        own = f"{self.endpoint}/_tunedrop"
        options = {
            "aws": ["--tls-dir", str(self.folder / "tls")],
            "sagemaker": [
                *("--private", str(self.folder)),
                *("--s3-endpoint", self.endpoint, "--event-sink", f"{own}/events", "--authorizer", f"{own}/authorize"),
            ],
        }
        return {name: self._start_server(name, options[name]) for name in SERVERS if not self._server(name)}

    def _start_server(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"local_app.{name}.server", "--host", self._host]
        command += ["--port", str(self._address[name]), "--state-dir", str(self.folder / name), *options]
        with (self.logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command
                command,
                cwd=self.folder,
                env={**self.environment, MARKER: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for `tunedrop`, which ends the servers in order
            )

    def _wait(self, name: str, url: str, process: subprocess.Popen[bytes] | None) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._healthy(url):
            if (process and process.poll() is not None) or time.monotonic() > deadline:
                log = self.logs / f"{name}.log"
                raise StackError(f"The {name} emulator does not respond at {url}. The end of {log}:\n{end_of(log)}")
            time.sleep(0.1)

    def _healthy(self, url: str) -> bool:
        try:
            trust = ssl.create_default_context(cafile=self.tls.authority)
            # Without a server, the refusal comes at once. A busy server may need long to respond.
            with urllib.request.urlopen(f"{url}/_tunedrop/health", timeout=RESPONSE_SECONDS, context=trust):  # noqa: S310
                return True
        except (urllib.error.URLError, OSError):
            return False

    # ---- deploy ------------------------------------------------------------------------------------------------------

    def _deploy(self, built: Build) -> Outputs:
        """Run `sam deploy`, unless the build and the parameters are unchanged since the last deploy; return the outputs."""
        parameters = self._parameters | {"SageMakerEndpointUrl": self.sagemaker_endpoint}
        digest = hashlib.sha256(json.dumps([built.digest, parameters], sort_keys=True).encode()).hexdigest()
        stamp = self.folder / "deployed"
        cloudformation = self.client("cloudformation")
        outputs = read_outputs(cloudformation, STACK_NAME)
        if outputs and stamp.exists() and stamp.read_text() == digest:
            self._progress("stack: unchanged since the last deploy")
            return outputs
        self._progress("stack: sam deploy")
        overrides = [f'{name}="{value}"' for name, value in parameters.items()]
        options = ["--template-file", str(built.template), "--stack-name", STACK_NAME, "--parameter-overrides", *overrides]
        sam(["deploy", *options], self.environment, self.logs / "sam.log")
        stamp.write_text(digest)
        outputs = read_outputs(cloudformation, STACK_NAME)
        assert outputs is not None  # `sam deploy` succeeded
        return outputs
