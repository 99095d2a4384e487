"""The behaviour of the page, without Gradio: what each tab does, over one model that all visitors share.

    access -> workbench -> loading, tours, chats, notebook, documents, lab, layers

Everything here can be used and tested from a plain script.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ropewalk.base.choices import MAX_RUNNING
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.gradio_demo.chat.behaviour import Chats
from ropewalk.gradio_demo.chat.conversations import ConversationStore
from ropewalk.gradio_demo.context_lab.behaviour import ContextLab
from ropewalk.gradio_demo.documents.behaviour import Documents
from ropewalk.gradio_demo.documents.kept import DocumentShelf
from ropewalk.gradio_demo.layers.behaviour import LayerLab
from ropewalk.gradio_demo.model_bar.behaviour import Loading
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.model_bar.workbench import Workbench
from ropewalk.gradio_demo.notebook.behaviour import Notebook
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.shared.access import Access
from ropewalk.gradio_demo.tour.behaviour import Tours

KEPT = "caches"  # the folder of kept documents beside that of conversations


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that one running page holds. exports: a folder for files that people download."""

    workbench: Workbench
    loading: Loading
    running: Running
    tours: Tours
    chats: Chats
    notebook: Notebook
    documents: Documents
    shelf: DocumentShelf
    lab: ContextLab
    layers: LayerLab
    exports: Path


def make_session(
    access: Access,
    data: Path,
    exports: Path,
    max_running: int = MAX_RUNNING,
    owner: Owner | None = None,
    kept_folder: KeptFolder | None = None,
) -> Session:
    """A session without a model. data: where conversations are kept; max_running: see `Workbench`; owner: who may
    change the model; default: `Owner()`. kept_folder: where documents are kept; default: `caches` under data."""
    workbench = Workbench(access, kept_folder or KeptFolder(data / KEPT), max_running)
    running, owner = Running(), owner or Owner()
    documents = Documents(workbench, running)
    return Session(
        workbench=workbench,
        loading=Loading(workbench, owner),
        running=running,
        tours=Tours(workbench, running),
        chats=Chats(workbench, ConversationStore(data), running),
        notebook=Notebook(workbench, running),
        documents=documents,
        shelf=DocumentShelf(workbench, documents, running),
        lab=ContextLab(workbench, running, exports),
        layers=LayerLab(workbench, running, owner),
        exports=exports,
    )
