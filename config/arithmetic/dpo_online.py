# DPO on pairs that the model itself samples, anew every 10 steps; nll_coef keeps the better answer likely. Half a
# minute on one CPU core. The last stage of `make posttrain`.
init_from = "out/posttrain/grpo_mixed"
data = "data/arithmetic/rl_mixed.jsonl"
out_dir = "out/posttrain/dpo_online"

online = 10
rewards = "math:1,data.arithmetic:obedience:2"
problems_per_round = 96
group_size = 8
max_new_tokens = 40
nll_coef = 1.0
max_steps = 40
pairs_per_step = 32
micro_batch = 32
learning_rate = 3e-5  # at 1e-4 it spoils what GRPO has taught: 100 % right become 86 %
warmup_steps = 5
