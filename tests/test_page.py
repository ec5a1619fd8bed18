"""The page at `/`, in headless Chromium: skipped where there is no browser."""

import shutil

import pytest
from live_server import nano_engine, serving

from e1jax.config.sampling import SamplingParams
from e1jax.serving.protocol import ServerSettings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROMPT = "47a+5b*3c-8?"


@pytest.fixture(scope="module")
def live():
    with serving(nano_engine(cache_len=4096), ServerSettings("nano")) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        # Without its sandbox it runs as root too; it opens our own page alone.
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(live, browser):
    page = browser.new_page(viewport={"width": 1100, "height": 640})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda said: (
            said.type == "error" and "400" not in said.text and errors.append(said.text)
        ),
    )
    page.goto(live.url)
    playwright.expect(page.locator("#model")).to_have_text("nano")
    yield page
    page.close()
    assert not errors


def run(page):
    """Runs both sides; gives what each shows."""
    sides = page.locator("section")
    for number in range(2):
        counts = sides.nth(number).locator(".counts")
        playwright.expect(counts).to_contain_text("answer", timeout=20_000)
    return [
        {
            name: side.locator(f".{name}").text_content()
            for name in ("thinking", "closer", "solution", "counts")
        }
        for side in sides.all()
    ]


def test_two_budgets_side_by_side(live, page):
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+Enter")
    shown = run(page)
    params = [
        SamplingParams(thinking_budget=t, solution_budget=s)
        for t, s in ((20, 28), (1024, 1024))
    ]
    wanted = nano_engine(slots=2, cache_len=4096).generate([PROMPT] * 2, params)
    for side, [want] in zip(shown, wanted, strict=True):
        assert side["thinking"] == want.thinking
        assert side["solution"] == want.solution
        assert side["closer"] == "</think>"
        counts = (
            f"{want.thinking_tokens} thinking + {sum(want.forced)} forced + "
            f"{want.solution_tokens} solution tokens"
        )
        assert counts in side["counts"]
    closers = page.locator(".closer")
    assert "forced" in closers.nth(0).get_attribute("class")
    assert "forced" not in closers.nth(1).get_attribute("class")
    assert "thinking ended by the budget" in shown[0]["counts"]
    dim = closers.nth(0).evaluate("e => getComputedStyle(e.previousSibling).color")
    plain = closers.nth(0).evaluate("e => getComputedStyle(e.nextSibling).color")
    assert dim != plain


def test_sliders_from_the_keyboard_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "nothing has to be scrolled sideways"
    tops = [side.bounding_box()["y"] for side in page.locator("section").all()]
    assert tops[1] > tops[0] + 100, "one below the other"
    slider = page.get_by_label("Thinking").first
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "0 tokens"
    page.get_by_label("Thinking").nth(1).focus()
    page.keyboard.press("End")
    page.get_by_role("button", name="Run").focus()
    page.keyboard.press("Enter")
    first, second = run(page)
    assert first["thinking"] == "" and "0 thinking + 1 forced" in first["counts"]
    assert second["thinking"]
    assert page.get_by_label("Thinking").nth(1).get_attribute("aria-valuetext") == (
        "unlimited"
    )


def test_what_the_server_refuses_is_shown_and_no_markup_is_made(page):
    page.locator("#prompt").fill("1" * 5000)
    page.get_by_role("button", name="Run").click()
    counts = page.locator(".counts").first
    playwright.expect(counts).to_contain_text("does not fit cache_len=4096")
    page.locator("#prompt").fill("<b>5</b>")
    page.locator("#seed").fill("18446744073709551615")
    page.get_by_role("button", name="Run").click()
    run(page)
    assert page.locator("section b").count() == 0
