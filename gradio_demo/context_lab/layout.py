"""The context lab: three measurements with their plots and tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.context_lab.behaviour import ADAPTER_MARK, LabView
from ropewalk.gradio_demo.context_lab.pictures import advice_lines, progress_bar
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import problem
from ropewalk.measure.tasks import TASKS
from ropewalk.rope.spellings import AS_LOADED

ABOUT = (
    "How far does the context reach? A model copes badly with positions that it never saw in training; RoPE scaling "
    "brings them back into the range that it knows. The measurements run on the loaded model; conversations go on."
)
MAX_CHOSEN_ADAPTERS = 3
ABOUT_ADVICE = (
    "Methods and factors are measured at the context that you want, and one is recommended, with the reason and what "
    "to type. Nothing of the loaded model changes."
)
CHOSEN = ["none", "linear", "dynamic", "yarn"]
LENGTHS = "256, 512, 1024, 2048"


def build_context_lab(session: Session, bar: ModelBar) -> None:
    """Lay it out and connect it."""
    gr.Markdown(ABOUT)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=250):
            lengths = gr.Textbox(
                LENGTHS, label="Context lengths", info="In tokens, separated by commas.", elem_id="lab-lengths"
            )
            factor = gr.Textbox(
                label="Scaling factor",
                placeholder="longest / trained length",
                info="For every method.",
                elem_id="lab-factor",
            )
            with gr.Accordion("Text to read", open=False):
                file = gr.File(label="A text file", file_types=["text"], height=160)
                pasted = gr.Textbox(
                    label="Or paste one", info="Empty: Python files that the embedded model has never seen.", lines=3
                )
        with gr.Column(scale=3, min_width=300):
            with gr.Tab("Perplexity"):
                curves = _Measurement("perplexity", "tokens")
                scalings = gr.CheckboxGroup(
                    [],
                    label="Scalings",
                    info="One line each; adapters bring their own scaling.",
                    elem_id="lab-scalings",
                )
                tokens = gr.Slider(
                    2048,
                    65536,
                    4096,
                    step=2048,
                    label="Tokens to read",
                    info="From the text, per line and length: more is smoother.",
                    elem_id="lab-tokens",
                )
                curves.show()
            with gr.Tab("Which scaling?"):
                advice = _Measurement("recommend", "tokens", "Measure and recommend")
                gr.Markdown(ABOUT_ADVICE)
                with gr.Row():
                    wanted = gr.Number(
                        2048, precision=0, label="Context wanted", info="In tokens.", elem_id="lab-wanted"
                    )
                    budget = gr.Slider(
                        2048,
                        65536,
                        4096,
                        step=2048,
                        label="Tokens to read",
                        info="From the text, per scaling: more is surer.",
                        elem_id="lab-budget",
                    )
                advice.show()
            with gr.Tab("Retrieval"):
                cells = _Measurement("retrieval", "questions")
                task = gr.Dropdown(
                    [(meaning.capitalize(), name) for name, meaning in TASKS.meanings.items()],
                    value=TASKS.default,
                    label="What is hidden",
                    info="And asked for at the end.",
                    elem_id="lab-task",
                )
                scaling = gr.Dropdown(
                    [], label="Scaling", info="The one that the model reads with.", elem_id="lab-scaling"
                )
                trials = gr.Slider(
                    1,
                    16,
                    4,
                    step=1,
                    label="Trials per cell",
                    info="More trials, finer percentages.",
                    elem_id="lab-trials",
                )
                cells.show()
    text = [file, pasted]
    _connect_runs(session, lengths, factor, text, (curves, scalings, tokens), (cells, scaling, trials, task))
    _connect_advice(session, text, advice, wanted, budget)

    def run_choices(before: str) -> list[Any]:
        names = session.lab.scalings()
        chosen = CHOSEN + [name for name in names if name.startswith(ADAPTER_MARK)][:MAX_CHOSEN_ADAPTERS]
        choices = [gr.update(choices=names, value=chosen), gr.update(choices=names, value=AS_LOADED)]
        now = session.lab.folder()
        if now == before:  # only its settings have changed: what a visitor has measured stays
            return [*choices, now, *[gr.skip()] * (len(curves.outputs) + len(cells.outputs))]
        of_curves, of_maps = session.lab.stored()
        return [*choices, now, *curves.stored(of_curves), *cells.stored(of_maps)]

    folder = gr.State("")
    bar.changed.change(run_choices, folder, [scalings, scaling, folder, *curves.outputs, *cells.outputs], **HIDDEN)


class _Measurement:
    """Buttons, progress, plot and table of one measurement."""

    def __init__(self, name: str, unit: str, label: str = "Measure") -> None:
        self.name = name
        self.unit = unit
        self.label = label

    def show(self) -> None:
        """Lay it out here."""
        with gr.Row():
            self.go = gr.Button(self.label, variant="primary", min_width=90, size="md", elem_id=f"lab-{self.name}-go")
            self.cancel = gr.Button("Cancel", min_width=90, size="md", elem_id=f"lab-{self.name}-cancel")
        self.progress = gr.HTML(elem_id=f"lab-{self.name}-progress")
        self.plot = gr.HTML(elem_id=f"lab-{self.name}-plot", elem_classes=["rw-plot"])
        with gr.Accordion("Table", open=False):
            self.table = gr.Dataframe(interactive=False, show_label=False, elem_id=f"lab-{self.name}-table")
            self.csv = gr.DownloadButton(
                "Download as CSV", size="sm", interactive=False, elem_id=f"lab-{self.name}-csv"
            )

    @property
    def outputs(self) -> list[gr.components.Component]:
        """In the order of `shown`."""
        return [self.progress, self.plot, self.table, self.csv]

    def stored(self, view: LabView | None) -> list[Any]:
        """What comes with the model as values of `outputs`, all empty if nothing does."""
        if view is None:
            return ["", "", gr.update(value=None), gr.update(value=None, interactive=False)]
        return [advice_lines(view.advice), *self._results(view)]

    def shown(self, view: LabView) -> list[Any]:
        """A view as values of `outputs`; plot and table stay until there are new ones."""
        bar = progress_bar(view.measured, self.unit) + advice_lines(view.advice)
        if view.csv is None:
            return [bar, gr.skip(), gr.skip(), gr.skip()]
        return [bar, *self._results(view)]

    def _results(self, view: LabView) -> list[Any]:
        table = gr.update(value={"headers": list(view.columns), "data": [list(row) for row in view.rows]})
        return [view.svg, table, gr.update(value=str(view.csv), interactive=True)]


def _connect_runs(session: Session, lengths: Any, factor: Any, text: list[Any], first: Any, second: Any) -> None:
    curves, scalings, tokens = first
    cells, scaling, trials, task = second

    def read(file: str | None, pasted: str | None) -> str:
        return session.lab.text(Path(file) if file else None, pasted or "")

    def run_curves(
        wanted: str,
        by: str,
        file: str | None,
        pasted: str | None,
        names: list[str],
        most: float,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        try:
            source = read(file, pasted)
        except RopewalkError as error:
            yield [problem(str(error)), gr.skip(), gr.skip(), gr.skip()]
            return
        for view in session.lab.perplexity(visitor(request), source, wanted, names or [], by, most):
            yield curves.shown(view)

    def run_cells(
        wanted: str,
        by: str,
        file: str | None,
        pasted: str | None,
        name: str,
        count: float,
        hidden: str,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        try:
            source = read(file, pasted)
        except RopewalkError as error:
            yield [problem(str(error)), gr.skip(), gr.skip(), gr.skip()]
            return
        for view in session.lab.retrieval(visitor(request), source, wanted, name, by, count, hidden):
            yield cells.shown(view)

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    shared = [lengths, factor, *text]
    curves.go.click(run_curves, [*shared, scalings, tokens], curves.outputs, concurrency_limit=None, **HIDDEN)
    cells.go.click(run_cells, [*shared, scaling, trials, task], cells.outputs, concurrency_limit=None, **HIDDEN)
    curves.cancel.click(run_stop, None, None, **HIDDEN)
    cells.cancel.click(run_stop, None, None, **HIDDEN)


def _connect_advice(
    session: Session, text: list[Any], advice: _Measurement, wanted: gr.Number, budget: gr.Slider
) -> None:
    def run_advice(
        file: str | None, pasted: str | None, length: float | None, most: float, request: gr.Request
    ) -> Iterator[list[Any]]:
        try:
            source = session.lab.text(Path(file) if file else None, pasted or "")
        except RopewalkError as error:
            yield [problem(str(error)), gr.skip(), gr.skip(), gr.skip()]
            return
        for view in session.lab.recommend(visitor(request), source, length, most):
            yield advice.shown(view)

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    advice.go.click(run_advice, [*text, wanted, budget], advice.outputs, concurrency_limit=None, **HIDDEN)
    advice.cancel.click(run_stop, None, None, **HIDDEN)
