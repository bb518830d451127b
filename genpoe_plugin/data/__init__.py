"""Passages, questions and answers: their files, their forms, and where they are downloaded from."""
