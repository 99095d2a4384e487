"""The metrics of all replicas as one text: each family once, each of its samples with the replica's name."""

from __future__ import annotations

from collections.abc import Mapping

LABEL = "replica"


def joined_metrics(texts: Mapping[str, str]) -> str:
    """texts: by replica, in Prometheus' text format, as prometheus_client writes it: comments, then their samples."""
    families: dict[str, _Family] = {}
    for replica, text in texts.items():
        family = None
        for line in text.splitlines():
            if line.startswith("# "):
                family = families.setdefault(line.split(" ", 3)[2], _Family())
                family.add_comment_(line)
            elif line and family is not None:
                family.samples.append(_labelled(line, replica))
    return "".join(f"{line}\n" for family in families.values() for line in (*family.comments, *family.samples))


class _Family:
    """The lines of one metric."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.samples: list[str] = []

    def add_comment_(self, line: str) -> None:
        """HELP and TYPE stand there once, whatever the number of replicas."""
        if line not in self.comments:
            self.comments.append(line)


def _labelled(sample: str, replica: str) -> str:
    """NAME VALUE or NAME{LABELS} VALUE, with one label more."""
    label = f'{LABEL}="{replica}"'
    name_end = min(end for end in (sample.find("{"), sample.find(" ")) if end >= 0)
    if sample[name_end] == "{":
        return f"{sample[: name_end + 1]}{label},{sample[name_end + 1 :]}"
    return f"{sample[:name_end]}{{{label}}}{sample[name_end:]}"
