"""Questions with known answers: their files, their scoring, and the sandbox for programs that a model wrote."""
