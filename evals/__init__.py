"""Questions with known answers: their files, their scoring, and the sandbox and judge of programs that models write."""
