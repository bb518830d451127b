"""Passages, questions and answers: file formats, readers, writers and downloads."""
