"""The report in a real browser, on a phone and on a desktop, with hostile data, settings and samples."""

import pytest
import recorded

from hypo_train.report.page import write_report

pytest.importorskip("selenium")

from browser import MISSING, Browser

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    """Return the report of two runs whose names, settings and samples are hostile."""
    folder = tmp_path_factory.mktemp("report")
    config = {f"{text[:40]}": text for text in recorded.HOSTILE} | {"model_name_or_path": recorded.HOSTILE[0]}
    names = ["<script>window.hostile = 6<\u2215script>", "b\"'><img src=x onerror=window.hostile=7>"]
    runs = [
        recorded.write_run(folder / name, texts=recorded.HOSTILE, offset=i * 0.3, config=config)
        for i, name in enumerate(names)
    ]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(params=[390, 1280], ids=["phone", "desktop"], scope="module")
def opened(request, hostile_report):
    with Browser(request.param) as browser:
        browser.get(hostile_report.as_uri())
        assert browser.run("return innerWidth") == request.param
        yield browser, hostile_report.as_uri()


def test_the_page_loads_nothing_and_logs_no_error(opened):
    browser, address = opened
    assert browser.run("return document.querySelectorAll('figure svg').length") > 5
    assert {url for url in browser.requests() if not url.startswith("data:")} == {address}
    assert browser.console() == []


def test_hostile_texts_stay_text(opened):
    browser, _ = opened
    assert browser.run("return window.hostile ?? null") is None
    assert browser.run("return document.title").startswith("2 runs: ")
    assert browser.run("return document.querySelectorAll('img, iframe, style, link[rel=stylesheet]').length") == 1
    texts = browser.run("return [...document.querySelectorAll('.said')].map((said) => said.textContent)")
    for text in recorded.HOSTILE:
        if text.isprintable() or "👩" in text:
            assert text in texts
    assert any(text.startswith("U+202Eright to leftU+2066 never ended, U+0000") for text in texts)


def test_an_injected_script_does_not_run(opened):
    browser, _ = opened
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'window.hostile = 8';"
        "document.body.append(script); const image = document.createElement('img');"
        "image.setAttribute('onerror', 'window.hostile = 9');"
        "const failed = new Promise((done) => image.addEventListener('error', done));"
        "image.src = 'https://example.com/x.png'; document.body.append(image); return failed.then(() => null)"
    )
    assert browser.run("return window.hostile ?? null") is None
    assert browser.requests() == {"https://example.com/x.png": "csp"}
    assert all("Content Security Policy" in line for line in browser.console())


def test_only_wide_tables_scroll_sideways(opened):
    browser, _ = opened
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    page, screen = browser.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert page <= screen
    assert browser.run("return window.visualViewport.scale") == 1
    parts = "[...document.querySelectorAll('section, figure, article, .card')]"
    assert browser.run(f"return Math.max(...{parts}.map((part) => part.getBoundingClientRect().right))") <= screen
    if screen == 390:
        assert browser.run("const t = document.querySelector('.scrolls'); return t.scrollWidth > t.clientWidth")


def test_no_text_of_a_chart_is_cut_off(opened, tmp_path):
    browser, address = opened
    write_report([recorded.write_run(tmp_path / "long", steps=2000)], tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    cut = browser.run(
        "return [...document.querySelectorAll('svg text')].filter((text) => { const own = text.getBoundingClientRect(),"
        " all = text.closest('svg').getBoundingClientRect(); return own.left < all.left || own.right > all.right })"
        ".map((text) => text.textContent)"
    )
    browser.get(address)
    assert cut == []


def test_the_values_under_the_pointer_are_shown(opened):
    browser, _ = opened
    said = browser.run(
        "const figures = [...document.querySelectorAll('figure[data-chart]')];"
        "const figure = figures.find((figure) => figure.textContent.includes('Reverse KL'));"
        "figure.scrollIntoView(); const box = figure.querySelector('svg').getBoundingClientRect();"
        "figure.querySelector('svg').dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: box.right - 12, clientY: box.top + 50})); return figure.querySelector('.readout').innerText"
    )
    assert said.startswith("step 20\n")
    assert "10 ± 0.1" in said
    assert "10 ± 0.21" in said


def test_the_page_follows_the_colour_scheme(opened):
    browser, _ = opened
    colour = "return getComputedStyle(document.body).backgroundColor"
    brightness = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        brightness[scheme] = sum(int(part) for part in browser.run(colour)[4:-1].split(","))
    assert brightness["light"] > 700
    assert brightness["dark"] < 100


def test_charts_and_samples_show_without_scripts(opened):
    browser, address = opened
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(address)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.run("return document.querySelectorAll('figure svg polyline').length") > 5
    assert browser.run("return document.querySelector('.said').getBoundingClientRect().height") > 10
