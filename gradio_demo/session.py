"""The behaviour of the page, without Gradio: what each tab does, over one model that all visitors share.

    access -> workbench -> chats, notebook, documents, lab, layers

Everything here can be used and tested from a plain script.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ropewalk.gradio_demo.chat.behaviour import Chats
from ropewalk.gradio_demo.chat.conversations import ConversationStore
from ropewalk.gradio_demo.context_lab.behaviour import ContextLab
from ropewalk.gradio_demo.documents.behaviour import Documents
from ropewalk.gradio_demo.layers.behaviour import LayerLab
from ropewalk.gradio_demo.model_bar.workbench import Workbench
from ropewalk.gradio_demo.notebook.behaviour import Notebook
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.shared.access import Access


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that one running page holds. exports: a folder for files that people download."""

    workbench: Workbench
    running: Running
    chats: Chats
    notebook: Notebook
    documents: Documents
    lab: ContextLab
    layers: LayerLab
    exports: Path


def make_session(access: Access, data: Path, exports: Path, num_caches: int = 4) -> Session:
    """A session without a model. data: where conversations are kept; num_caches: see `Workbench`."""
    workbench, running = Workbench(access, num_caches), Running()
    return Session(
        workbench=workbench,
        running=running,
        chats=Chats(workbench, ConversationStore(data), running),
        notebook=Notebook(workbench, running),
        documents=Documents(workbench, running),
        lab=ContextLab(workbench, running, exports),
        layers=LayerLab(workbench, running),
        exports=exports,
    )
