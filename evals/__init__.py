"""Questions with known answers: their files, their scoring, and the sandbox and the judge of programs that a model wrote."""
