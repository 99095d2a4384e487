"""What readers need of the looks: letters that stand out from their ground, nothing under something else, a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, TABS, ask, choose, field, opened, reply_settings, says
from ropewalk.gradio_demo.session import Session

LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of this size

# For every visible text, placeholders too: its contrast with what it stands on, as WCAG 2.2 defines it.
CONTRASTS = """() => {
  const parse = (text) => {
    const canvas = parse.canvas ??= Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return {rgb: [r, g, b], alpha: a / 255};
  };
  const over = (top, alpha, below) => top.map((value, i) => alpha * value + (1 - alpha) * below[i]);
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    const page = parse(getComputedStyle(document.body).backgroundColor);
    return layers.reverse().reduce((below, layer) => over(layer.rgb, layer.alpha, below), page.rgb);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (colour, below) => {
    const ink = parse(colour), ends = [light(over(ink.rgb, ink.alpha, below)), light(below)];
    return (Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05);
  };
  const seen = (element) => element.checkVisibility({opacityProperty: true, visibilityProperty: true})
      && element.getClientRects().length > 0 && !element.closest("svg, :disabled");
  const found = [];
  for (const element of document.querySelectorAll(".gradio-container *")) {
    if (!seen(element)) continue;
    const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    const below = ground(element);
    if (own) found.push([own.slice(0, 40), element.className, contrast(getComputedStyle(element).color, below)]);
    if (element.placeholder) {
      const colour = getComputedStyle(element, "::placeholder").color;
      found.push([`placeholder ${element.placeholder}`, element.className, contrast(colour, below)]);
    }
  }
  return found;
}"""


@pytest.fixture(params=["light", "dark"])
def themed(request: pytest.FixtureRequest, browser: Browser, url: str) -> Iterator[Page]:
    """The page in one of its themes, with the model bar and the settings open."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=request.param)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    opened(page, url)
    page.get_by_text("Model and how it is loaded").click()
    page.get_by_text("Sampling", exact=True).first.click()
    page.locator("#field-threads").wait_for()
    page.locator("#sampler-min_p").wait_for()
    yield page
    context.close()


@pytest.mark.parametrize("tab", ["Tour", *TABS])
def test_every_text_stands_out_from_its_ground(themed: Page, session: Session, tab: str) -> None:
    if tab == "Tour" and session.tours.current() is None:
        pytest.skip("the embedded model brings no tour yet")
    choose(themed, tab)
    found = themed.evaluate(CONTRASTS)
    assert any("placeholder" in text for text, *_ in found)
    assert any("info-text" in str(classes) for _, classes, _ in found)  # hints were among them
    weak = {f"{text} ({classes}): {ratio:.2f}" for text, classes, ratio in found if ratio < LEAST_CONTRAST}
    assert not weak


def test_the_measure_of_contrast_is_that_of_the_standard(page: Page) -> None:
    page.evaluate("""() => {
        const added = document.createElement("p");
        added.id = "measured";
        added.textContent = "measured text";
        added.style.cssText = "color: #777777; background: #ffffff";
        document.querySelector(".gradio-container").append(added);
    }""")
    (ratio,) = [ratio for text, _, ratio in page.evaluate(CONTRASTS) if text == "measured text"]
    assert ratio == pytest.approx(4.478, abs=0.01)  # a known value: just not enough


@pytest.mark.parametrize("width", [1280, 400])
def test_the_longest_choice_of_a_list_is_read_without_its_arrow_over_it(browser: Browser, url: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    opened(page, url)
    reply_settings(page, 8, 1)
    ask(page, "def a_function_with_a_name_that_is_longer_than_any_field_of_this_page(path):")
    says(page, "chat-line", "written")
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-rope_method").click()
    page.get_by_role("option").first.click()
    overlaps = page.evaluate("""() => [...document.querySelectorAll(".secondary-wrap input")]
        .filter((input) => input.checkVisibility())
        .map((input) => {
          const style = getComputedStyle(input), box = input.getBoundingClientRect();
          const arrow = input.parentElement.querySelector(".icon-wrap").getBoundingClientRect();
          const end = box.right - parseFloat(style.paddingRight) - parseFloat(style.borderRightWidth);
          const context = document.createElement("canvas").getContext("2d");
          context.font = style.font;
          const room = box.width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
          return {name: input.ariaLabel, text: input.value, under: end - arrow.left, cut: style.textOverflow,
                  missing: context.measureText(input.value).width - room};
        })""")
    context.close()
    assert {"RoPE method", "Conversations", "Chat template"} <= {found["name"] for found in overlaps}
    for found in overlaps:
        assert found["under"] <= 0 and found["cut"] == "ellipsis", found
        if found["name"] != "Conversations":  # whose titles are people's own, and are cut with three dots
            assert found["missing"] <= 0, found
