"""Compacts all documents of a folder: which files, what happened to each, what is left to do."""
