"""The demo page. `session.py` and what it uses are its behaviour and know no Gradio; `app.py` and `tabs/` are layout."""
