# Fuses two modes in one model that reinforcement learning taught to think: half of the windows think, after /think, and
# half answer at once behind an empty block of thinking, after /no_think. One GPU with 80 GB, for 0.6B parameters: 131M
# tokens are 5e17 FLOPs; not timed yet.
# The weights: what config/grpo_gsm8k.py makes of those of config/sft_thinking.py.
# The data, of which only last answers are learned, as earlier ones have no block of thinking:
#   python data/prepare.py numinamath --chat --think --switches --turns last --skip_bad --out data/thinking \
#       --tokenizer qwen3/tokenizer.json
#   python data/prepare.py ultrachat --chat --no_think --switches --turns last --out data/direct \
#       --tokenizer qwen3/tokenizer.json
init_from = "out/grpo_gsm8k"
data = ["data/thinking:0.5", "data/direct:0.5"]  # shares of the windows, and so of the tokens
out_dir = "out/sft_fusion"

pack = "documents"  # whole conversations in a window
document_mask = True  # which do not see each other
long_documents = "skip"

block_size = 8192
batch_tokens = 262144  # 32 * 8192
micro_batch = 2
max_steps = 500  # 500 * 262,144 = 131M tokens
optimizer = "adamw"  # of which the weights come: Muon does best on what it trained itself
learning_rate = 1e-5
min_lr = 1e-6
warmup_steps = 50
weight_decay = 0.0
eval_every = 100
eval_tokens = 2097152
gradient_checkpointing = True
