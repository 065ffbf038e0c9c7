"""The optimisers and their learning rates; what a step is here: clipped, gated where a gradient is not
finite, followed by the EMA.
"""
import torch


# ------------------------------------------------------------------------------------------------
# The optimisers.

def orthogonal(x, dtype):
    """Matrices (K, m, n) -> their singular vectors with all singular values about 1 (0.68 to 1.21), float32.

    Five Newton-Schulz steps of Muon's quintic, which is steep at 0 (Jordan et al., 2024), in dtype.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT                                                    # (K, m, m), of the shorter side
        bent = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, bent, x, beta=3.4445)
    return (x.mT if tall else x).float()


class Muon(torch.optim.AdamW):
    """Moves the matrices of groups with "parts" by their orthogonalised Nesterov momentum (Jordan et al.,
    2024), without decay; the rest as AdamW does.

    All parameters of such a group have one shape; each is "parts" matrices, one below the other.
    """

    dtype, momentum = torch.bfloat16, 0.95

    @torch.no_grad()
    def step(self):
        """As update calls it: found_inf, on the device, is above 0 where nothing may change."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights and "parts" in group:
                self._move(weights, group["lr"], group["parts"])
        super().step()  # it passes over what has no gradient

    def _move(self, weights, lr, parts):
        """Weights, K of (m, n); their gradients are used up."""
        buffers, bad = [self.state[p]["momentum"] for p in weights], self.found_inf > 0
        before, old = torch.stack(weights), torch.stack(buffers)                 # (K, m, n)
        gradient = torch.stack([p.grad for p in weights])                        # (K, m, n)
        new = old.lerp(gradient, 1 - self.momentum)
        ahead = gradient.lerp(new, self.momentum)
        ahead = ahead.reshape(len(weights) * parts, -1, ahead.shape[2])          # (K*parts, m/parts, n)
        lr = lr * max(1, ahead.shape[1] / ahead.shape[2]) ** 0.5                 # the "original" adjustment
        after = before - lr * orthogonal(ahead, self.dtype).reshape(before.shape)
        torch._foreach_copy_(buffers, list(torch.where(bad, old, new)))
        torch._foreach_copy_(weights, list(torch.where(bad, before, after)))
        for p in weights:
            p.grad = None


def adamw(parameters, blocks, beta2, precision):
    return torch.optim.AdamW(parameters, betas=(0.9, beta2), weight_decay=0.0, fused=True)


def muon(parameters, blocks, beta2, precision):
    """Muon for the blocks' matrices but adaLN's; queries, keys and values are matrices of their own."""
    alike = {}
    for name, p in blocks.named_parameters():
        if p.ndim == 2 and p.requires_grad and "adaLN" not in name:
            parts = 3 if name.endswith("qkv.weight") else 1
            alike.setdefault((p.shape, parts), []).append(p)
    groups = [{"params": same, "parts": parts, "rate": "muon_lr"} for (_, parts), same in alike.items()]
    matrices = [p for same in alike.values() for p in same]
    taken = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in taken]
    optimiser = Muon([{"params": rest}, *groups], betas=(0.9, beta2), weight_decay=0.0, fused=True)
    if precision == "fp32":
        optimiser.dtype = torch.float32
    for p in matrices:  # Adam's code wants a step in every state that it loads
        optimiser.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
    return optimiser


# (parameters, the backbone's blocks, beta2, precision) -> an optimiser. A group's "rate" names the flag of
# its learning rate, without one it is lr.
OPTIMISERS = {"adamw": adamw, "muon": muon}


# ------------------------------------------------------------------------------------------------
# A step.

def schedule(step, warmup=0, decay_from=None, decay_to=None):
    """The learning rates' factor: up to 1 over so many steps; from 1 at decay_from to 0 at decay_to."""
    risen = min(1.0, (step + 1) / max(1, warmup))
    left = 1.0 if decay_to is None else (decay_to - step) / (decay_to - decay_from)
    return risen * min(1.0, max(0.0, left))


def set_rates(optimiser, rates, factor):
    """Give all groups factor times their rate of rates {name: value} -> {name: value} of those in use."""
    used = {}
    for group in optimiser.param_groups:
        name = group.get("rate", "lr")
        group["lr"] = used[name] = factor * rates[name]
    return used


def update(parameters, optimiser):
    """Clip to norm 1 and step -> the gradient's norm, and 1.0 where it is not finite.

    Where it is not, the weights stay as they are; the host reads nothing.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    bad = (~torch.isfinite(norm)).float()
    optimiser.found_inf, optimiser.grad_scale = bad, None  # what a gradient scaler would tell the fused step
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, bad


@torch.no_grad()
def update_ema(ema, model, step, ages=None):
    """EMA with the rate min(0.9999, (1 + n) / (10 + n)): a short run's average is not its initial weights.

    n is the step; of a parameter in ages {name: steps} the step plus its age.
    """
    averages, weights = list(ema.parameters()), list(model.parameters())
    older = [ages.get(name, 0) for name, _ in model.named_parameters()] if ages else [0] * len(weights)
    for age in set(older):
        pairs = [(average, weight) for average, weight, own in zip(averages, weights, older) if own == age]
        rate = min(0.9999, (1 + step + age) / (10 + step + age))
        torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - rate)
