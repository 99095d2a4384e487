"""The demo page. `session.py` and what it holds are its behaviour, without Gradio; layouts and `app.py` display it.

    shared <- model_bar <- replies <- tour, chat, notebook, documents, context_lab, layers <- session (behaviour)
    shared <- model_bar <- replies <- tour, chat, notebook, documents, context_lab, layers <- app     (layouts)

No tab imports from another one.
"""
