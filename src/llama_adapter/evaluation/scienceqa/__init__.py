"""ScienceQA, all of it: its files, how its questions are written, answers, scores."""
