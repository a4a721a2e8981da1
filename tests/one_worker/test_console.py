"""The console in a real browser against the real stack: chat, stop, status, usage, a training, mistakes, keyboard, phone.

Screenshots are kept in CONSOLE_SHOTS (default: .state/console).
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from services.local.plan import ROOT, Dials
from tests.one_worker.conftest import CHROMIUM, needs_chromium
from tests.up import MODEL, Up

pytestmark = needs_chromium
SHOTS = Path(os.environ.get("CONSOLE_SHOTS") or ROOT / ".state/console")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # In a container as root there is no sandbox to be had; the pages are ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, up: Up) -> Iterator[Page]:
    """A tab that has been let in. What the page logs as an error fails the test; so does what the CSP forbids."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.problems = problems  # type: ignore[attr-defined]
    page.goto(up.base)
    let_in(page, up)
    yield page
    context.close()
    assert problems == []


def let_in(page: Page, up: Up) -> None:
    page.get_by_label("API key").fill(up.key)
    page.get_by_label("API key").press("Enter")
    expect(page.locator("#chat")).to_be_visible()


def ask(page: Page, text: str, tokens: int = 32) -> None:
    page.get_by_label("Longest answer").fill(str(tokens))
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")


def answered(page: Page) -> None:
    expect(page.locator("#messages > li.assistant .facts").last).to_be_visible(timeout=60_000)
    expect(page.locator("#send")).to_be_visible(timeout=60_000)


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")


def test_chat_says_how_fast_and_by_whom(page: Page) -> None:
    ask(page, "Name three colours.")
    answered(page)
    facts = page.locator("#messages > li.assistant .facts").last.inner_text()
    assert re.search(r"first token \d", facts), facts
    assert re.search(r"[\d.]+ tokens/s", facts), facts
    assert "worker worker-1-" in facts
    assert re.search(r"request [0-9a-f]{32}", facts)
    assert page.locator("#messages > li.assistant .text").last.inner_text().strip()
    ask(page, "And three more.")
    answered(page)
    assert page.locator("#messages > li").count() == 4
    shot(page, "chat")


def test_a_repeated_question_comes_from_memory(page: Page) -> None:
    page.get_by_label("Temperature").fill("0")
    for _ in range(2):
        ask(page, "Say hello to memory.")
        answered(page)
        page.get_by_role("button", name="New chat").click() if _ == 0 else None
    assert "from memory" in page.locator("#messages > li.assistant .facts").last.inner_text()


def test_stop_stops_the_worker_too(page: Page, up: Up) -> None:
    before = len(up.records())
    ask(page, "Write a very long story about a ship.", 2000)
    expect(page.locator("#messages > li.assistant .text").last).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    answered(page)
    assert "stopped" in page.locator("#messages > li.assistant .facts").last.inner_text()
    deadline = time.monotonic() + 10
    while len(up.records()) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(up.records()[-1])["outcome"] == "cancelled"


def test_the_status_is_live(page: Page) -> None:
    ask(page, "Tell me a story about a lighthouse.", 600)
    page.get_by_role("button", name="Status").click()
    expect(page.locator("#workers tbody tr")).to_have_count(1)
    expect(page.locator("#workers")).to_contain_text("ready")
    tile = page.locator(".tile", has_text=re.compile("tokens/s")).locator("b")
    expect(tile).not_to_have_text("0", timeout=15_000)
    expect(page.locator(".tile", has_text="this month").locator("b")).to_have_text(re.compile(r"\$0\.\d+"))
    expect(page.locator("#machine")).to_contain_text("GiB")
    assert page.locator("#speed-chart canvas").count() == 1
    time.sleep(5)  # two more points on the chart
    shot(page, "status")
    page.get_by_role("button", name="Chat").click()
    page.keyboard.press("Escape")
    answered(page)


def test_usage_of_the_key(page: Page) -> None:
    page.get_by_role("button", name="Usage").click()
    expect(page.locator("#usage-table tbody tr")).not_to_have_count(0)
    expect(page.locator("#usage-table")).to_contain_text(MODEL)
    shot(page, "usage")


def upload(page: Page, path: Path, epochs: int) -> None:
    page.get_by_role("button", name="Fine-tuning").click()
    page.locator("#file").set_input_files(path)
    page.locator("#suffix").fill("mine")
    page.locator("#epochs").fill(str(epochs))
    page.get_by_role("button", name="Upload and train").click()


def rows(count: int) -> str:
    return "\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"What is the code of box {n}?"}, {"role": "assistant", "content": f"Box {n} opens with {n * 7}."},
    ]}) for n in range(count)) + "\n"


