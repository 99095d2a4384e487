"""model_bar/: models, settings and adapters, on the embedded model, without Gradio."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from demo_session import (
    GREEDY,
    VISITOR,
    asked,
    copy_of_the_embedded_model,
    embedded_length,
    embedded_session,
    empty_session,
    values,
)
from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import EMBEDDED_CONTEXT
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.documents.behaviour import Document
from ropewalk.gradio_demo.model_bar.settings import AS_CHECKPOINT, FieldError
from ropewalk.gradio_demo.model_bar.workbench import FOLDER
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared import access
from ropewalk.gradio_demo.shared.access import EMBEDDED


def test_the_embedded_model_starts_with_a_context_worth_talking_in(shared: Session) -> None:
    loaded = shared.workbench.require()
    assert (loaded.model.max_seq_len, loaded.model.rope.method.name) == (embedded_length(), EMBEDDED_CONTEXT.method)
    assert shared.workbench.suggested_adapters(loaded) == [EMBEDDED_CONTEXT.adapter]


def test_values_as_the_checkpoint_has_them_are_left_to_it(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, rope_method=AS_CHECKPOINT, rope_factor="", max_seq_len="512")
    loaded = session.workbench.require()
    assert (loaded.model.max_seq_len, loaded.model.rope.method.name) == (512, "none")
    assert loaded.info.rope_decided_by.startswith("rope_parameters")


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"max_seq_len": "many"}, "max_seq_len", "a number is needed, got 'many'"),
        ({"max_seq_len": "1.5"}, "max_seq_len", "a whole number from 1 to"),
        ({"threads": "0"}, "threads", "a whole number from 1 to 1024"),
        ({"alpha_value": "2"}, "alpha_value", "the RoPE method .* replaces it"),
        ({"alpha_value": "nan"}, "alpha_value", "a finite number"),
        ({"rope_factor": ""}, "rope_factor", "needs a factor"),
        ({"rope_factor": "-1"}, "rope_method", "factor"),
        ({"rope_method": AS_CHECKPOINT}, "rope_factor", "choose a RoPE method"),
        ({"rope_method": AS_CHECKPOINT, "rope_factor": "", "alpha_value": "1e9"}, "alpha_value", "alpha_value"),
        ({"rope_method": "spiral"}, "rope_method", "must be one of"),
        ({"layer_order": "0-9"}, "layer_order", "layer"),
        ({"compute": "magic"}, "compute", "must be one of"),
        ({"compute": "fp16", "backend": "cpu"}, "compute", 'is arithmetic of backend="gpu"'),
        ({"backend": "tpu"}, "backend", "must be one of auto, cpu, gpu, reference"),
        ({"gpu_layers": "-1"}, "gpu_layers", "a whole number from 0 to"),
        ({"gpu_layers": "3", "backend": "cpu"}, "gpu_layers", 'is an option of backend="gpu"'),
        ({"gpu_split": "10;20"}, "gpu_split", "GiB for each card"),
        ({"second_folder": "/etc"}, "second_folder", "may not be read"),
        ({"cache_memory": "much"}, "cache_memory", "such as 4GiB"),
        ({"cache_memory": "1KiB"}, "cache_memory", "cache_memory"),
        ({"speculation": "luck"}, "speculation", "must be one of"),
        ({"speculation": "draft"}, "draft_model", "name the folder of a smaller model"),
        ({"speculation": "draft", "draft_model": "/etc"}, "draft_model", "may not be read"),
        ({"draft_model": "x"}, "draft_model", "only speculation by draft needs one"),
    ],
)
def test_a_wrong_setting_is_explained_at_its_field_and_the_model_stays(
    shared: Session, changes: dict[str, str], field: str, said: str
) -> None:
    before = shared.workbench.loaded
    with pytest.raises(FieldError, match=said) as caught:
        shared.workbench.load(EMBEDDED, values(shared, **changes))
    assert caught.value.field == field
    assert shared.workbench.loaded is before


def test_a_broken_folder_is_explained_and_the_old_model_still_answers(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    broken = copy_of_the_embedded_model(tmp_path / "models" / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(FieldError, match="model.safetensors") as caught:
        session.workbench.load("broken", values(session, "broken"))
    assert caught.value.field == FOLDER
    assert asked(session, "def f():").turns[-1].content


def test_another_folder_takes_the_place_of_the_model_with_progress(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    copy_of_the_embedded_model(tmp_path / "models" / "again", max_position_embeddings=300)
    steps: list[tuple[int, int]] = []
    loaded = session.workbench.load("again", values(session, "again"), lambda *step: steps.append(step))
    assert loaded.model.max_seq_len == 300
    assert steps[-1] == (6, 6)
    assert session.workbench.loaded is loaded


def test_without_a_model_every_tab_says_so(tmp_path: Path) -> None:
    session = empty_session(tmp_path)
    views = [
        *session.chats.ask(VISITOR, Conversation(), "Hello", GREEDY),
        *session.notebook.complete(VISITOR, "Hello", GREEDY),
        *session.documents.ask(VISITOR, [Document("a", "b")], "c?", "vicuna", GREEDY),
        *session.layers.compare(VISITOR, "0", "Hello", GREEDY.params),
        session.layers.view("0-4"),
    ]
    assert all("no model is loaded" in view.error for view in views if not getattr(view, "running", False))


def test_adapters_are_loaded_when_they_are_first_wanted_and_change_the_reply(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    loaded = session.workbench.require()
    own = EMBEDDED_CONTEXT.adapter  # is there from the start
    assert "linear-4" in session.workbench.adapters(loaded) and loaded.model.adapters == (own,)
    wanted = session.workbench.use_adapters(loaded, ["linear-4", "ntk-by-parts-4:0.5"])
    assert wanted == [("linear-4", 1.0), ("ntk-by-parts-4", 0.5)]
    assert loaded.model.adapters == (own, "linear-4", "ntk-by-parts-4")
    longer = replace(GREEDY, params=replace(GREEDY.params, max_new_tokens=48))
    plain = asked(session, "def read(path):", request=longer)
    changed = asked(session, "def read(path):", request=replace(longer, adapters=wanted))
    assert changed.turns[-1].content != plain.turns[-1].content
    for wrong, said in (("nobody", "no adapter 'nobody'"), ("linear-4:much", "must be a number")):
        with pytest.raises(RequestError, match=said):
            session.workbench.use_adapters(loaded, [wrong])


def test_a_name_on_the_hub_is_loaded_as_its_checkpoint_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of_the_embedded_model(tmp_path / "fetched")
    monkeypatch.setattr(access, "local_folder", lambda name: folder)
    workbench = empty_session(tmp_path).workbench
    assert workbench.suggest("someone/model").rope_method == AS_CHECKPOINT
    assert workbench.plan("someone/model", asdict(workbench.suggest("someone/model"))) is None
    assert workbench.loaded is None
    loaded = workbench.load("someone/model", asdict(workbench.suggest("someone/model")))
    assert (loaded.name, loaded.folder, loaded.model.max_seq_len) == ("someone/model", folder, 512)
    assert workbench.suggest("someone/model").max_seq_len == 512


def test_a_change_of_the_rope_brings_no_model_back_that_was_unloaded_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = embedded_session(tmp_path)
    engine = session.workbench.require().engine
    monkeypatch.setattr(engine, "rescale", lambda **_: session.workbench.unload())
    with pytest.raises(RequestError, match="unloaded meanwhile"):
        session.workbench.rescale(values(session), "rotate")
    assert session.workbench.loaded is None


def test_a_model_is_not_changed_while_another_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = embedded_session(tmp_path)
    refused: list[str] = []

    def load_meanwhile(**_: object) -> None:
        with pytest.raises(RequestError, match="another model is being loaded") as caught:
            session.workbench.load("", values(session))
        refused.append(str(caught.value))

    monkeypatch.setattr(session.workbench.require().engine, "rescale", load_meanwhile)
    session.workbench.rescale(values(session), "rotate")
    assert refused
