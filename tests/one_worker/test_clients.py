"""Other people's clients: Anthropic's SDK, LangChain, the Vercel AI SDK, openai-node, and the official SDK in a browser.

The JavaScript ones are installed with npm from `tests/clients/package.json`.
"""

import functools
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anthropic
import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from playwright.sync_api import sync_playwright

from services.local.plan import ROOT
from tests.harness import free_ports, running
from tests.one_worker.conftest import CHROMIUM, needs_chromium
from tests.up import MODEL, Up

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
CLIENTS = ROOT / "tests/clients"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm on PATH to install the JavaScript clients")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts with what they need."""
    folder = tmp_path_factory.mktemp("js") / "clients"
    shutil.copytree(CLIENTS, folder)
    subprocess.run(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, check=True)
    return folder


WEATHER = {"name": "weather", "description": "The weather in a city.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}}


class TestAnthropic:
    @pytest.fixture
    def client(self, up: Up) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=up.base, api_key=up.key, max_retries=0, timeout=120)

    def test_a_message_a_stream_and_its_count(self, client: anthropic.Anthropic) -> None:
        asked = [{"role": "user", "content": "Say hello."}]
        message = client.messages.create(model=MODEL, max_tokens=8, system="Be short.", messages=asked)  # type: ignore[arg-type]
        assert message.content[0].text  # type: ignore[union-attr]
        counted = client.messages.count_tokens(model=MODEL, system="Be short.", messages=asked)  # type: ignore[arg-type]
        assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        with client.messages.stream(model=MODEL, max_tokens=8, messages=asked) as stream:  # type: ignore[arg-type]
            assert "".join(stream.text_stream) == stream.get_final_text()

    def test_a_tool_round_trip(self, client: anthropic.Anthropic) -> None:
        create = functools.partial(client.messages.create, model=MODEL, max_tokens=120, tools=[WEATHER],
                                   extra_body={"temperature": 0})
        asked = [{"role": "user", "content": "Weather in Rome?"}]
        first = create(messages=asked, tool_choice={"type": "tool", "name": "weather"})
        call = next(block for block in first.content if block.type == "tool_use")
        assert isinstance(call.input["city"], str)  # type: ignore[index]
        assert first.stop_reason == "tool_use"
        answer = create(messages=[
            *asked, {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
        ], tool_choice={"type": "none"})
        assert answer.content[0].text  # type: ignore[union-attr]

    def test_errors_are_the_sdks_own_classes(self, up: Up, client: anthropic.Anthropic) -> None:
        asked = [{"role": "user", "content": "x"}]
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(model="none", max_tokens=1, messages=asked)  # type: ignore[arg-type]
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model=MODEL, max_tokens=1_000_000, messages=asked)  # type: ignore[arg-type]
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=up.base, api_key="x", max_retries=0).messages.create(
                model=MODEL, max_tokens=1, messages=asked)  # type: ignore[arg-type]


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


class TestLangChain:
    @pytest.fixture
    def chat(self, up: Up) -> ChatOpenAI:
        return ChatOpenAI(model=MODEL, base_url=up.base + "/v1", api_key=up.key, temperature=0, max_tokens=120, max_retries=0)  # type: ignore[arg-type,call-arg]

    def test_a_forced_tool_call_and_its_result(self, chat: ChatOpenAI) -> None:
        """Arguments came back as a JSON string (C13)."""
        forced = chat.bind_tools([weather], tool_choice="any")
        called = forced.invoke("Weather in Rome?")
        assert called.invalid_tool_calls == []  # type: ignore[attr-defined]
        call = called.tool_calls[0]  # type: ignore[attr-defined]
        assert call["name"] == "weather"
        assert isinstance(call["args"]["city"], str)
        result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        assert chat.invoke([("user", "Weather in Rome?"), called, result]).content

    def test_structured_output_and_a_stream(self, chat: ChatOpenAI) -> None:
        schema = {"title": "city", "description": "A city", "type": "object", "required": ["name"],
                  "properties": {"name": {"type": "string", "maxLength": 12}}}
        for method in ("function_calling", "json_schema"):
            said = chat.with_structured_output(schema, method=method).invoke("Name a city.")  # type: ignore[arg-type]
            assert isinstance(said["name"], str), method  # type: ignore[index]
        assert "".join(str(part.content) for part in chat.stream("Say hello."))


@needs_npm
def test_the_vercel_ai_sdk_and_openai_node(up: Up, scripts: Path) -> None:
    done = subprocess.run(["node", "sdks.mjs", up.base, up.key, MODEL], cwd=scripts, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["text"]
    assert said["streamed"]
    assert [call["name"] for call in said["calls"]] == ["weather"]
    assert isinstance(said["calls"][0]["input"]["city"], str)
    assert not said["calls"][0]["invalid"]
    assert len(said["executed"]) == 1
    assert said["told"]
    assert said["continued"]
    assert said["aborted"]


@needs_npm
@needs_chromium
def test_the_official_sdk_in_a_browser_of_another_origin(tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers were not allowed by the preflight (C6)."""
    subprocess.run(["npx", "esbuild", "browser.mjs", "--bundle", "--format=esm", "--outfile=bundle.js", "--log-level=error"],
                   cwd=scripts, check=True)
    (scripts / "index.html").write_text('<body><script type="module" src="bundle.js"></script></body>')
    port = free_ports(1)[0]
    pages = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(scripts)))
    serving = threading.Thread(target=pages.serve_forever)
    serving.start()
    monkeypatch.setenv("CORS_ORIGINS", f"http://localhost:{port}")
    try:
        with running(tmp_path) as stack, sync_playwright() as playwright:
            stack.add_worker("w1")
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            said = {}
            for host in ("localhost", "127.0.0.1"):  # the second is another origin, which nobody allowed
                page = browser.new_page()
                page.goto(f"http://{host}:{port}/?base={stack.base}&key={stack.key}&model=fake")
                page.wait_for_function("document.title === 'done'", timeout=30_000)
                said[host] = json.loads(page.inner_text("body"))
            browser.close()
    finally:
        pages.shutdown()
        serving.join()
        pages.server_close()
    assert said["localhost"] == {"models": ["fake"], "text": "xxx", "worker": "w1", "id": "from-a-browser", "events": 6, "refused": 404}
    assert "models" not in said["127.0.0.1"]
    assert "onnection" in said["127.0.0.1"]["error"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

