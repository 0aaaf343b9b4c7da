"""Writes config.json and model.safetensors (bfloat16) from a training checkpoint, under the names
of `transformers`, and checks that our forward pass and Qwen3MoeForCausalLM give the same logits."""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from model import CONFIG, Layout, Model

TOP = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
LAYER = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "router": "mlp.gate"}


def named_tensors(params, config):
    """(name in transformers, tensor) for every parameter."""
    middle = config["moe_intermediate_size"]
    for name, value in params.items():
        layer, _, kind = name.rpartition(".")
        prefix = f"model.layers.{layer}."
        if kind in TOP:
            yield TOP[kind] + ".weight", value
        elif kind == "gate_up":
            for e, both in enumerate(value):
                yield f"{prefix}mlp.experts.{e}.gate_proj.weight", both[:middle]
                yield f"{prefix}mlp.experts.{e}.up_proj.weight", both[middle:]
        elif kind == "down":
            for e, one in enumerate(value):
                yield f"{prefix}mlp.experts.{e}.down_proj.weight", one
        elif kind in LAYER:
            yield f"{prefix}{LAYER[kind]}.weight", value
        else:
            suffix = kind if "norm" in kind else kind + "_proj"
            yield f"{prefix}self_attn.{suffix}.weight", value


def load_params(checkpoint, which):
    """Float32 parameter views of a checkpoint, rounded to bfloat16 as exported."""
    flat = torch.load(checkpoint)[which].to(torch.bfloat16).float()
    return Layout(CONFIG).views(flat)


@torch.no_grad()
def check(folder, params):
    """Largest logit difference to transformers in float32, relative to the largest logit."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(
        0, CONFIG["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(0)
    )
    theirs = reference(ids).logits
    model = Model(CONFIG, params)
    ours = model.logits(model.hidden(ids, torch.arange(200).repeat(2, 1), None)[0])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="checkpoint folder to write to"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="export the running mean of the weights (better before the decay ends)",
    )
    args = parser.parse_args()
    params = load_params(args.checkpoint, "ema" if args.ema else "flat")
    tensors = {
        n: t.to(torch.bfloat16).contiguous().clone() for n, t in named_tensors(params, CONFIG)
    }
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    difference = check(args.out, params)
    count = sum(t.numel() for t in tensors.values())
    print(f"{count:,} parameters, logits differ by {difference:.1e} of the largest")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
