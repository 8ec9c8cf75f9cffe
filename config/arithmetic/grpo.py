# Sums by trial and error: 60 steps of 48 problems with 8 answers each, 1 minute on one CPU core. Nothing but the right
# answer is rewarded, and the model finds out that thinking pays.
init_from = "out/posttrain/sft"
data = "data/arithmetic/rl.jsonl"
eval_data = "data/arithmetic/held_out.jsonl"
out_dir = "out/posttrain/grpo"

rewards = "math:1"
group_size = 8
problems_per_step = 48
max_new_tokens = 40  # a thought and an answer have 29 at most
max_steps = 60
micro_batch = 128
learning_rate = 3e-4
scale_rewards = "none"
eval_every = 20
eval_problems = 0  # all 400
