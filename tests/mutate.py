"""Breaks the project in one line at a time, and sees whether the tests notice: `python -m tests.mutate [name...]`.

Each mutant is a mistake that someone could make: a text of one file that is replaced in a copy of the project, and the
few tests that must fail for it. A mutant that survives is a promise that no test keeps. Without names all are tried,
which takes ten minutes, and docs/mutations.md is written.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.tiny import ROOT
from tests.tree import copy_of_the_project

TABLE = ROOT / "docs" / "mutations.md"


class Mutant(NamedTuple):
    name: str
    file: str
    before: str  # stands once in the file
    after: str
    tests: str  # what pytest is given: a file of tests/, and words that their names have


MUTANTS = [
    # ---- model files: numbers ----
    Mutant(
        "loss in bf16",
        "model_baseline.py",
        "self.logits(x).flatten(0, 1).float()",
        "self.logits(x).flatten(0, 1)",
        "test_models.py -k 'bf16 and baseline'",
    ),
    Mutant(
        "losses of tokens in bf16",
        "model_baseline.py",
        "F.cross_entropy(self.logits(x).float()",
        "F.cross_entropy(self.logits(x)",
        "test_models.py -k 'bf16 and baseline'",
    ),
    Mutant(
        "norm rounded before its weight",
        "model_baseline.py",
        "F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps)",
        "F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight",
        "test_models.py -k 'norms and baseline'",
    ),
    Mutant(
        "1 + weight in bf16",
        "model_hybrid.py",
        "1 + self.weight.to(wide)",
        "(1 + self.weight).to(wide)",
        "test_models.py -k 'norms and hybrid'",
    ),
    Mutant(
        "taps summed in bf16",
        "model_hybrid.py",
        "x = x.to(torch.promote_types(x.dtype, torch.float32))",
        "x = x + 0",
        "test_hybrid.py -k taps",
    ),
    Mutant(
        "router in bf16",
        "model_moe.py",
        "dtype = torch.promote_types(x.dtype, torch.float32)",
        "dtype = x.dtype",
        "test_moe.py -k router_of_a_bf16",
    ),
    Mutant(
        "router under autocast",
        "model_moe.py",
        "with torch.autocast(device_type, enabled=False):",
        "if True:",
        "test_moe.py -k autocast",
    ),
    Mutant(
        "a cast takes the counters along",
        "model_moe.py",
        "setattr(self, name, buffer.to(device))",
        "pass",
        "test_moe.py -k buffers",
    ),
    Mutant(
        "decay of nothing times zero",
        "model_hybrid.py",
        "torch.where(later, log_decay[..., None], 0.0).cumsum",
        "(log_decay[..., None] * later).cumsum",
        "test_hybrid.py -k to_zero",
    ),
    # ---- model files: what is computed ----
    Mutant(
        "no dropout on the MLP",
        "model_baseline.py",
        "x = x + self.dropout(self.mlp(self.mlp_norm(x)))",
        "x = x + self.mlp(self.mlp_norm(x))",
        "test_models.py -k 'dropout and baseline'",
    ),
    Mutant(
        "no dropout on embeddings",
        "model_gpt2.py",
        "x = self.dropout(self.embed(idx) + self.pos_embed(positions))",
        "x = self.embed(idx) + self.pos_embed(positions)",
        "test_models.py -k 'dropout and gpt2'",
    ),
    Mutant(
        "wo of delta layers at full size",
        "model_hybrid.py",
        "p.normal_(0.0, residual_std)",
        "p.normal_(0.0, std if '.delta.' in name else residual_std)",
        "test_models.py -k 'start_smaller and hybrid'",
    ),
    Mutant(
        "w_down of shared experts at full size",
        "model_moe.py",
        "p.normal_(0.0, residual_std)",
        "p.normal_(0.0, std if '.shared.' in name else residual_std)",
        "test_models.py -k 'start_smaller and moe'",
    ),
    Mutant(
        "zero_init_residual without w_down",
        "model_baseline.py",
        "p.normal_(0.0, residual_std)",
        "p.normal_(0.0, residual_std or std * (kind == 'w_down'))",
        "test_models.py -k 'identity and baseline'",
    ),
    Mutant(
        "embeddings scaled by n_embd",
        "model_baseline.py",
        "x = x * self.config.n_embd**0.5",
        "x = x * self.config.n_embd",
        "test_models.py -k 'scaled and baseline'",
    ),
    Mutant(
        "eps of query and key norms fixed",
        "model_baseline.py",
        "self.q_norm = RMSNorm(D, config.norm_eps)",
        "self.q_norm = RMSNorm(D, 1e-6)",
        "test_parity.py -k 'qwen3 and logits and plain'",
    ),
    Mutant(
        "softcap without its factor",
        "model_baseline.py",
        "logits = cap * torch.tanh(logits / cap)",
        "logits = torch.tanh(logits / cap)",
        "test_models.py -k 'softcap and baseline'",
    ),
    Mutant(
        "yarn sharpens what is not stretched",
        "model_baseline.py",
        "math.log(max(config.rope_factor, 1.0))",
        "math.log(config.rope_factor)",
        "test_parity.py -k magnitude",
    ),
    Mutant(
        "yarn's blend reversed",
        "model_baseline.py",
        "inv_freq = inv_freq * (1 - share) + inv_freq / config.rope_factor * share",
        "inv_freq = inv_freq * share + inv_freq / config.rope_factor * (1 - share)",
        "test_parity.py -k 'yarn and qwen3 and logits'",
    ),
    Mutant(
        "turned the other way",
        "model_baseline.py",
        "x1 * cos - x2 * sin, x2 * cos + x1 * sin",
        "x1 * cos + x2 * sin, x2 * cos - x1 * sin",
        "test_parity.py -k 'qwen3 and logits and plain'",
    ),
    Mutant(
        "gates before their norm",
        "model_gated.py",
        "q = q * self.wq_gate(x).view_as(q).sigmoid()",
        "q = self.q_norm(q * self.wq_gate(x).view_as(q).sigmoid())",
        "test_gated.py -k equations",
    ),
    Mutant(
        "values without their gate",
        "model_gated.py",
        "v = v * self.wv_gate(x).view_as(v).sigmoid()",
        "v = v",
        "test_gated.py -k equations",
    ),
    Mutant(
        "documents leak into the convolution",
        "model_hybrid.py",
        "(self.conv.weight[:, 0, i] * inside[..., None])",
        "self.conv.weight[:, 0, i]",
        "test_models.py -k 'packed and hybrid'",
    ),
    Mutant(
        "documents leak into the state",
        "model_hybrid.py",
        "decay = decay * same.tril()",
        "decay = decay.tril()",
        "test_hybrid.py -k slow_loop",
    ),
    Mutant(
        "keys not of length 1",
        "model_hybrid.py",
        "k = unit(k.view(B, T, -1, self.key_dim))",
        "k = k.view(B, T, -1, self.key_dim)",
        "test_parity.py -k 'next and logits'",
    ),
    Mutant(
        "positions not in the scale",
        "model_mla.py",
        "self.scale = (N + D) ** -0.5",
        "self.scale = N**-0.5",
        "test_parity.py -k 'deepseek_v3 and logits'",
    ),
    Mutant(
        "ties broken by topk",
        "model_indexer.py",
        "return above | (ties & latest)",
        "return torch.zeros_like(seen).scatter(-1, scores.topk(K, dim=-1).indices, True)",
        "test_indexer.py -k ties",
    ),
    Mutant(
        "keys of other documents where few are seen",
        "model_indexer.py",
        "some_seen = seen[:, some].gather(-1, place)",
        "some_seen = torch.ones_like(place, dtype=torch.bool)",
        "test_indexer.py -k slow_loop",
    ),
    Mutant(
        "all else learns from the indexer's loss",
        "model_indexer.py",
        "self.indexer.project(x.detach(), q_latent.detach(), rope)",
        "self.indexer.project(x, q_latent, rope)",
        "test_indexer.py -k kl_alone",
    ),
    Mutant(
        "a dense stage that learns the text",
        "model_indexer.py",
        "loss = loss.detach()",
        "pass",
        "test_indexer.py -k dense_stage",
    ),
    Mutant(
        "a window of one more",
        "model_sliding.py",
        "near = key_place > place - config.window",
        "near = key_place >= place - config.window",
        "test_sliding.py -k sees_its_window",
    ),
    Mutant(
        "a long chunk overwrites what it sees",
        "model_sliding.py",
        "if T > 1:  # a copy",
        "if T > 99:  # a copy",
        "test_sliding.py -k cached",
    ),
    Mutant(
        "a first token seen twice, in its slot and in the ring",
        "model_sliding.py",
        "torch.where(prefix <= last - self.n_ring, prefix, -1)",
        "torch.where(prefix <= last, prefix, -1)",
        "test_sliding.py -k many_documents",
    ),
    Mutant(
        "a stretched local layer",
        "model_sliding.py",
        'if letter == "l":',
        'if letter == "x":',
        "test_sliding.py -k gemma_3",
    ),
    Mutant(
        "a window sees its own slots",
        "model_linformer.py",
        "(slot_start < window_start)",
        "(slot_start <= window_start)",
        "test_linformer.py -k to_the_bit",
    ),
    Mutant(
        "slots of the document before",
        "model_linformer.py",
        "has_ended = (doc_start <= slot_start) & (slot_start < window_start)",
        "has_ended = slot_start < window_start",
        "test_linformer.py -k slow_loop",
    ),
    Mutant(
        "slots of a window that a document cut off",
        "model_linformer.py",
        "whole = (last < T) & (window_start.gather(1, last.clamp(max=T - 1)) == start)",
        "whole = last < T",
        "test_linformer.py -k places_of_their_own",
    ),
    Mutant(
        "slots of the text before",
        "model_linformer.py",
        "self.slot_start.fill_(-1)",
        "self.slot_start.add_(0)",
        "test_linformer.py -k used_again",
    ),
    Mutant(
        "documents leak from chunk to chunk",
        "model_linear.py",
        "log_decay.cumsum(dim=-2).exp() * (document == 0)",
        "log_decay.cumsum(dim=-2).exp()",
        "test_linear.py -k slow_loop",
    ),
    Mutant(
        "a token fades as it is written",
        "model_linear.py",
        "behind = F.pad(x[..., 1:, :], (0, 0, 0, 1))",
        "behind = x",
        "test_linear.py -k slow_loop",
    ),
    Mutant(
        "weights that do not sum to 1",
        "model_linear.py",
        "y[..., :-1] / y[..., -1:].clamp(min=1e-10)",
        "y[..., :-1]",
        "test_linear.py -k sum_to_1",
    ),
    Mutant(
        "all layers forget as the first one does",
        "model_linear.py",
        "* (1 - share + 1e-5)",
        "* (1 + 1e-5)",
        "test_linear.py -k minimax",
    ),
    Mutant(
        "a query is led by its own block's later tokens",
        "model_sparse.py",
        "(slot < first) | (slot >= own)",
        "(slot < first) | (slot > own)",
        "test_sparse.py -k no_query_is_led",
    ),
    Mutant(
        "the own block beside the top k",
        "model_sparse.py",
        "n_wanted = (rule == math.inf).sum(dim=-1) + config.top_k_block - 1",
        "n_wanted = (rule == math.inf).sum(dim=-1) + config.top_k_block",
        "test_sparse.py -k 'own_block_counts or slow_loop'",
    ),
    Mutant(
        "early queries attend to blocks that are not there",
        "model_sparse.py",
        "& (best > -math.inf)",
        "| (best == -math.inf)",
        "test_sparse.py -k early_queries",
    ),
    Mutant(
        "a document's blocks are cut from the beginning of the text",
        "model_sparse.py",
        "own_start = place - (place - doc_start) % b",
        "own_start = torch.maximum(doc_start, place - place % b)",
        "test_sparse.py -k 'slow_loop_over and masked'",
    ),
    Mutant(
        "a block's mean is not kept when it ends within a piece",
        "model_sparse.py",
        "n_ended = (len(place) + 2 * b - 2) // b",
        "n_ended = 1",
        "test_sparse.py -k keeps_a_mean",
    ),
    # ---- experts ----
    Mutant(
        "sigmoid shares not of sum 1",
        "model_moe.py",
        "share = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)",
        "share = scores",
        "test_moe.py -k perfect_balance",
    ),
    Mutant(
        "groups of one expert",
        "model_moe.py",
        "groups.topk(min(2, groups.size(-1))).values",
        "groups.topk(2).values",
        "test_moe.py -k loop_over_tokens",
    ),
    Mutant(
        "closed groups at 0",
        "model_moe.py",
        "groups.masked_fill(closed[..., None], -math.inf)",
        "groups.masked_fill(closed[..., None], 0.0)",
        "test_moe.py -k deepseek_v3",
    ),
    Mutant(
        "the bias in the gates",
        "model_moe.py",
        "gates = scores.gather(-1, chosen)",
        "gates = (scores + self.bias).gather(-1, chosen)",
        "test_moe.py -k never_how_much",
    ),
    Mutant(
        "the bias moves with the load",
        "model_moe.py",
        "(of_layer.float().mean() - of_layer).sign()",
        "(of_layer - of_layer.float().mean()).sign()",
        "test_moe.py -k bias_moves",
    ),
    Mutant(
        "micro-batches counted alike in the log",
        "model_moe.py",
        "torch.stack((balance, z)).detach() * load.sum()",
        "torch.stack((balance, z)).detach() * router.load.numel()",
        "test_moe.py -k metrics_are",
    ),
    Mutant(
        "layers of experts as they were given",
        "model_moe.py",
        "self.moe_layers = sorted(set(self.moe_layers))",
        "self.moe_layers = list(self.moe_layers)",
        "test_moe.py -k named_layers",
    ),
    Mutant(
        "z-loss of the first power",
        "model_moe.py",
        "logits.logsumexp(dim=-1).square()",
        "logits.logsumexp(dim=-1).abs()",
        "test_moe.py -k z_loss_equals",
    ),
    Mutant(
        "jitter three times as large",
        "model_switch.py",
        "uniform_(1 - self.config.router_jitter, 1 + self.config.router_jitter)",
        "uniform_(1 - 3 * self.config.router_jitter, 1 + 3 * self.config.router_jitter)",
        "test_switch.py -k jitter",
    ),
    Mutant(
        "jitter seen by the experts",
        "model_switch.py",
        "x = x * torch.empty_like(x).uniform_(",
        "x *= torch.empty_like(x).uniform_(",
        "test_switch.py -k jitter",
    ),
    # ---- the cache and text ----
    Mutant(
        "a branch of one shares its memory",
        "model_baseline.py",
        "new.k = [k.repeat_interleave(n, dim=0) for k in self.k]",
        "new.k = [k if n == 1 else k.repeat_interleave(n, dim=0) for k in self.k]",
        "test_models.py -k 'shares_nothing and baseline'",
    ),
    Mutant(
        "padding in a token's document",
        "model_baseline.py",
        "behind_padding = torch.where(place < self.pad, 0, self.pad)",
        "behind_padding = torch.zeros_like(place)",
        "test_generate.py -k 'ragged and baseline'",
    ),
    Mutant(
        "padding stays when tokens are lost",
        "generate.py",
        "pad = (self.pad[::n] - lost).clamp(min=0) if self.ragged else None",
        "pad = self.pad[::n] if self.ragged else None",
        "test_generate.py -k 'ragged and baseline'",
    ),
    Mutant(
        "top_p of everything, not of what top_k leaves",
        "generate.py",
        "likelier >= top_p * probs.sum(dim=-1, keepdim=True)",
        "likelier >= top_p",
        "test_generate.py -k filtered",
    ),
    Mutant(
        "samples of a prompt apart",
        "generate.py",
        "logits = logits.repeat_interleave(n, dim=0)",
        "logits = logits.repeat(n, 1)",
        "test_generate.py -k 'num_samples and baseline'",
    ),
    Mutant(
        "the penalty raises what is unlikely",
        "generate.py",
        "torch.where(said > 0, said / repetition_penalty, said * repetition_penalty)",
        "said / repetition_penalty",
        "test_generate.py -k penalty",
    ),
    # ---- kernels ----
    Mutant(
        "a scale is ignored",
        "kernels.py",
        "return flash_attention(q, k, v, scale=scale)",
        "return flash_attention(q, k, v)",
        "test_kernels_install.py -k scale",
    ),
    Mutant(
        "a scale is ignored among documents",
        "kernels.py",
        "return flash_attention(q, k, v, start=mask, scale=scale)",
        "return flash_attention(q, k, v, start=mask)",
        "test_kernels_install.py -k scale",
    ),
    Mutant(
        "a window one key wider",
        "kernels.py",
        "low = tl.maximum(t - (W - 1), 0)",
        "low = tl.maximum(t - W, 0)",
        "test_kernels_attention.py -k window_leaves",
    ),
    Mutant(
        "ignored targets have gradients",
        "kernels.py",
        "tl.where(target == -1, 0.0, dx)",
        "dx",
        "test_kernels_pointwise.py -k 'agrees_with_its_twin and cross'",
    ),
    Mutant(
        "a model with kernels cannot be read",
        "kernels.py",
        "functools.partial(candidate.method, module)",
        "candidate.method.__get__(module)",
        "test_kernels_install.py -k saved_whole",
    ),
    Mutant(
        "whatever a method computes is taken over",
        "kernels.py",
        "if all(same(a, b) for a, b in zip(got, wanted)):",
        "if got:",
        "test_kernels_install.py -k 'left_alone and geglu'",
    ),
    Mutant(
        "the state's decay left out",
        "kernels_delta.py",
        "state, change = state * rest, y * end[:, None]",
        "state, change = state, y * end[:, None]",
        "test_kernels_delta.py -k 'fp32 and prime'",
    ),
    # ---- the optimizer ----
    Mutant(
        "Muon without the size of AdamW",
        "muon.py",
        "return 0.2 * sqrt(max(fan_out, fan_in))",
        "return 0.2 * sqrt(min(fan_out, fan_in))",
        "test_muon.py -k torch",
    ),
    Mutant(
        "Muon without looking ahead",
        "muon.py",
        'updates = torch._foreach_lerp(grads, buffers, group["momentum"])',
        "updates = buffers",
        "test_muon.py -k torch",
    ),
    Mutant(
        "Muon moves idle experts",
        "muon.py",
        "direction.masked_fill_(idle, 0.0)",
        "pass",
        "test_muon.py -k stack_without",
    ),
    Mutant(
        "cautious decay the wrong way",
        "muon.py",
        "(w * u >= 0)",
        "(w * u <= 0)",
        "test_muon.py -k cautious",
    ),
    Mutant(
        "embeddings by Muon",
        "muon.py",
        "if in_block and is_matrix and not is_table_or_filter:",
        "if is_matrix:",
        "test_muon.py -k exactly_one_group",
    ),
    # ---- FLOPs ----
    Mutant(
        "a backward pass as cheap as a forward one",
        "flops.py",
        "total[row] = whole((cost.forward[row] + cost.backward[row]) / T - 3 * spared)",
        "total[row] = whole(2 * cost.forward[row] / T - 3 * spared)",
        "test_flops.py -k 'closed_form and baseline'",
    ),
    Mutant(
        "idle experts at work",
        "flops.py",
        "counts[row] += active - n",
        "counts[row] += 0",
        "test_flops.py -k 30b",
    ),
    Mutant(
        "a step without orthogonalization",
        "flops.py",
        "aten.baddbmm: flop_registry[aten.baddbmm],",
        "",
        "test_flops.py -k 'optimizers_flops and baseline'",
    ),
    # ---- training ----
    Mutant(
        "a step not finite is taken",
        "train.py",
        "is_finite = math.isfinite(norm)",
        "is_finite = True",
        "test_train.py -k 'not_finite and counted'",
    ),
    Mutant(
        "counts of a skipped step stay",
        "training/update.py",
        'if hasattr(model, "after_step"):',
        'if math.isfinite(norm) and hasattr(model, "after_step"):',
        "test_train.py -k skipped_step",
    ),
    Mutant(
        "a mean of the micro-batches' means",
        "train.py",
        "loss = losses.sum() * world_size / max(targets, 1) + auxiliary * share",
        "loss = losses.sum() / (y >= 0).sum().clamp(min=1) * share + auxiliary * share",
        "test_train.py -k 'depend_on_micro_batch and True'",
    ),
    Mutant(
        "auxiliary losses by targets",
        "train.py",
        "max(targets, 1) + auxiliary * share",
        "max(targets, 1) + auxiliary * (y >= 0).sum() / max(targets, 1)",
        "test_train.py -k auxiliary_losses_do_not",
    ),
    Mutant(
        "auxiliary losses by windows, whatever padding they have",
        "train.py",
        "share = own_text[i] * world_size / max(text, 1)",
        "pass",
        "test_train.py -k auxiliary_losses_do_not",
    ),
    Mutant(
        "padding counts in the balance loss",
        "model_moe.py",
        "P = (share * text[..., None]).sum",
        "P = share.sum",
        "test_moe.py -k padding_enters",
    ),
    Mutant(
        "norms in bf16 shares",
        "distributed/fsdp.py",
        "in_full = MixedPrecisionPolicy(reduce_dtype=exact",
        "in_full = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=exact",
        "test_parallel.py -k in_bfloat16",
    ),
    Mutant(
        "a warm-up that begins at its peak",
        "training/schedule.py",
        "return peak * (step + 1) / (warmup_steps + 1)",
        "return peak",
        "test_train.py -k warms_up",
    ),
    Mutant(
        "the best is the worst",
        "training/atomic.py",
        "return min(losses, key=losses.get, default=None)",
        "return max(losses, key=losses.get, default=None)",
        "test_checkpoint.py -k best",
    ),
    Mutant(
        "the best one is pruned",
        "training/atomic.py",
        "if path != best_one and not is_kept:",
        "if not is_kept:",
        "test_checkpoint.py -k best",
    ),
    Mutant(
        "bits per byte of all tokens",
        "training/loss.py",
        "bits_per_byte = text_nats / math.log(2) / size",
        "bits_per_byte = nats / math.log(2) / size",
        "test_train.py -k bits_per_byte_equal",
    ),
    Mutant(
        "a spike lowers no bar",
        "training/metrics.py",
        "return value > mean + max(6 * spread, 0.1 * mean)",
        "return value > mean + 6 * spread + 10 * mean",
        "test_train.py -k spike",
    ),
    # ---- data ----
    Mutant(
        "targets not shifted",
        "data/loader.py",
        "np.where(is_target[1:], tokens[1:], -1)",
        "np.where(is_target[1:], tokens[:-1], -1)",
        "test_loader.py -k shifted",
    ),
    Mutant(
        "ranks overlap",
        "data/loader.py",
        "self.last = batch_windows * (rank + 1) // world_size",
        "self.last = batch_windows",
        "test_loader.py -k ranks_and_micro",
    ),
    Mutant(
        "an epoch without a new order",
        "data/loader.py",
        "np.random.SeedSequence((seed, kind, epoch))",
        "np.random.SeedSequence((seed, kind, 0))",
        "test_loader.py -k an_epoch_has",
    ),
    Mutant(
        "the last window's filling is predicted",
        "data/loader.py",
        "y[i, targets:] = -1",
        "pass",
        "test_loader.py -k evaluation_has",
    ),
    Mutant(
        "a mask of the token before",
        "data/loader.py",
        "is_target[:n] = shards.read_mask(start, n)",
        "is_target[:n] = shards.read_mask(max(start - 1, 0), n)",
        "test_loader.py -k its_own_mask",
    ),
    Mutant(
        "all documents of a window but the first are lost",
        "data/loader.py",
        "return [Window(self.shards, pieces, sum(map(room_of, pieces))) for pieces in bins]",
        "return [Window(self.shards, pieces[:1], sum(map(room_of, pieces))) for pieces in bins]",
        "test_loader.py -k packed_window",
    ),
    Mutant(
        "a mixture begins its texts anew in every round",
        "data/loader.py",
        "before[at] = number * self.counts[text[at]] + earlier[g[at] % ROUND]",
        "before[at] = earlier[g[at] % ROUND]",
        "test_loader.py -k in_its_own_order",
    ),
    Mutant(
        "a stage forgets at which documents windows began",
        "data/loader.py",
        "return Position(tokens, self.begin.documents + documents)",
        "return Position(tokens, documents - documents)",
        "test_loader.py -k documents_that_began",
    ),
    Mutant(
        "a stage begins its texts anew",
        "training/stages.py",
        "positions.get(stage.order, {}), cells",
        "{}, cells",
        "test_stages.py -k no_stage_sees",
    ),
    Mutant(
        "a model stays as its first stage made it",
        "training/stages.py",
        "setattr(old, key, value)",
        "pass",
        "test_stages.py -k 'given_another and baseline'",
    ),
    Mutant(
        "gradients are added in another order after the first step",
        "distributed/processes.py",
        'options["bucket_cap_mb_list"] = [1e-6]',
        "pass",
        "test_parallel.py -k three_processes",
    ),
    # ---- post-training: chats, problems and rewards ----
    Mutant(
        "questions are learned",
        "data/chat.py",
        'yield Part(f"{role}\\n{content}")',
        'yield Part(f"{role}\\n{content}", is_target=True)',
        "test_chat.py -k learned_are",
    ),
    Mutant(
        "a chat's mask one token early",
        "data/chat.py",
        "    return ids, mask\n\n\ndef markup",
        "    return ids, [*mask[1:], False]\n\n\ndef markup",
        "test_chat.py -k learned_are",
    ),
    Mutant(
        "the end of an answer is not learned",
        "data/chat.py",
        "yield part._replace(is_target=is_target)",
        "yield part._replace(is_target=is_target and part.text != END)",
        "test_chat.py -k learned_are",
    ),
    Mutant(
        "the empty block of thinking is not learned",
        "data/chat.py",
        "yield part._replace(is_target=is_target)",
        "yield part._replace(is_target=is_target and (bool(thinking) or part.text in (content, END)))",
        "test_chat.py -k empty_block",
    ),
    Mutant(
        "a message spells out tokens of the format",
        "data/chat.py",
        "for piece in split_markup(text, cut) for i",
        "for piece in [text] for i",
        "test_chat.py -k no_text_of",
    ),
    Mutant(
        "rows of ShareGPT by other keys",
        "data/chat.py",
        'turn.get("content", turn.get("value"))',
        'turn.get("content", "")',
        "test_chat.py -k every_form",
    ),
    Mutant(
        "the answer in the question",
        "data/problems.py",
        "return messages[: questions[-1] + 1]",
        "return messages",
        "test_chat.py -k problems",
    ),
    Mutant(
        "two equal answers as a pair",
        "data/problems.py",
        "if not scored or scored[0][0] == scored[-1][0]:",
        "if not scored:",
        "test_chat.py -k ties",
    ),
    Mutant(
        "held out only in one order of its numbers",
        "data/arithmetic.py",
        "if tuple(sorted(problem)) not in excluded:",
        "if tuple(problem) not in excluded:",
        "test_arithmetic.py -k held_out",
    ),
    Mutant(
        "thinking is graded as an answer",
        "evals/rewards.py",
        "_, answer = split_thinking(completion.partition(END)[0])",
        "answer = completion.partition(END)[0].replace(THINK, '')",
        "test_rewards.py -k is_right",
    ),
    Mutant(
        "what was thought when an answer was cut is graded",
        "data/chat.py",
        'rest = ""',
        "rest = thinking",
        "test_rewards.py -k is_right",
    ),
    Mutant(
        "a reward reads the prompt",
        "training/answers.py",
        "self.tokenizer.decode([token for token in ids if",
        "self.tokenizer.decode([token for token in problem.prompt + ids if",
        "test_policy.py -k text_of_an_answer",
    ),
    # ---- post-training: samples ----
    Mutant(
        "one number for all rows",
        "generate.py",
        "token = draw(probs, uniforms[:, i])",
        "token = draw(probs, uniforms[:1, i].expand(B))",
        "test_generate.py -k 'is_alone and baseline'",
    ),
    Mutant(
        "what is behind the end belongs to an answer",
        "generate.py",
        "tokens[:, i] = torch.where(ended, -1, token)",
        "tokens[:, i] = token",
        "test_generate.py -k stop_token_and",
    ),
    Mutant(
        "log-probabilities of another temperature",
        "generate.py",
        "logprobs[:, i] = logp.gather",
        "logprobs[:, i] = log_probabilities(logits).gather",
        "test_generate.py -k temperature_and",
    ),
    Mutant(
        "one thought more than the budget",
        "generate.py",
        "is_forced = self.so_far >= n",
        "is_forced = self.so_far > n",
        "test_generate.py -k exactly_its_budget",
    ),
    Mutant(
        "what the budget forces is learned",
        "training/answers.py",
        "is_target = [not was_forced for was_forced in forced]",
        "is_target = [True] * len(forced)",
        "test_policy.py -k budget",
    ),
    Mutant(
        "thoughts that the prompt begins are no thoughts",
        "training/answers.py",
        "text = problem.opening + self",
        "text = self",
        "test_policy.py -k budget",
    ),
    Mutant(
        "answers depend on the process",
        "training/answers.py",
        "self.all[i]._replace(number=place) for place, i in enumerate(drawn)]\n        return self.here.share(of_step)",
        "self.all[i] for i in drawn]\n        return [x._replace(number=n) for n, x in enumerate(self.here.share(of_step))]",
        "test_policy.py -k processes_share",
    ),
    Mutant(
        "answers depend on what is sampled at once",
        "training/answers.py",
        "[problem.number for problem in part]",
        "range(len(part))",
        "test_policy.py -k no_process",
    ),
    Mutant(
        "the same draws in every step",
        "training/answers.py",
        "generate.draws(self.seed, step, ",
        "generate.draws(self.seed, 0, ",
        "test_policy.py -k no_process",
    ),
    Mutant(
        "the same problems in every step",
        "training/answers.py",
        "draw(step * n + np.arange(n)",
        "draw(np.arange(n)",
        "test_policy.py -k processes_share",
    ),
    Mutant(
        "sampled in training mode",
        "training/answers.py",
        "self.model.eval()",
        "pass",
        "test_policy.py -k eval_mode",
    ),
    Mutant(
        "an evaluation that draws",
        "training/answers.py",
        "n=1, temperature=0.0",
        "n=1, temperature=1.0",
        "test_policy.py -k evaluation",
    ),
    Mutant(
        "passed where all samples are right",
        "training/answers.py",
        "passed.any(axis=1)",
        "passed.all(axis=1)",
        "test_policy.py -k evaluation",
    ),
    # ---- post-training: rows, policy and reference ----
    Mutant(
        "prompts in the loss",
        "training/policy.py",
        "y[i, len(prompt) - 1 : len(row) - 1] = targets",
        "y[i, : len(row) - 1] = torch.cat((row[1 : len(prompt)], targets))",
        "test_policy.py -k neither_its_prompt",
    ),
    Mutant(
        "what fills up rows in the loss",
        "training/policy.py",
        "y = torch.full((len(prompts), longest), -1)",
        "y = torch.full((len(prompts), longest), eot_id)",
        "test_policy.py -k neither_its_prompt",
    ),
    Mutant(
        "the trainer without the sampler's temperature",
        "training/policy.py",
        ": tokenizer.vocab_size] / temperature",
        ": tokenizer.vocab_size]",
        "test_policy.py -k of_the_temperature",
    ),
    Mutant(
        "ids without a text behind them are likely",
        "training/policy.py",
        "logits(x)[..., : tokenizer.vocab_size]",
        "logits(x)",
        "test_policy.py -k of_the_temperature",
    ),
    Mutant(
        "the reference is trained along",
        "training/policy.py",
        "return copy.deepcopy(model).requires_grad_(False).eval()",
        "return model",
        "test_policy.py -k reference_stays",
    ),
    Mutant(
        "the reference is the resumed policy",
        "grpo.py",
        "curve, evaluates=held_out is not None)",
        "curve, evaluates=held_out is not None)\n        reference = frozen(policy) if beta else reference",
        "test_posttraining.py -k 'any_step and grpo'",
    ),
    Mutant(
        "dropout while a policy learns",
        "training/policy.py",
        "chosen[name] = off",
        "pass",
        "test_policy.py -k depends_on_chance",
    ),
    Mutant(
        "what fills up rows is routed",
        "training/policy.py",
        'chosen["eot_id"] = tokenizer.eot_id',
        "pass",
        "test_policy.py -k depends_on_chance",
    ),
    # ---- post-training: GRPO ----
    Mutant(
        "an advantage over all groups",
        "grpo.py",
        "rewards.mean(dim=1, keepdim=True)",
        "rewards.mean()",
        "test_grpo.py -k advantages",
    ),
    Mutant(
        "the population's standard deviation",
        "grpo.py",
        "rewards.std(dim=1, keepdim=True)",
        "rewards.std(dim=1, keepdim=True, correction=0)",
        "test_grpo.py -k advantages",
    ),
    Mutant(
        "clipped whatever the advantage",
        "grpo.py",
        "loss = -torch.minimum(ratio * advantage, clipped * advantage)",
        "loss = -clipped * advantage",
        "test_grpo.py -k by_hand",
    ),
    Mutant(
        "clipped above alone",
        "grpo.py",
        "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(max=1 + clip_high)",
        "test_grpo.py -k by_hand",
    ),
    Mutant(
        "one ratio for an answer, of the sum",
        "grpo.py",
        "(log_ratio.sum(dim=1, keepdim=True) / lengths)",
        "log_ratio.sum(dim=1, keepdim=True)",
        "test_grpo.py -k 'trl and gspo'",
    ),
    Mutant(
        "the weight of a token of cispo is learned",
        "grpo.py",
        "ratio.clamp(max=1 + clip_high).detach()",
        "ratio.clamp(max=1 + clip_high)",
        "test_grpo.py -k 'trl and cispo'",
    ),
    Mutant(
        "the divergence the other way round",
        "grpo.py",
        "log_ratio = reference_logp - logp",
        "log_ratio = logp - reference_logp",
        "test_grpo.py -k kl_is",
    ),
    Mutant(
        "away from the reference",
        "grpo.py",
        "losses = losses + beta * kl",
        "losses = losses - beta * kl",
        "test_policy.py -k pulls",
    ),
    Mutant(
        "dr_grpo by the longest answer of a batch",
        "grpo.py",
        "is_target / (n_answers * max_new_tokens)",
        "is_target / (n_answers * is_target.size(1))",
        "test_grpo.py -k 'one_by_one and dr_grpo'",
    ),
    Mutant(
        "tokens weighted by their micro-batch",
        "grpo.py",
        "token_weights(batch.is_target, loss_type, max_new_tokens, n_answers, n_tokens)",
        "token_weights(batch.is_target, loss_type, max_new_tokens, n_answers, batch.is_target.sum())",
        "test_policy.py -k 'grpos_gradient and dapo'",
    ),
    Mutant(
        "auxiliary losses once a micro-batch",
        "grpo.py",
        "auxiliary * batch.n_inputs / n_inputs",
        "auxiliary",
        "test_policy.py -k 'grpos_gradient and dapo'",
    ),
    Mutant(
        "the mean of the processes",
        "grpo.py",
        "(loss * here.world_size).backward()",
        "loss.backward()",
        "test_policy.py -k 'grpos_gradient and dapo'",
    ),
    Mutant(
        "a ratio that is not 1 at the first update",
        "grpo.py",
        "self.old_logp = logp.detach()",
        "self.old_logp = self.sampled_logp",
        "test_policy.py -k ratio_of_1",
    ),
    Mutant(
        "a ratio that is always 1",
        "grpo.py",
        "if batch.old_logp is None:",
        "if True:",
        "test_policy.py -k 'grpos_gradient and dapo'",
    ),
    Mutant(
        "the sampler's log-probabilities one token late",
        "grpo.py",
        "first = len(answer.problem.prompt) - 1",
        "first = len(answer.problem.prompt)",
        "test_policy.py -k sampler_noted",
    ),
    Mutant(
        "flat only where all answers are wrong",
        "grpo.py",
        "is_flat = (groups == groups[:, :1]).all(dim=1)",
        "is_flat = (groups == 0).all(dim=1)",
        "test_policy.py -k teach_nothing",
    ),
    # ---- post-training: DPO and reward models ----
    Mutant(
        "the mean over an answer, not the sum",
        "dpo.py",
        "gains = gain.sum(dim=1)",
        "gains = gain.sum(dim=1) / (y >= 0).sum(dim=1)",
        "test_policy.py -k gain_is",
    ),
    Mutant(
        "the rejected answer is preferred",
        "dpo.py",
        "margin = beta * (gain_chosen - gain_rejected)",
        "margin = beta * (gain_rejected - gain_chosen)",
        "test_dpo.py -k by_hand",
    ),
    Mutant(
        "ties are right",
        "dpo.py",
        'sums["accuracy"] += (margins > 0)',
        'sums["accuracy"] += (margins >= 0)',
        "test_posttraining.py -k experts_are_balanced",
    ),
    Mutant(
        "answers worth the same as a pair",
        "dpo.py",
        "if totals[best] > totals[worst]:",
        "if best != worst or True:",
        "test_dpo.py -k of_equals",
    ),
    Mutant(
        "log-likelihood by the pairs of a micro-batch",
        "dpo.py",
        "logp[:n].sum() / n_tokens",
        "logp[:n].sum() / n",
        "test_policy.py -k 'gradient_of_pairs and dpo'",
    ),
    Mutant(
        "pairs without the end of their answers",
        "training/pairs.py",
        "ids[len(begin) : last + 1]",
        "ids[len(begin) : last]",
        "test_policy.py -k with_their_ends",
    ),
    Mutant(
        "scored at the end of the row",
        "training/reward_model.py",
        "return scores.gather(1, lengths[:, None] - 1)[:, 0]",
        "return scores[:, -1]",
        "test_reward.py -k last_token",
    ),
    Mutant(
        "a margin that helps",
        "reward.py",
        "F.logsigmoid(chosen - rejected - margin)",
        "F.logsigmoid(chosen - rejected + margin)",
        "test_reward.py -k by_hand",
    ),
    Mutant(
        "scores pulled together, not to 0",
        "reward.py",
        "centering * (chosen + rejected) ** 2",
        "centering * (chosen - rejected) ** 2",
        "test_reward.py -k by_hand",
    ),
    Mutant(
        "the worst of n",
        "reward.py",
        "scores.argmax(dim=1, keepdim=True)",
        "scores.argmin(dim=1, keepdim=True)",
        "test_policy.py -k best_of_n",
    ),
    # ---- post-training: runs ----
    Mutant(
        "resume is ignored",
        "training/run.py",
        "path = checkpoint.newest(self.out, here.say) if resume else None",
        "path = None",
        "test_posttraining.py -k 'any_step and grpo'",
    ),
    Mutant(
        "pairs of a round are lost",
        "training/run.py",
        'self.state = state["state"]',
        "pass",
        "test_posttraining.py -k 'any_step and online'",
    ),
    Mutant(
        "samples after the checkpoint stay",
        "training/run.py",
        'metrics.Rows(self.out / "samples.jsonl", self.step)',
        'metrics.Rows(self.out / "samples.jsonl", 10**9)',
        "test_posttraining.py -k 'any_step and grpo'",
    ),
    Mutant(
        "saved at the end alone",
        "training/run.py",
        "is_due = now or self.evaluation_is_due or self.step % every == 0 or self.is_done",
        "is_due = now",
        "test_posttraining.py -k 'any_step and dpo'",
    ),
    Mutant(
        "evaluated again after a resume",
        "training/run.py",
        "self.evaluated_at = self.step if path and saving.was_evaluated(path) else -1",
        "self.evaluated_at = -1",
        "test_posttraining.py -k 'any_step and dpo'",
    ),
    # ---- Hugging Face, comparisons ----
    Mutant(
        "weights of a folder left out",
        "hf.py",
        "places[name].to_ours(tensor)",
        "places[name].to_ours(tensor) if 'norm' not in name else None",
        "test_parity.py -k 'qwen3 and logits and plain'",
    ),
    Mutant(
        "weights of another shape",
        "hf.py",
        "if shape != wanted:",
        "if False:",
        "test_hf.py -k shape",
    ),
    Mutant(
        "one degree of freedom too many",
        "benchmarks/verdicts.py",
        "(residual**2).sum() / ((variants - 1) * (seeds - 1))",
        "(residual**2).sum() / (variants * (seeds - 1))",
        "test_verdicts.py -k analysis_of_variance",
    ),
    Mutant(
        "what a seed does to all counts as chance",
        "benchmarks/verdicts.py",
        "losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()",
        "losses - losses.mean(1, keepdims=True)",
        "test_verdicts.py -k hard_for_all",
    ),
    Mutant(
        "many comparisons as one",
        "benchmarks/verdicts.py",
        "inside**comparisons",
        "inside",
        "test_verdicts.py -k dunnett",
    ),
    Mutant(
        "spread for the error of a mean",
        "benchmarks/comparison.py",
        "return statistics.stdev(values) / math.sqrt(len(values))",
        "return statistics.stdev(values)",
        "test_compare.py -k diverged_variant",
    ),
    Mutant(
        "the worst rate",
        "benchmarks/verdicts.py",
        "return min(sweep, key=sweep.get)",
        "return max(sweep, key=sweep.get)",
        "test_verdicts.py -k gain",
    ),
]


def table() -> str:
    """Returns docs/mutations.md as it is when every mutant is noticed."""
    lines = [
        "# Mutations",
        "",
        "Each row is a mistake in one line of the project, and the tests that fail for it. `python -m tests.mutate`",
        "makes them one by one in a copy of the project, and writes this table if none survives; with names, as in",
        '`python -m tests.mutate "router in bf16"`, it tries these alone. It is run by hand; the other tests check',
        "only that each text to replace stands once in its file.",
        "",
        f"All {len(MUTANTS)} are noticed.",
        "",
        "| mistake | file | noticed by |",
        "|---|---|---|",
    ]
    for mutant in MUTANTS:
        lines.append(f"| {mutant.name} | `{mutant.file}` | `{mutant.tests}` |")
    return "\n".join(lines) + "\n"


def outcome(mutant: Mutant, folder: Path) -> str:
    """Breaks the copy in `folder`, runs the mutant's tests there, mends it; returns what came of it."""
    file = folder / mutant.file
    source = file.read_text()
    assert source.count(mutant.before) == 1, mutant
    file.write_text(source.replace(mutant.before, mutant.after))
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *shlex.split(f"tests/{mutant.tests}")], cwd=folder, capture_output=True, text=True)
    file.write_text(source)
    if run.returncode == 0:
        return "SURVIVED"
    if run.returncode == 1:  # tests failed; other codes are for tests that are not there or cannot be read
        return "noticed"
    return f"NOT TRIED: {run.stdout[-500:]}"


def main(names: list[str]) -> None:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        sys.exit(f"no mutants of these names: {', '.join(sorted(unknown))}")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_project(Path(folder))
        for mutant in chosen:
            begin = time.perf_counter()
            outcomes.append(outcome(mutant, Path(folder)))
            print(f"{time.perf_counter() - begin:5.1f} s  {mutant.name:<50} {outcomes[-1]}", flush=True)
    noticed = outcomes.count("noticed")
    print(f"{noticed} of {len(chosen)} noticed")
    if noticed == len(MUTANTS):
        TABLE.write_text(table())
    if noticed < len(chosen):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
