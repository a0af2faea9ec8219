"""Pages that people look at. gradio is imported in this room alone, and only by the modules that make a page."""
