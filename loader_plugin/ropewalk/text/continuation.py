"""A conversation whose last message is continued instead of answered: `continue_final_message` of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.text.chat import Template

# Appended to the last message while the template writes it: what follows it ends the turn. Made of private-use
# characters, so that no real text contains it; if its space is missing afterwards, the template trims messages.
MARK = "\ue0f8\ue0f9\ue0f8 "


def render_continued(template: Template, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The prompt for a conversation, up to the last character of its last message.

    If the template trims messages, white space at the end of the last one goes too.

    Raises:
        RequestError: the last message has no text, or the template alters it; otherwise as for `render`.
    """
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    content = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a last message whose content is text")
    marked = [*messages[:-1], {**last, "content": content + MARK}]
    text = template.render(marked, **variables, add_generation_prompt=False)
    before, mark, after = text.rpartition(MARK.rstrip())
    if not mark:
        raise RequestError(
            f"the chat template of {template.source} does not write the last message unchanged, so it cannot be "
            "continued: leave out continue_final_message"
        )
    return before if after.startswith(" ") else before.removesuffix(content[len(content.rstrip()) :])
