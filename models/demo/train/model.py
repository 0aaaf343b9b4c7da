"""The network: Qwen3-MoE with a forward pass that is fast on CPU cores.

`Layout` places every parameter in one flat tensor, so that processes share weights and gradients
and the optimizer sees slices. Per-expert matrices are stacked; export.py writes the Hugging Face
names. Expert MLPs run as one plain GEMM per expert over rows sorted by expert: no padding.
"""

import math

import torch
import torch.nn.functional as F

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "use_cache": True,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def shapes(config):
    """Name -> shape of every parameter, in flat order."""
    h, d, m, e = (
        config[k] for k in ("hidden_size", "head_dim", "moe_intermediate_size", "num_experts")
    )
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    out = {"embed": (config["vocab_size"], h), "head": (config["vocab_size"], h), "norm": (h,)}
    for i in range(config["num_hidden_layers"]):
        out |= {
            f"{i}.norm1": (h,),
            f"{i}.q": (q, h),
            f"{i}.k": (kv, h),
            f"{i}.v": (kv, h),
            f"{i}.o": (h, q),
            f"{i}.q_norm": (d,),
            f"{i}.k_norm": (d,),
            f"{i}.norm2": (h,),
            f"{i}.router": (e, h),
            f"{i}.gate_up": (e, 2 * m, h),
            f"{i}.down": (e, h, m),
        }
    return out


class Layout:
    """Views of named parameters in a flat tensor."""

    def __init__(self, config):
        self.shapes = shapes(config)
        self.spans, at = {}, 0
        for name, shape in self.shapes.items():
            self.spans[name] = (at, at + math.prod(shape))
            at += math.prod(shape)
        self.size = at

    def views(self, flat):
        return {n: flat[a:b].view(self.shapes[n]) for n, (a, b) in self.spans.items()}

    def initial(self, seed):
        flat = torch.zeros(self.size)
        generator = torch.Generator().manual_seed(seed)
        for name, view in self.views(flat).items():
            if "norm" in name:
                view.fill_(1.0)
            elif name.endswith((".o", ".down")):
                view.normal_(0, 0.01, generator=generator)
            else:
                view.normal_(0, 0.04, generator=generator)
        return flat


class Experts(torch.autograd.Function):
    """out[t] = sum over the chosen experts e of weight * down_e(silu(gate_e x_t) * up_e x_t).

    `order` lists the (token, choice) pairs by expert; expert e owns pairs [bounds[e], bounds[e+1]).
    """

    @staticmethod
    def forward(ctx, x, weight, gate_up, down, order, bounds):  # x [tokens, hidden]
        top_k, middle = weight.shape[1], down.shape[2]
        token, inverse = order // top_k, torch.argsort(order)
        rows = x.index_select(0, token)
        pre = x.new_empty(len(rows), 2 * middle)
        spans = [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:])) if b > a]
        for e, a, b in spans:
            torch.mm(rows[a:b], gate_up[e].t(), out=pre[a:b])
        gated = F.silu(pre[:, :middle])
        scale = weight.flatten().index_select(0, order)[:, None]
        act = (pre[:, middle:] * gated).mul_(scale)
        y = torch.empty_like(rows)
        for e, a, b in spans:
            torch.mm(act[a:b], down[e].t(), out=y[a:b])
        ctx.save_for_backward(rows, gate_up, down, pre, gated, act, scale, token, inverse)
        ctx.spans, ctx.top_k = spans, top_k
        return y.index_select(0, inverse).view(-1, top_k, x.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, dout):
        rows, gate_up, down, pre, gated, act, scale, token, inverse = ctx.saved_tensors
        middle = down.shape[2]
        dy = dout.index_select(0, token)
        dact, drows = torch.empty_like(act), torch.empty_like(rows)
        dgate_up, ddown = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, a, b in ctx.spans:
            torch.mm(dy[a:b], down[e], out=dact[a:b])
            torch.mm(dy[a:b].t(), act[a:b], out=ddown[e])
        dscale = (dact * act).sum(1) / scale[:, 0]
        dact.mul_(scale)
        dpre = torch.empty_like(pre)
        torch.mul(dact, gated, out=dpre[:, middle:])
        dact.mul_(pre[:, middle:])
        dpre[:, :middle] = torch.ops.aten.silu_backward(dact, pre[:, :middle])
        for e, a, b in ctx.spans:
            torch.mm(dpre[a:b], gate_up[e], out=drows[a:b])
            torch.mm(dpre[a:b].t(), rows[a:b], out=dgate_up[e])
        dx = drows.index_select(0, inverse).view(-1, ctx.top_k, rows.shape[1]).sum(1)
        dweight = dscale.index_select(0, inverse).view(-1, ctx.top_k)
        return dx, dweight, dgate_up, ddown, None, None


