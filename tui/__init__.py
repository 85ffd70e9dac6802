"""The terminal interface: `tui.app.run` opens it."""