def test_bad_lines_are_named(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(rows(12) + '{"messages": []}\n' + "not json\n")
    upload(page, path, 1)
    expect(page.locator("#problems li")).not_to_have_count(0, timeout=30_000)
    text = page.locator("#problems").inner_text()
    assert "line 13" in text, text
    assert "line 14" in text, text
    shot(page, "bad-lines")


def test_a_training_with_a_live_loss_curve(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "good.jsonl"
    path.write_text(rows(12))
    upload(page, path, 2)
    line = page.locator("#job-line")
    expect(line).to_contain_text(re.compile(r"step \d+/\d+"), timeout=120_000)
    shot(page, "training")
    expect(line).to_contain_text(re.compile("succeeded|failed"), timeout=180_000)
    assert page.locator("#loss-chart canvas").count() == 1
    assert "training loss" in page.locator("#loss-chart .u-legend").inner_text().lower()
    shot(page, "trained")


def test_a_wrong_key_is_refused_in_words(browser: Browser, up: Up) -> None:
    page = browser.new_page()
    page.goto(up.base)
    page.get_by_label("API key").fill("ogpt_nonsense")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#key-error")).to_have_text("This key is not valid, or was revoked.")
    assert page.evaluate("sessionStorage.length") == 0
    page.close()


def test_a_key_that_is_revoked_meanwhile_is_asked_for_again(browser: Browser, up: Up) -> None:
    made = up.add_key("short-lived")
    page = browser.new_page()
    page.goto(up.base)
    page.locator("#key").fill(made)
    page.locator("#key").press("Enter")
    page.get_by_role("button", name="Status").click()
    expect(page.locator("#tiles .tile").first).to_be_visible()
    subprocess.run([sys.executable, "-m", "gateway.keys", "revoke", made.split("_")[1]], cwd=ROOT, check=True, env=os.environ | {
        "REDIS_URL": Dials(up.state).redis_url, "REDIS_PASSWORD_FILE": str(up.state / "secrets/gateway/redis_password")})
    expect(page.locator("#enter")).to_be_visible(timeout=10_000)
    expect(page.locator("#key-error")).to_contain_text("was revoked")
    page.close()


def test_the_key_stays_in_the_tab(page: Page, up: Up) -> None:
    assert page.evaluate("JSON.stringify(localStorage)").find(up.key) < 0
    assert page.evaluate("document.cookie") == ""
    other = page.context.new_page()
    other.goto(up.base)
    expect(other.locator("#enter")).to_be_visible()
    page.get_by_role("button", name="Forget key").click()
    assert page.evaluate("sessionStorage.length") == 0


def test_an_answer_is_text_and_never_markup(page: Page) -> None:
    hostile = {"choices": [{"delta": {"content": "<img src=x onerror=\"document.title='owned'\"><script>1</script>"}}]}
    body = f"data: {json.dumps(hostile)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, headers={"content-type": "text/event-stream"}, body=body))
    ask(page, "x")
    answered(page)
    assert page.locator("#messages > li.assistant .text").last.inner_text().startswith("<img")
    assert page.title() == "OwnGPT"
    assert page.locator("#messages img, #messages script").count() == 0


def answers(page: Page, text: str) -> None:
    """The next questions are answered so."""
    body = f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, headers={"content-type": "text/event-stream"}, body=body))


