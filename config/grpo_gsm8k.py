# Grade-school mathematics for a fine-tuned Qwen3-0.6B (config/sft_thinking.py) by GRPO, on one GPU of 80 GB: 7,473
# problems, of which a step has 32. torchrun on 8 GPUs does the same 8 times as fast, with the same result.
init_from = "out/sft_thinking"
data = "gsm8k"
out_dir = "out/grpo_gsm8k"

rewards = "math:1,format:0.1"
group_size = 16
problems_per_step = 32
max_new_tokens = 2048
think_budget = 1536
temperature = 0.7
block_size = 4096

loss_type = "dapo"
clip_low = 0.2
clip_high = 0.28
beta = 0.01  # the policy stays near where it began
max_steps = 500
micro_batch = 8
learning_rate = 1e-6
warmup_steps = 10

eval_data = "gsm8k_test"
eval_every = 50
eval_problems = 256
rollout_rows = 256
