"""A real Triton server answers from a repository, streamed, by gRPC and by HTTP.

The server is that of the package ``nvidia-pytriton``: Triton with its Python backend and no
other, for the CPU. Its build of 2.51 reads tensors wrongly with NumPy 2, so the tests need an
environment with NumPy 1, ``nvidia-pytriton`` and ``tritonclient[grpc]``.
"""

import base64
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings
from mvlm_export.exporter.triton_repository import write_repository

from .conftest import Silent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("pytriton") is None or int(np.__version__.split(".")[0]) > 1,
        reason="needs nvidia-pytriton, and NumPy below 2",
    ),
]
ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples/nano/images/shapes.png"
QUESTION = "describe the picture."


def free_port():
    with closing(socket.socket()) as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@contextmanager
def serving(repository, work):
    """A server's HTTP and gRPC ports; its Python sees the packages that this one sees."""
    (package,) = find_spec("pytriton").submodule_search_locations
    home = Path(package) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = work / "backends" / "python"
    shutil.copytree(home / "backends" / "python", backend)
    shutil.copy(
        home / "python_backend_stubs" / version / "triton_python_backend_stub", backend
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", work / "venv"], check=True)
    (packages,) = (work / "venv").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path and not path.startswith(sys.base_prefix)]
    (packages / "seen.pth").write_text("\n".join(seen))
    libraries = [
        sysconfig.get_config_var("LIBDIR"),
        Path(package).parent / "nvidia_pytriton.libs",
    ]
    environment = {
        **os.environ,
        "PATH": f"{work / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    http, grpc = free_port(), free_port()
    command = [
        *(home / "bin" / "tritonserver", f"--model-repository={repository}"),
        *(f"--backend-directory={work / 'backends'}", "--model-control-mode=explicit"),
        *("--load-model=mvlm", "--allow-metrics=false", "--http-address=127.0.0.1"),
        *("--grpc-address=127.0.0.1", f"--http-port={http}", f"--grpc-port={grpc}"),
    ]
    with (work / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(server, http, work / "server.log")
        yield http, grpc
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_ready(server, port, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    settings = CompileSettings(
        output=tmp_path_factory.mktemp("nano") / "bundle", parity=False, threads=1
    )
    compile_checkpoint(settings, Silent())
    return settings.output


@pytest.fixture(scope="module")
def ports(nano, tmp_path_factory):
    work = tmp_path_factory.mktemp("server")
    loading = {"threads": "1", "verify": "false"}
    written = write_repository(Bundle.load(nano), work / "models", loading=loading)
    config = written.path / "mvlm" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    with serving(written.path, work) as found:
        yield found


class Client:
    """A gRPC stream, as docs/triton.md shows it."""

    def __init__(self, port):
        self.grpc = pytest.importorskip("tritonclient.grpc")
        self._client = self.grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self._answers = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def tensor(self, name, values, kind="BYTES", dtype=np.object_):
        made = self.grpc.InferInput(name, [len(values)], kind)
        made.set_data_from_numpy(np.array(values, dtype))
        return made

    def send(self, *tensors):
        self._client.async_stream_infer("mvlm", list(tensors))

    def ask(self, *tensors):
        """Rows of an answer, or the error's message."""
        self.send(*tensors)
        rows = []
        while not rows or not rows[-1]["final"]:
            result, error = self._answers.get(timeout=60)
            if error is not None:
                return error.message()
            outputs = ("text", "final", "finish_reason", "timings")
            rows.append({name: result.as_numpy(name)[0] for name in outputs})
        return rows

    def close(self, cancel=False):
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


@pytest.fixture
def client(ports):
    made = Client(ports[1])
    yield made
    made.close()


def text_of(rows):
    assert isinstance(rows, list), rows
    return b"".join(row["text"] for row in rows).decode()


def test_the_answer_is_streamed(nano, client):
    rows = client.ask(
        client.tensor("image", [PICTURE.read_bytes()]), client.tensor("prompt", [QUESTION])
    )
    expected = VLM.load(nano, threads=1).generate(PICTURE, QUESTION)
    assert text_of(rows) == expected.text
    assert len(rows) > 10
    assert rows[-1]["finish_reason"] == expected.finish_reason.encode()
    timings = json.loads(rows[-1]["timings"])
    assert timings["decode_tokens"] == expected.timings.decode_tokens


def test_settings_are_used(nano, client):
    rows = client.ask(
        client.tensor("prompt", ["tell me a story"]),
        client.tensor("max_tokens", [9], "INT32", np.int32),
        client.tensor("temperature", [0.9], "FP64", np.float64),
        client.tensor("seed", [3], "INT64", np.int64),
        client.tensor("stop", ["zzz", "qqq"]),
    )
    settings = {"max_tokens": 9, "temperature": 0.9, "seed": 3, "stop": ["zzz", "qqq"]}
    expected = VLM.load(nano, threads=1).generate(None, "tell me a story", **settings)
    assert text_of(rows) == expected.text


def test_errors_have_their_messages(client):
    picture, prompt = client.tensor("image", [b"xx"]), client.tensor("prompt", [QUESTION])
    assert "not a picture that Pillow can read" in client.ask(picture, prompt)
    assert "The request has no prompt" in client.ask(picture)
    tokens = client.tensor("max_tokens", [0], "INT32", np.int32)
    assert "max_tokens is 0" in client.ask(prompt, tokens)
    assert text_of(client.ask(prompt))


def test_two_instances_answer_side_by_side_and_outlive_a_cancelled_request(ports, nano):
    settings = ("max_tokens", [600], "INT32", np.int32)
    leaving, staying = Client(ports[1]), Client(ports[1])
    # At this temperature an answer rarely ends early, so it is cut short by leaving.
    leaving.send(
        leaving.tensor("prompt", ["tell me a story"]),
        leaving.tensor(*settings),
        leaving.tensor("temperature", [2.0], "FP64", np.float64),
        leaving.tensor("seed", [1], "INT64", np.int64),
    )
    prompt = staying.tensor("prompt", [QUESTION])
    expected = VLM.load(nano, threads=1).generate(None, QUESTION).text
    assert text_of(staying.ask(prompt)) == expected
    leaving.close(cancel=True)
    assert [text_of(staying.ask(prompt)) for _ in range(3)] == [expected] * 3
    staying.close()


def test_the_documents_client_runs(ports, nano, monkeypatch, capsys):
    pytest.importorskip("tritonclient.grpc")
    text = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    assert "localhost:8001" in code.group(1)
    monkeypatch.chdir(ROOT)
    exec(code.group(1).replace("localhost:8001", f"127.0.0.1:{ports[1]}"), {})
    expected = VLM.load(nano, threads=1).generate(PICTURE, QUESTION)
    answer, _, timings = capsys.readouterr().out.partition("\n")
    assert answer == expected.text
    assert json.loads(timings)["decode_tokens"] == expected.timings.decode_tokens


def post(port, **body):
    address = f"http://127.0.0.1:{port}/v2/models/mvlm/generate_stream"
    request = urllib.request.Request(address, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_http_streams_too(ports, nano):
    address = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    *deltas, last = post(ports[0], prompt=QUESTION, image=address, max_tokens=60)
    expected = VLM.load(nano, threads=1).generate(PICTURE, QUESTION)
    assert "".join(delta["text"] for delta in deltas) == expected.text
    assert (last["final"], last["finish_reason"]) == (True, expected.finish_reason)


def test_http_errors_have_their_messages(ports):
    (answer,) = post(ports[0], prompt=QUESTION, max_tokens=0)
    assert "max_tokens is 0" in answer["error"]
