"""Readers of what training runs leave behind: states, arguments, configs, event files and tables."""
