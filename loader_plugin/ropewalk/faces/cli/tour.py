"""`ropewalk tour`: what context scaling does, in one minute at a terminal."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropewalk.base.errors import ContextLengthError, RequestError
from ropewalk.base.json import require_folder
from ropewalk.faces.cli.options import MODEL_HELP, add_load_arguments, load_options, model_argument, model_folder
from ropewalk.faces.cli.terminal import progress_bar, read_text

if TYPE_CHECKING:
    from ropewalk.tour.readers import Reader, Readers
    from ropewalk.tour.tour import Question, Tour

WIDEST = 96  # columns that are read with ease
MOST_SHOWN = 160  # characters of an answer: a wrong one may go on for long
EXCERPT = 280  # characters of the document
GREEN, RED, BOLD, FAINT = "32", "31", "1", "2"


def add_tour_command(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("tour", help="what context scaling does, in one minute", description=run_tour.__doc__)
    parser.add_argument(
        "model", nargs="?", type=model_argument, metavar="MODEL", help=f"{MODEL_HELP} (default: the embedded one)"
    )
    parser.add_argument("--question", metavar="TEXT", help="ask this instead of the questions of the tour")
    parser.add_argument(
        "--document", metavar="FILE", help="ask --question about this text (UTF-8; -: standard input) instead"
    )
    add_load_arguments(parser)
    parser.set_defaults(run=run_tour)


def run_tour(args: argparse.Namespace) -> int:
    """A model answers questions about a document far longer than what it was trained on, with its context scaling and
    without: the tour that comes with it, or a question of your own."""
    from ropewalk.model.loader import load_model
    from ropewalk.text.tokenizer.load import load_tokenizer
    from ropewalk.tour.readers import open_readers
    from ropewalk.tour.tour import read_tour, tour_file

    folder = model_folder(args)
    require_folder(folder, "config.json and the weights")
    tour = read_tour(folder)
    if tour is None:
        raise RequestError(
            f"{folder} brings no tour ({tour_file(folder).relative_to(folder)}): ask it with ropewalk generate or "
            "chat, or take the tour of the embedded model with ropewalk tour"
        )
    if args.document is not None and args.question is None:
        raise RequestError(f"--document {args.document}: ask something about it with --question TEXT")
    document = tour.document if args.document is None else read_text(args.document)
    asked = [question.text for question in tour.questions] if args.question is None else [args.question]
    tokenizer = load_tokenizer(folder)
    with progress_bar("loading", "layer") as progress:
        model = load_model(folder, options=load_options(args), progress=progress)
    readers = open_readers(tour, folder, model, tokenizer)
    known = {q.text: q for q in tour.questions} if args.document is None else {}
    try:
        _introduce(tour.title if args.document is None else args.document, document, asked[0], readers)
        right = [_take(tour, readers, is_scaled, document, asked, known) for is_scaled in (True, False)]
    except ContextLengthError as error:
        what = "--question" if args.document is None else f"--document {args.document}"
        raise RequestError(
            f"{what} is too long: document and question have more tokens than the "
            f"{readers.scaled.engine.context_size:,} that the scaling of the tour covers"
        ) from error
    _conclude(args, tour, right if set(asked) <= set(known) else None, len(asked))
    return 0


def _introduce(title: str, document: str, question: str, readers: Readers) -> None:
    length, trained = len(readers.scaled.prompt_ids(document, question)), readers.plain.rope.original_length
    _say(f"\n{_styled(title, BOLD)}")
    _paragraph(f"{length:,} tokens with a question; the model was trained on {trained:,}. The text begins:", "")
    _say("")
    _paragraph(textwrap.shorten(document, EXCERPT, placeholder=" …"), "  │ ", FAINT)


def _take(
    tour: Tour, readers: Readers, is_scaled: bool, document: str, asked: Sequence[str], known: dict[str, Question]
) -> int:
    """Ask all questions in one way to read; how many answers are the stored ones."""
    from ropewalk.tour.explanation import scaling_name, why

    reader = readers.reader(is_scaled)
    lora = "" if tour.adapter is None else f" and the LoRA {tour.adapter}"
    how = f"With {scaling_name(readers.scaled.rope)}{lora}" if is_scaled else "Without, as the model was trained"
    _say("")
    _paragraph(how, "", BOLD)
    right = sum(_ask(reader, document, text, known.get(text), is_scaled) for text in asked)
    _say("")
    _paragraph(why(tour, readers, is_scaled, len(reader.prompt_ids(document, asked[-1]))), "  ")
    return right


def _ask(reader: Reader, document: str, text: str, question: Question | None, with_passage: bool) -> bool:
    """Ask, and show the answer; whether it is the stored one."""
    from ropewalk.tour.readers import is_right

    _say("")
    _paragraph(text, "  ")
    with progress_bar("reading", "token") as progress:
        answer = reader.ask(document, text, progress).text
    said = textwrap.shorten(answer, MOST_SHOWN, placeholder=" …") or "(nothing)"
    if question is None:
        _paragraph(said, "    ")
        return False
    if is_right(question, answer):
        _paragraph(said, "    ✓ ", GREEN)
        if with_passage:
            depth = document.index(question.passage) / len(document)
            _paragraph(f"“{question.passage}” ({depth:.0%} into the text)", "      ", FAINT)
        return True
    _paragraph(said, "    ✗ ", RED)
    _paragraph(f"The text says: {question.answer}", "      ")
    return False


def _conclude(args: argparse.Namespace, tour: Tour, right: list[int] | None, num_asked: int) -> None:
    if right is not None:
        found = tour.measured
        _say("")
        _paragraph(f"Right: {right[0]} of {num_asked} with the scaling, {right[1]} without.", "", BOLD)
        _paragraph(
            f"The document was chosen among {found.documents:,}; of {found.questions:,} questions that were tried, "
            f"{found.right_scaled:,} were answered right with the scaling and {found.right_plain:,} without.",
            "",
            FAINT,
        )
    name = "" if args.model is None else f" {shlex.quote(str(args.model))}"
    _say(f"\n{_styled('What to try next', BOLD)}")
    commands = {
        f"ropewalk tour{name} --question TEXT": "ask something else about it",
        f"ropewalk tour{name} --document FILE --question TEXT": "about a text of yours",
        f"ropewalk demo{name}": "the same on a page, with curves and maps",
        f"ropewalk retrieval{name} --plot map.png": "measure it yourself",
    }
    width = max(map(len, commands))
    fits = max(width + len(what) + 4 for what in commands.values()) <= _columns()
    for command, what in commands.items():
        _say(f"  {command:{width}}  {_styled(what, FAINT)}" if fits else f"  {command}\n    {_styled(what, FAINT)}")


def _paragraph(text: str, lead: str, style: str = "") -> None:
    """Lines of a text, all of them indented as far as `lead`; a bar in it goes down all lines."""
    width = min(WIDEST, _columns())
    rest = lead if "│" in lead else " " * len(lead)
    for number, line in enumerate(textwrap.wrap(text, max(20, width - len(lead)))):
        _say(_styled(f"{rest if number else lead}{line}", style))


def _styled(text: str, style: str) -> str:
    is_coloured = style and sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # no-color.org
    return f"\x1b[{style}m{text}\x1b[0m" if is_coloured else text


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _say(text: str) -> None:
    print(text, flush=True)