def test_an_answer_is_markdown(page: Page) -> None:
    answers(page, "# Two\n\n1. *one*\n2. `two`\n\n```python\nprint('<b>')\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n"
                  "[bad](javascript:alert(1)) [good](https://example.com) ![spy](https://example.com/x.png)")
    ask(page, "**x**")
    answered(page)
    text = page.locator("#messages > li.assistant .text").last
    expect(text.locator("h1")).to_have_text("Two")
    expect(text.locator("ol li em")).to_have_text("one")
    expect(text.locator("pre code")).to_have_text("print('<b>')\n")
    expect(text.locator("td").last).to_have_text("2")
    assert [link.get_attribute("href") for link in text.locator("a").all()] == [None, "https://example.com"]
    assert text.locator("a").last.get_attribute("rel") == "noopener noreferrer"
    assert text.locator("img").count() == 0
    expect(page.locator("#messages > li.user .text").last).to_have_text("**x**")  # what one wrote oneself is left alone
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text.get_by_role("button", name="Copy").click()
    expect(text.get_by_role("button", name="copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')\n"
    shot(page, "markdown")


def test_conversations_are_kept_until_they_are_deleted(page: Page, up: Up) -> None:
    answers(page, "An *answer*.")
    ask(page, "First question")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    ask(page, "Second question")
    answered(page)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(2)
    assert page.locator("#messages > li").count() == 0
    page.get_by_role("button", name="First question", exact=True).click()
    expect(page.locator("#messages > li")).to_have_count(2)
    expect(page.locator("#messages > li.assistant em")).to_have_text("answer")
    ask(page, "And more?")
    answered(page)
    asked: list[dict] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "completions" in request.url else None)
    ask(page, "The end")
    answered(page)
    assert [m["content"] for m in asked[-1]["messages"]] == [
        "First question", "An *answer*.", "And more?", "An *answer*.", "The end"]
    shot(page, "conversations")
    page.get_by_role("button", name="delete: Second question").click()
    page.get_by_role("button", name="delete: First question").click()
    expect(page.locator("#messages > li")).to_have_count(0)
    assert "conversations" not in page.evaluate("JSON.stringify(localStorage)")
    ask(page, "Of this key")
    answered(page)
    page.get_by_role("button", name="Forget key").click()
    page.locator("#key").fill(up.add_key("neighbour"))
    page.locator("#key").press("Enter")
    expect(page.locator("#chat")).to_be_visible()
    expect(page.locator("#conversations li")).to_have_count(0)  # another key's are not shown
    expect(page.locator("#messages > li")).to_have_count(0)


def test_what_is_deleted_while_it_is_answered_stays_deleted(page: Page) -> None:
    ask(page, "Write a very long story about a whale.", 2000)
    expect(page.locator("#messages > li.assistant .text").last).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    answered(page)
    ask(page, "And on.", 2000)
    expect(page.locator("#messages > li.assistant .text").last).not_to_be_empty()
    page.get_by_role("button", name="delete: Write a very long story").click()
    expect(page.locator("#messages > li")).to_have_count(0)
    page.wait_for_timeout(500)
    assert "whale" not in page.evaluate("JSON.stringify(localStorage)")


def test_what_another_tab_deletes_stays_deleted(page: Page, up: Up) -> None:
    answers(page, "Short.")
    ask(page, "A question of two tabs")
    answered(page)
    other = page.context.new_page()
    other.goto(up.base)
    let_in(other, up)
    other.get_by_role("button", name="delete: A question of two tabs").click()
    ask(page, "And more?")
    answered(page)
    assert "two tabs" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_key_forgotten_while_it_answers(page: Page, up: Up) -> None:
    ask(page, "Write a very long story about a secret.", 2000)
    expect(page.locator("#messages > li.assistant .text").last).not_to_be_empty()
    page.get_by_role("button", name="Forget key").click()
    expect(page.locator("#enter")).to_be_visible()
    page.wait_for_timeout(500)  # what it was answering ends; nothing of it is kept or shown
    assert page.locator("#messages > li, #conversations li").count() == 0
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_batch_from_a_file_to_its_results(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": {
        "model": MODEL, "prompt": f"Number {n}:", "max_tokens": 4}}) + "\n" for n in range(5)))
    page.get_by_role("button", name="Batches").click()
    page.locator("#batch-file").set_input_files(path)
    page.get_by_role("button", name="Upload and start").dblclick()
    row = page.locator("#batches-table tbody tr").first
    expect(row).to_contain_text("completed", timeout=60_000)
    expect(row).to_contain_text("5/5")
    expect(page.locator("#batches-table tbody tr")).to_have_count(1)  # not two
    with page.expect_download() as download:
        row.get_by_role("button", name="results").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 5
    path.write_text("no json\n")
    page.locator("#batch-file").set_input_files(path)
    page.get_by_role("button", name="Upload and start").click()
    expect(page.locator("#batch-error")).to_contain_text("no JSON request")
    shot(page, "batches")


def test_an_error_is_shown_and_the_question_can_be_asked_again(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=503, json={"error": {"message": "No worker is ready.", "type": "server_error", "param": None, "code": "unavailable"}}))
    ask(page, "x")
    expect(page.locator("#messages .error")).to_contain_text("No worker is ready.")
    page.unroute("**/v1/chat/completions")
    ask(page, "And now?")
    answered(page)
    page.problems[:] = [text for text in page.problems if "503" not in text]  # type: ignore[attr-defined]


def test_nothing_from_elsewhere_and_a_strict_policy(browser: Browser, up: Up) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer = page.goto(up.base)
    let_in(page, up)
    assert [url for url in asked if not url.startswith(up.base)] == []
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    blocked = page.evaluate("""() => new Promise(done => {
        addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
        const made = document.createElement('script'); made.textContent = 'window.owned = 1'; document.body.append(made);
    })""")
    assert blocked.startswith("script-src")
    assert page.evaluate("window.owned") is None
    context.close()


def test_by_keyboard_alone(browser: Browser, up: Up) -> None:
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(up.base)
    page.keyboard.type(up.key)  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Say hi.")
    page.keyboard.press("Enter")
    answered(page)
    page.locator("#tabs button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_be_visible()
    context.close()


def test_on_a_phone_in_chinese(browser: Browser, up: Up) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 667}, locale="zh-CN", has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(up.base)
    expect(page.get_by_role("button", name="打开")).to_be_visible()
    page.locator("#key").fill(up.key)
    page.get_by_role("button", name="打开").tap()
    page.locator("#settings summary").tap()
    page.locator("#max-tokens").fill("16")
    page.locator("#settings summary").tap()
    page.locator("#question").fill("你好")
    page.get_by_role("button", name="发送").tap()
    answered(page)
    for name in ("状态", "用量", "微调", "批处理", "对话"):
        page.get_by_role("button", name=name, exact=True).tap()
        time.sleep(0.3)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, (name, wide)
        assert page.locator("h1").bounding_box()["y"] >= 0
        shot(page, f"phone-{name}")
    page.get_by_role("button", name="English").tap()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    context.close()
