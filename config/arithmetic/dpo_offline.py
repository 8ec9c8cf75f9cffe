# A warning, not a stage: plain DPO on pairs that are sampled once, of a model that is right nearly always. The margin
# between better and worse answers grows, and the answers get worse. Half a minute on one CPU core.
init_from = "out/posttrain/grpo"
data = "data/arithmetic/rl.jsonl"
eval_data = "data/arithmetic/held_out.jsonl"
out_dir = "out/posttrain/dpo_offline"

online = 50  # as many as max_steps: pairs are sampled once
rewards = "math:1"
problems_per_round = 1500  # about a tenth of them make a pair: all answers to the others are right
group_size = 8
max_new_tokens = 40
max_steps = 50
pairs_per_step = 32
micro_batch = 32
learning_rate = 1e-4
warmup_steps = 5
eval_every = 10
eval_problems = 0  # all 400