class RmsNorm(torch.autograd.Function):
    """weight * x / rms(x) over the last dimension, with few passes over memory."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rms = torch.rsqrt(
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow_(2) / x.shape[-1] + eps
        )
        unit = x * rms
        ctx.save_for_backward(unit, rms, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, dy):
        unit, rms, weight = ctx.saved_tensors
        both = dy * unit
        dweight = both.flatten(0, -2).sum(0)
        mean = (both @ weight)[..., None] / unit.shape[-1]
        return (dy * weight).addcmul_(unit, mean, value=-1).mul_(rms), dweight, None


_norm = RmsNorm.apply


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Model:
    """Forward over parameter views. `loads` collects expert counts when it is a list."""

    def __init__(self, config, params):
        self.c = config
        self.p = params
        d = config["head_dim"]
        frequency = 1.0 / config["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
        angle = torch.outer(torch.arange(config["max_position_embeddings"]).float(), frequency)
        angle = torch.cat((angle, angle), -1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def _attention(self, i, x, positions, mask):  # x [batch, length, hidden]
        batch, length, _ = x.shape
        d, eps = self.c["head_dim"], self.c["rms_norm_eps"]

        def heads(name):
            return F.linear(x, self.p[f"{i}.{name}"]).view(batch, length, -1, d)

        q = _norm(heads("q"), self.p[f"{i}.q_norm"], eps).transpose(1, 2)
        k = _norm(heads("k"), self.p[f"{i}.k_norm"], eps).transpose(1, 2)
        v = heads("v").transpose(1, 2)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.p[f"{i}.o"])

    def _moe(self, i, x):  # x [tokens, hidden] -> y, mean probability and count of each expert
        top_k, experts = self.c["num_experts_per_tok"], self.c["num_experts"]
        probs = torch.softmax(F.linear(x, self.p[f"{i}.router"]), -1)
        weight, expert = probs.topk(top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        flat = expert.flatten()
        counts = torch.bincount(flat, minlength=experts)
        bounds = [0] + counts.cumsum(0).tolist()
        gate_up, down = self.p[f"{i}.gate_up"], self.p[f"{i}.down"]
        y = Experts.apply(x, weight, gate_up, down, torch.argsort(flat), bounds)
        return y, probs.mean(0), counts

    def hidden(self, ids, positions, mask):
        """Final hidden states [batch, length, hidden] and per layer (mean probability, count)."""
        eps = self.c["rms_norm_eps"]
        x = F.embedding(ids, self.p["embed"])
        routing = []
        for i in range(self.c["num_hidden_layers"]):
            x = x + self._attention(i, _norm(x, self.p[f"{i}.norm1"], eps), positions, mask)
            y, *stats = self._moe(i, _norm(x, self.p[f"{i}.norm2"], eps).flatten(0, 1))
            x = x + y.view_as(x)
            routing.append(stats)
        return _norm(x, self.p["norm"], eps), routing

    def logits(self, hidden):
        return F.linear(hidden, self.p["head"])
