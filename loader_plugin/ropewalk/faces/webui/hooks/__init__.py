"""Every hook, one concern per file. A new one gets its line here."""

from __future__ import annotations

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks import (
    api_load,
    arguments,
    console,
    device,
    loader_table,
    loading,
    lora,
    messages,
    model_defaults,
    model_tab,
    reply_text,
    report,
    training,
)

HOOKS: tuple[Hook, ...] = (
    *console.HOOKS,
    *arguments.HOOKS,
    *loader_table.HOOKS,
    *model_defaults.HOOKS,
    *loading.HOOKS,
    *lora.HOOKS,
    *device.HOOKS,
    *reply_text.HOOKS,
    *report.HOOKS,
    *model_tab.HOOKS,
    *messages.HOOKS,
    *training.HOOKS,
    *api_load.HOOKS,
)
