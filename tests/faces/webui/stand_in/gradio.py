"""Components that remember what they were made with, and blocks that remember their children."""

from __future__ import annotations

from typing import Any


class Block:
    open_blocks: list[Block] = []  # noqa: RUF012  (the stack of the page that is being built)

    def __init__(self, **properties: Any) -> None:
        self.children: list[Block] = []
        self.parent: Block | None = None
        self.info: str | None = None
        self.__dict__.update(properties)
        if Block.open_blocks:
            self.parent = Block.open_blocks[-1]
            self.parent.children.append(self)

    def __enter__(self) -> Block:
        self.parent = Block.open_blocks[-1] if Block.open_blocks else None  # as in gradio: also when entered again
        Block.open_blocks.append(self)
        return self

    def __exit__(self, *failure: Any) -> None:
        Block.open_blocks.remove(self)


class Column(Block): ...


class Row(Block): ...


class Slider(Block): ...


class Number(Block): ...


class Textbox(Block): ...


class State(Block):
    def __init__(self, value: Any) -> None:
        super().__init__(value=value)


class Dropdown(Block):
    def __init__(self, choices: list[str], **properties: Any) -> None:
        super().__init__(**properties)
        self.choices = [(choice, choice) for choice in choices]
