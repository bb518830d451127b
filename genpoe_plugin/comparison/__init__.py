"""Compare lm_eval results: leaderboards with intervals, paired tests, controls and costs."""
