"""From lm_eval result folders to a leaderboard: who is better, how sure that is, and what it costs."""
