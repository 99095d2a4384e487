"""The demo page: `session.py` and what it uses behave and know no Gradio, `app.py` and `tabs/` lay out."""
