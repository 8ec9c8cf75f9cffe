# Both ways of answering, by a switch at the end of the question: as many conversations that think after /think as answer
# at once after /no_think. GRPO had destroyed the way that it does not reward; 1 minute on one CPU core.
# The data: python data/prepare.py data/arithmetic/fusion.jsonl --chat --tokenizer data/arithmetic/tokenizer.json --out data/arithmetic/fusion
init_from = "out/posttrain/grpo"
data = "data/arithmetic/fusion"
out_dir = "out/posttrain/fusion"

document_mask = True
pack = "documents"
block_size = 128
batch_tokens = 2560  # 20 * 128
micro_batch = 20
max_steps = 300  # 5 epochs
learning_rate = 2e-3
warmup_steps = 20
weight_decay = 0.0
muon_steps = 3
eval_every = 100
eval_tokens = 0
