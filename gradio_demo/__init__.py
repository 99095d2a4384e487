"""The demo page: `session.py` and what it holds behave and know no Gradio; layouts and `app.py` show it.

    shared <- model_bar <- replies <- chat, notebook, documents, context_lab, layers <- session (behaviour)
    shared <- model_bar <- replies <- chat, notebook, documents, context_lab, layers <- app     (layouts)

No tab imports from another one.
"""
