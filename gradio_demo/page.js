// What Gradio has no setting for: which keys send, a passage that comes into view, and a conversation that is followed
// only while its end is in view.
(() => {
  // The field that is written in -> the button that sends it.
  const SENDS = { "question": "send", "documents-question": "documents-ask", "tour-question": "tour-ask" };
  const SENDS_WITH_CTRL = { ...SENDS, "notebook-text": "notebook-go", "order-prompt": "order-compare" };

  function keyPressed(event) {
    const field = event.target;
    if (event.key !== "Enter" || event.isComposing || field.tagName !== "TEXTAREA") return;
    const name = field.closest("[id]")?.id;
    const button = event.shiftKey ? null : event.ctrlKey || event.metaKey ? SENDS_WITH_CTRL[name] : SENDS[name];
    if (button) {
      event.preventDefault();
      document.getElementById(button)?.click();
    }
    // Gradio sends on Shift+Enter, where every other program starts a new line: the event must not reach it.
    if (button || event.shiftKey) event.stopPropagation();
  }
  window.addEventListener("keydown", keyPressed, true);
  window.addEventListener("keypress", keyPressed, true); // Gradio listens to this one

  const END_PX = 60; // a reader who scrolls down this close to the end wants to follow it
  const JUMPS = "#send, #again, #undo, #new, #conversations [role=option]"; // after these the reader wants to see the end

  let following = true, last = 0;

  function wantsTheEnd(event) {
    if (event.target.closest?.(JUMPS)) following = true;
  }
  window.addEventListener("pointerdown", wantsTheEnd, true); // a list closes before the click
  window.addEventListener("click", wantsTheEnd, true);

  function follow(log) {
    const toEnd = () => {
      if (!following) return;
      log.scrollTop = log.scrollHeight;
      last = log.scrollTop;
    };
    log.addEventListener("scroll", () => {
      if (log.scrollTop < last) following = false;
      else if (log.scrollTop > last) following ||= log.scrollHeight - log.scrollTop - log.clientHeight <= END_PX;
      last = log.scrollTop;
    });
    // The scroll event comes a frame later than the wheel event, and text may arrive between them.
    log.addEventListener("wheel", (event) => {
      if (event.deltaY < 0 && log.scrollTop > 0) following = false;
    }, { passive: true });
    new MutationObserver(toEnd).observe(log, { childList: true, characterData: true, subtree: true });
    toEnd();
  }

  // A passage that has just been marked comes into view in the document, which scrolls by itself and not the page.
  const seen = new WeakSet();
  function showMark() {
    const mark = document.querySelector(".rw-document mark");
    if (!mark || seen.has(mark)) return;
    seen.add(mark);
    const box = mark.closest(".rw-document");
    const offset = mark.getBoundingClientRect().top - box.getBoundingClientRect().top;
    box.scrollTop += offset - (box.clientHeight - mark.offsetHeight) / 3;
  }

  // The component is drawn some time after the page, and drawn anew with some of its settings.
  const followed = new WeakSet();
  new MutationObserver(() => {
    showMark();
    const log = document.querySelector("#chatbot .bubble-wrap");
    if (log && !followed.has(log)) {
      followed.add(log);
      follow(log);
    }
  }).observe(document, { childList: true, subtree: true });
})();
