"""The behaviour of the page, without Gradio: what each tab does, over one model that all visitors share.

    access -> workbench -> chats, notebook, documents, lab, layers

Everything here can be used and tested from a plain script.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ropewalk.gradio_demo.access import Access
from ropewalk.gradio_demo.chats import Chats
from ropewalk.gradio_demo.conversations import ConversationStore
from ropewalk.gradio_demo.running import Running
from ropewalk.gradio_demo.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that one running page holds. exports: a folder for files that people download."""

    workbench: Workbench
    running: Running
    chats: Chats
    exports: Path


def make_session(access: Access, data: Path, exports: Path, num_caches: int = 4) -> Session:
    """A session without a model. data: where conversations are kept; num_caches: see `Workbench`."""
    workbench, running = Workbench(access, num_caches), Running()
    return Session(workbench, running, Chats(workbench, ConversationStore(data), running), exports)
