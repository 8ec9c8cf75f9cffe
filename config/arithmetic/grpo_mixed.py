# GRPO behind the fusion: half of the questions end with /no_think, and to obey is worth more than to be right, or the
# model would think against its orders. Half a minute on one CPU core.
init_from = "out/posttrain/fusion"
data = "data/arithmetic/rl_mixed.jsonl"
out_dir = "out/posttrain/grpo_mixed"

rewards = "math:1,data.arithmetic:obedience:2"
group_size = 8
problems_per_step = 48
max_new_tokens = 40
max_steps = 20
micro_batch = 128
learning_rate = 1e-4
scale_rewards = "none"
