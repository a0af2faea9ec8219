"""Pages that people look at in a browser; gradio is imported only here."""
