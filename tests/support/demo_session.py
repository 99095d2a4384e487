"""A session of the demo page on the embedded model, and folders to load in its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ropewalk.files.embedded import EMBEDDED_CONTEXT, demo_model_path
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.replies.request import ReplyRequest
from ropewalk.gradio_demo.replies.templates import PLAIN
from ropewalk.gradio_demo.session import Session, make_session
from ropewalk.gradio_demo.shared.access import EMBEDDED, Access
from ropewalk.gradio_demo.shared.visitors import Visitor

VISITOR = Visitor("somebody", "tab 1")
# The embedded model ends its answers early, and a reply is to have a length that tests know.
GREEDY = ReplyRequest(SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True))


def embedded_session(root: Path, owner: Owner | None = None, **changes: Any) -> Session:
    """The page as it starts, with its folders below `root`; `changes` to the settings of loading."""
    session = empty_session(root, owner)
    session.workbench.load(EMBEDDED, values(session, **changes))
    return session


def empty_session(root: Path, owner: Owner | None = None) -> Session:
    """Without a model. Folders below root/models may be opened, files in root/uploads count as dropped."""
    for name in ("models", "uploads", "exports"):
        (root / name).mkdir(parents=True, exist_ok=True)
    access = Access(root / "models", (), root / "uploads")
    return make_session(access, root / "data", root / "exports", max_running=2, owner=owner)


def values(session: Session, name: str = EMBEDDED, **changes: Any) -> dict[str, Any]:
    """What stands in the fields of the model bar."""
    return {**asdict(session.workbench.suggest(name)), **changes}


def copy_of_the_embedded_model(folder: Path, **config: Any) -> Path:
    """The same model under another name, with keys of config.json changed."""
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("adapters"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def asked(session: Session, *questions: str, request: ReplyRequest = GREEDY) -> Conversation:
    """A conversation with the replies to these questions."""
    conversation = Conversation(template=PLAIN)
    for question in questions:
        conversation = list(session.chats.ask(VISITOR, conversation, question, request))[-1].conversation
    return conversation


def embedded_length() -> int:
    """The context that conversations with the embedded model have."""
    return int(512 * EMBEDDED_CONTEXT.factor)
