"""Builds the pages of the manual that come from code and configurations."""
