"""The server's page in a browser: headless Chromium, where playwright and a Chromium are installed."""

import shutil

import pytest
from PIL import Image
from runs import write_base
from servers import serving, write_experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    base = write_base(folder / "base")
    with serving(base, write_experts(base, folder / "experts", 3), max_tokens=512) as running:
        yield running


@pytest.fixture(params=["wide", "phone"])
def page(request, browser, server):
    size = {"wide": (1280, 800), "phone": (390, 844)}[request.param]
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme="dark")
    faults = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.locator("#one option").nth(1).wait_for(state="attached")
    yield page
    assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []  # which a test asks for
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:enabled", timeout=20_000)


def answers(page):
    return page.locator(".answer p").all_inner_texts()


def alone(server, name, text, new=256):
    reply = server.client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=new
    )
    return reply.choices[0].message.content


def test_two_experts_answer_side_by_side(page, server):
    page.fill("#temperature", "0")
    page.fill("#tokens", "24")
    page.select_option("#one", "expert-0")
    page.select_option("#two", "expert-1")
    ask(page, "Name the sun")
    assert answers(page) == [alone(server, name, "Name the sun", 24) for name in ("expert-0", "expert-1")]
    assert all("tokens/s" in note for note in page.locator(".answer small").all_inner_texts())
    ask(page, "And the moon")
    before = answers(page)
    page.click("#again")
    page.wait_for_selector("#send:enabled", timeout=20_000)
    assert answers(page) == before  # regenerated from the same history
    page.click("summary")
    page.wait_for_selector("canvas")
    assert page.locator("canvas").count() == 2
    assert "expert-0: layers" in page.locator("canvas").first.get_attribute("aria-label")


def test_stopping_and_beginning_anew_leaves_nothing_behind(page, server):
    page.fill("#temperature", "0")
    page.fill("#tokens", "500")
    page.select_option("#one", "expert-2")
    page.fill("#text", "Name the sun")
    page.press("#text", "Enter")
    page.wait_for_selector(".answer p:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled", timeout=20_000)
    server.settle()
    page.fill("#text", "Name the sun")
    page.press("#text", "Enter")
    page.click("#reset")
    assert answers(page) == []
    page.fill("#tokens", "8")
    ask(page, "Name the moon")
    assert answers(page) == [alone(server, "expert-2", "Name the moon", 8)]


def test_faults_are_shown_and_a_picture_goes_along(page, server, tmp_path):
    page.select_option("#one", "expert-0")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    page.set_input_files("#file", str(tmp_path / "red.png"))
    page.wait_for_selector("#shown img")
    page.fill("#text", "What is it?")
    page.press("#text", "Enter")
    page.wait_for_selector(".fault")
    assert "was trained on text alone" in page.locator(".fault").inner_text()
    assert page.locator(".asked img").count() == 1
