"""Which expert took which token, as text, JSON and a page."""
